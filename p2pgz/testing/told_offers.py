"""Offers of nothing: a peer that says that it has chunks, and has none. For tests of everything but the bytes."""

from __future__ import annotations

from collections.abc import Mapping


class Told:
    """Chunks of a segment that this peer says it has."""

    ratio = 1.0

    def __init__(self, count: int) -> None:
        self.chunk_count = count
        self._bits = ((1 << count) - 1).to_bytes((count + 7) // 8, "little")

    def size(self, n: int) -> int:
        return 1

    def has(self, n: int) -> bool:
        return True

    def bits(self) -> bytes:
        return self._bits

    def read_cached(self, n: int, offset: int, into: memoryview) -> bool:
        return False

    async def read(self, n: int, offset: int, into: memoryview) -> bool:
        return False


class ToldOffers:
    """These swarms (chunk counts by their names), complete."""

    def __init__(self, swarms: Mapping[bytes, int] | None = None) -> None:
        self._told = {swarm: Told(count) for swarm, count in (swarms or {}).items()}

    def swarm(self, swarm: bytes) -> Told | None:
        return self._told.get(swarm)

    def version(self) -> int:
        return 0

    async def document(self, digest: bytes) -> bytes | None:
        return None

    def index(self, diff_id: bytes) -> bytes | None:
        return None

    def secret(self, name: bytes) -> bytes | None:
        return None

    def proven_swarm(self, name: bytes) -> Told | None:
        return None

    async def proven_document(self, name: bytes) -> bytes | None:
        return None
