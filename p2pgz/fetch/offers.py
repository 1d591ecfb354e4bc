"""The pool as what the exchange gives to peers: `p2p.offers` on segments.

Only chunks verified in this boot, and only what `fetch.shares` says is for every peer, or for those that prove that they
know its image. What it does not name is unknown here, too: neither pool nor index are looked at. Bytes are copied out of the
segment file before a removal can take them: at once when they are in the page cache, otherwise in a thread, under a claim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import trio

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.fetch.indexes import PlainIndexes
from p2pgz.fetch.shares import Shares
from p2pgz.fetch.startup import StartUpLists
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.presence import Presence
from p2pgz.pool.segment import SHARED_DOMAIN

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
    """What of the pool is given away; see `p2p.offers.Offers`. Without `shares` all of the shared domain is: for tests."""

    def __init__(
        self,
        pool: Pool,
        shares: Shares | None = None,
        indexes: PlainIndexes | None = None,
        startups: StartUpLists | None = None,
    ) -> None:
        self._pool = pool
        self._shares = shares
        self._indexes = indexes
        self._startups = startups
        self._told_documents: dict[bytes, bytes] = {}
        """indexes of plain layers that some peer has been told of, and their segments: who is told may have them"""
        self._limiter = trio.CapacityLimiter(DISK_THREADS)
        self._offers: dict[int, tuple[Segment, SegmentOffer]] = {}

    def swarm(self, swarm: bytes) -> SegmentOffer | None:
        """The segment of this TOC, if it is here and every peer may have it."""
        allowed = self._shares is None or self._shares.is_open_segment(swarm)
        if len(swarm) != SHA256_BYTES or not allowed:
            return None
        return self._offer(self._pool.segment(Digest(swarm)))

    def _offer(self, segment: Segment | None) -> SegmentOffer | None:
        if segment is None:
            return None
        known = self._offers.get(segment.row)
        if known is None or known[0] is not segment:
            known = self._offers[segment.row] = (segment, SegmentOffer(segment, self._limiter))
        return known[1]

    def version(self) -> int:
        """Another number whenever any bitmap may have changed, or who may see it."""
        return Presence.changes + (self._shares.changes if self._shares is not None else 0)

    async def document(self, digest: bytes) -> bytes | None:
        """A TOC, manifest or config that every peer may have, or the start-up list that has this name."""
        if (told_list := self._startup_list(digest, SHARED_DOMAIN, proven=False)) is not None:
            return told_list
        if not self._is_open_document(digest):
            await trio.lowlevel.checkpoint()
            return None
        return await self._pool.get_object(Digest(digest))

    def _is_open_document(self, digest: bytes) -> bool:
        if self._shares is None or self._shares.is_open_document(digest):
            return True
        return self._shares.is_open_segment(self._told_documents.get(digest, b""))

    def index(self, diff_id: bytes) -> bytes | None:
        """What is known of the own index of a plain layer whose chunks every peer may have."""
        found = self._indexes.claim(Digest(diff_id)) if self._indexes is not None else None
        if found is None:
            return None
        segment, document, claim = found
        if self._shares is not None and not self._shares.is_open_segment(segment.id.raw):
            return None
        self._told_documents[document.raw] = segment.id.raw
        return claim

    def secret(self, name: bytes) -> bytes | None:
        """The secret of the image that has a swarm or document of this name."""
        return self._shares.secret(name) if self._shares is not None else None

    def proven_swarm(self, name: bytes) -> SegmentOffer | None:
        """The segment that a prover may have under this name."""
        place = self._shares.closed_segment(name) if self._shares is not None else None
        return self._offer(self._pool.segment(place[1], place[0])) if place else None

    async def proven_document(self, name: bytes) -> bytes | None:
        """The document that a prover may have under this name."""
        place = self._shares.closed_document(name) if self._shares is not None else None
        if place is None:
            await trio.lowlevel.checkpoint()
            return None
        if (told_list := self._startup_list(place[1].raw, place[0], proven=True)) is not None:
            return told_list
        return await self._pool.get_object(place[1], domain=place[0])

    def _startup_list(self, name: bytes, domain: str, *, proven: bool) -> bytes | None:
        if self._startups is None or self._shares is None:
            return None
        manifest = self._shares.startup_list(name, proven=proven)
        return self._startups.told(manifest, domain) if manifest is not None else None

    def holds(self, digest: bytes) -> bool:
        """Whether the DHT may answer that this host has a document or chunk: it is here, and every peer may have it."""
        if self._shares is not None and self._shares.is_open_document(digest):
            return True
        place = self._pool.find(SHARED_DOMAIN, digest)
        if place is None or not place[0].presence.has(place[1]):
            return False
        return self._shares is None or self._shares.is_open_segment(place[0].id.raw)


def _ratio(segment: Segment) -> float:
    """Compressed by raw bytes, as the layer's writer left them; 1 for layers that were not compressed by chunk."""
    table = segment.table
    raw = sum(table.size)
    if table.compression == "none" or not raw:
        return 1.0
    return (max(table.blob_end) - min(table.blob_offset)) / raw
