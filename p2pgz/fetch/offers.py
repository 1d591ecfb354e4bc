"""The pool as what the exchange gives to peers: `p2p.offers` on segments.

Only chunks verified in this boot, only segments of the shared domain, and only those that `may_share` allows (a layer whose
TOC nobody vouches for is for this host alone). Bytes are copied out of the segment file before a removal can take them:
at once when they are in the page cache, otherwise in a thread, under a claim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

import trio

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.pool.pool import Pool, Segment

# threads that wait for the disk on behalf of peers; the host's own readers have others
DISK_THREADS: Final = 2


class SegmentOffer:
    """One segment; see `p2p.offers.Offer`."""

    def __init__(self, segment: Segment, limiter: trio.CapacityLimiter) -> None:
        self._segment = segment
        self._limiter = limiter
        self._size: Sequence[int] | memoryview = segment.table.size
        self.chunk_count = segment.table.chunk_count
        self.ratio = _ratio(segment)

    def size(self, n: int) -> int:
        """Bytes of chunk n."""
        return self._size[n]

    def has(self, n: int) -> bool:
        """Whether chunk n is here and verified."""
        return self._segment.presence.has(n)

    def bits(self) -> bytes:
        """The whole bitmap."""
        return self._segment.presence.to_bytes()

    def read_cached(self, n: int, offset: int, into: memoryview) -> bool:
        """Copy from the page cache; nothing is awaited between the look at the bit and the copy."""
        segment = self._segment
        if not segment.presence.has(n):
            return False
        try:
            done = os.preadv(segment.data_fd, [into], segment.table.segment_offset[n] + offset, os.RWF_NOWAIT)
        except OSError:  # not in the page cache, or a file system without RWF_NOWAIT
            return False
        return done == len(into)

    async def read(self, n: int, offset: int, into: memoryview) -> bool:
        """Wait for the disk in a thread; false when the chunk is gone."""
        segment = self._segment
        await segment.claim([n])
        try:
            if not segment.presence.has(n):
                return False
            start = segment.table.segment_offset[n] + offset

            def fill() -> bool:
                done = 0
                while done < len(into):
                    count = os.preadv(segment.data_fd, [into[done:]], start + done)
                    if count <= 0:
                        return False
                    done += count
                return True

            try:
                return await trio.to_thread.run_sync(fill, limiter=self._limiter)
            except OSError:
                return False
        finally:
            segment.release([n])


class PoolOffers:
    """What of the pool is given away; see `p2p.offers.Offers`."""

    def __init__(self, pool: Pool, may_share: Callable[[Segment], bool] = lambda segment: True) -> None:
        self._pool = pool
        self._may_share = may_share
        self._limiter = trio.CapacityLimiter(DISK_THREADS)
        self._offers: dict[int, tuple[Segment, SegmentOffer]] = {}

    def swarm(self, swarm: bytes) -> SegmentOffer | None:
        """The segment of this TOC, if it is here and may be shared."""
        segment = self._pool.segment(Digest(swarm)) if len(swarm) == SHA256_BYTES else None
        if segment is None or not self._may_share(segment):
            return None
        known = self._offers.get(segment.row)
        if known is None or known[0] is not segment:
            known = self._offers[segment.row] = (segment, SegmentOffer(segment, self._limiter))
        return known[1]

    async def document(self, digest: bytes) -> bytes | None:
        """A TOC, manifest or config of a shared image."""
        return await self._pool.get_object(Digest(digest))


def _ratio(segment: Segment) -> float:
    """Compressed by raw bytes, as the layer's writer left them; 1 for layers that were not compressed by chunk."""
    table = segment.table
    raw = sum(table.size)
    if table.compression == "none" or not raw:
        return 1.0
    return (max(table.blob_end) - min(table.blob_offset)) / raw
