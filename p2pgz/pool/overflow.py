"""Chunks that the disk has no room for, in memory, until their readers have had them: serving without keeping.

Owned by `pool.chunks`. Bounded: the oldest are forgotten for new ones, and whoever still needs one of those fetches
it again. What nobody asks for any more is forgotten too, or a node that was short of room now and then would fill this ring
and hold it for ever. Nothing in here counts as present.
"""

from __future__ import annotations

from collections import OrderedDict

from p2pgz.core.verify import VerifiedChunk
from p2pgz.pool.segment import Segment

# Requests of eight connections with 4 MiB each, twice; more only when a single chunk is larger (MAX_CHUNK_BYTES)
OVERFLOW_BYTES = 64 << 20


class Overflow:
    """A ring of verified chunks. A `limit_bytes` of 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._chunks: OrderedDict[tuple[int, int], tuple[Segment, VerifiedChunk]] = OrderedDict()
        self._asked_for: set[tuple[int, int]] = set()
        self.bytes = 0
        self.chunks = 0
        """how many there were so far"""

    def __len__(self) -> int:
        return len(self._chunks)

    def put(self, segment: Segment, n: int, chunk: VerifiedChunk) -> bool:
        """Keep it for a while; false when this pool keeps none."""
        if not self._limit_bytes:
            return False
        self.drop(segment, n)
        self._chunks[segment.row, n] = segment, chunk
        self._asked_for.add((segment.row, n))
        self.bytes += len(chunk)
        self.chunks += 1
        while self.bytes > self._limit_bytes and len(self._chunks) > 1:
            self._forget(next(iter(self._chunks)))
        return True

    def get(self, segment: Segment, n: int) -> VerifiedChunk | None:
        """The chunk, if it is still here."""
        found = self._chunks.get((segment.row, n))
        if found is None or found[0] is not segment:
            return None
        self._asked_for.add((segment.row, n))
        return found[1]

    def drop(self, segment: Segment, n: int) -> None:
        """It is on the disk now."""
        if (segment.row, n) in self._chunks:
            self._forget((segment.row, n))

    def drop_all(self, segment: Segment) -> None:
        """The segment goes away."""
        for key in [key for key, (owner, _) in self._chunks.items() if owner is segment]:
            self._forget(key)

    def forget_unused(self) -> None:
        """Forget what was neither put here nor asked for since the last call."""
        for key in self._chunks.keys() - self._asked_for:
            self._forget(key)
        self._asked_for.clear()

    def _forget(self, key: tuple[int, int]) -> None:
        _, chunk = self._chunks.pop(key)
        self.bytes -= len(chunk)
        self._asked_for.discard(key)

    def oldest(self) -> tuple[Segment, int, VerifiedChunk] | None:
        """What is to be tried on the disk next."""
        for (_, n), (segment, chunk) in self._chunks.items():
            return segment, n, chunk
        return None
