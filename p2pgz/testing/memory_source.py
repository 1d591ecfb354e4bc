"""`MemorySource`: an ImageSource whose blobs are bytes in memory, with faults on demand.

For tests of everything above the registry: what was asked for is in `requests`, and `faults` is a list of things that the
next requests do wrong, one each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import Descriptor
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageNotFound, P2pgzError


@dataclass(slots=True)
class Fault:
    """One request's trouble: deliver `after_bytes`, then raise `error`, or hang for ever when it is None."""

    after_bytes: int = 0
    error: P2pgzError | None = None


@dataclass(eq=False)
class MemorySource:
    """Blobs by digest and tags by name."""

    name: str = "memory"
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    tags: dict[str, Descriptor] = field(default_factory=dict)
    requests: list[tuple[Digest, int, int]] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    piece_bytes: int = 32 << 10
    before_piece: Callable[[], object] | None = None
    """awaited before every piece if it returns an awaitable: a gate for tests that need an order"""

    def add(self, data: bytes, media_type: str = "application/octet-stream") -> Descriptor:
        """Store a blob and describe it."""
        digest = Digest.of(data)
        self.blobs[digest] = data
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    async def resolve(self, reference: Reference) -> Descriptor:
        await trio.lowlevel.checkpoint()
        if reference.tag not in self.tags:
            raise ImageNotFound(f"{self.name}: no tag {reference.tag!r}")
        return self.tags[reference.tag]

    async def document(self, descriptor: Descriptor) -> bytes:
        self.requests.append((descriptor.digest, 0, descriptor.size))
        await trio.lowlevel.checkpoint()
        return self._blob(descriptor)

    def _blob(self, descriptor: Descriptor) -> bytes:
        if descriptor.digest not in self.blobs:
            raise ImageNotFound(f"{self.name}: no blob {descriptor.digest}")
        return self.blobs[descriptor.digest]

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        self.requests.append((descriptor.digest, start, end))
        data = self._blob(descriptor)[start:end]
        fault = self.faults.popleft() if self.faults else None

        async def pieces() -> AsyncGenerator[bytes, None]:
            for at in range(0, len(data), self.piece_bytes):
                await trio.lowlevel.checkpoint()
                if self.before_piece is not None and hasattr(gate := self.before_piece(), "__await__"):
                    await gate
                if fault is not None and at >= fault.after_bytes:
                    if fault.error is None:
                        await trio.sleep_forever()
                    else:
                        raise fault.error
                yield data[at : at + self.piece_bytes]

        async with aclosing(pieces()) as stream:
            yield stream
