"""Chunks that the disk has no room for, in memory, until their readers have had them: serving without keeping.

Owned by `pool.chunks`. Bounded: the oldest are forgotten for new ones, and whoever still needs one of those fetches
it again. Nothing in here counts as present.
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
        self.bytes += len(chunk)
        self.chunks += 1
        while self.bytes > self._limit_bytes and len(self._chunks) > 1:
            _, (_, oldest) = self._chunks.popitem(last=False)
            self.bytes -= len(oldest)
        return True

    def get(self, segment: Segment, n: int) -> VerifiedChunk | None:
        """The chunk, if it is still here."""
        found = self._chunks.get((segment.row, n))
        return found[1] if found is not None and found[0] is segment else None

    def drop(self, segment: Segment, n: int) -> None:
        """It is on the disk now."""
        found = self._chunks.pop((segment.row, n), None)
        if found is not None:
            self.bytes -= len(found[1])

    def oldest(self) -> tuple[Segment, int, VerifiedChunk] | None:
        """What is to be tried on the disk next."""
        for (_, n), (segment, chunk) in self._chunks.items():
            return segment, n, chunk
        return None
