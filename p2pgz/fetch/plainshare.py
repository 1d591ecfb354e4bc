"""Layers that nobody converted, from peers by chunk instead of from the registry as one stream.

Called by the opener of plain layers before anybody asks the registry for the layer. Peers are asked for the layer's own
index by its diffID. An index is somebody's word: its chunks are gathered in a spool, the stream that they make is indexed
anew (`core.indexcheck`), and only when both agree, and the diffID is the one of the image's config, does any of it become
a segment. An index that lies costs those that told it their place. What cannot be had this way is read from the registry.

An index that a maker has signed whom the configuration trusts is believed at once: the layer is lazy, and `watch` makes the
same check when all of it is here. Design, section 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from p2pgz.core import indexclaim, indexdoc
from p2pgz.core.digest import Digest
from p2pgz.core.indexclaim import IndexClaim
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.model import Toc
from p2pgz.core.ownindex import PLAIN_CHUNK_BYTES, PlainIndex, segment_toc
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import IndexPeers
from p2pgz.errors import ChunkCorrupt, ImageInvalid, PeerFault
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.gather import Gathering, PeersGaveUp
from p2pgz.fetch.indexes import PlainIndexes
from p2pgz.fetch.limiter import Throttle
from p2pgz.fetch.plain import Progress
from p2pgz.fetch.spool import move_into_pool, open_spool
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SegmentMeta

log = structlog.get_logger(component="fetch")

# A peer that is well answers in a round trip; the others are not waited for once somebody has answered
CLAIMS_SECONDS: Final = 1.0
MORE_CLAIMS_SECONDS: Final = 0.05
# All peers together may take this long for an index; one of a large layer has some MB
INDEX_SECONDS: Final = 10.0
INDEX_ATTEMPTS: Final = 3
INDEX_RETRY_SECONDS: Final = 0.1
# How many different indexes of one layer are tried: true ones differ only by their makers' compressors
CANDIDATES_MAX: Final = 3
# What an index may cost before anything vouches for it. Bytes: each entry has 512 bytes of header in the layer, which
# compress to 15 at best, and some 100 here. Stream: what deflate can do at most (1032:1).
INDEX_BASE_BYTES: Final = 4 << 20
INDEX_BYTES_PER_LAYER_BYTE: Final = 16
STREAM_BASE_BYTES: Final = 64 << 20
STREAM_BYTES_PER_LAYER_BYTE: Final = 1100
CHUNKS_MAX: Final = 500_000
# Indexes that are fetched and parsed at a time
INDEXES_AT_ONCE: Final = 2
# Spool and segment are both on the disk for a moment
DISK_COPIES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayer:
    """A layer that peers have given, or are trusted to give. `toc` is named as its segment is."""

    toc: Toc
    layout: SegmentLayout
    document: Digest
    data: bytes


@dataclass(slots=True)
class _Candidate:
    """An index document, who tells of it, and who has signed it."""

    document: Digest
    document_bytes: int
    peers: list[PeerId] = field(default_factory=list)
    makers: dict[PeerId, bytes] = field(default_factory=dict)


class PlainShare:
    """Plain layers from peers. `verify` checks Ed25519 signatures; `trusted` are the makers that are believed unseen."""

    def __init__(
        self,
        pool: Pool,
        peers: IndexPeers,
        indexes: PlainIndexes,
        counters: Counters,
        spool_dir: Path,
        *,
        verify: indexclaim.Verify,
        trusted: Iterable[PeerId] = (),
        rate: Throttle | None = None,
    ) -> None:
        self._pool = pool
        self._peers = peers
        self._indexes = indexes
        self._counters = counters
        self._spool_dir = spool_dir
        self._rate = rate
        self._verify = verify
        self._trusted = set(trusted)
        self._parsing = trio.CapacityLimiter(INDEXES_AT_ONCE)
        self.on_signed: Callable[[], None] = lambda: None
        """a layer is lazy on a maker's word: `fetch.signed` is to check it"""

    def distrust(self, makers: Iterable[PeerId]) -> None:
        """They signed a lie: believed no more until the node starts anew."""
        self._trusted.difference_update(makers)

    async def open(self, descriptor: Descriptor, diff_id: Digest, progress: Progress) -> SharedLayer | None:
        """The layer, complete and checked, or lazy because a trusted maker has signed; None when peers cannot give it.

        Raises PoolFull and StateError only: whatever peers do wrong leaves the layer to the registry.
        """
        for candidate in await self._candidates(diff_id):
            try:
                found = await self._index(candidate, descriptor, diff_id)
                if found is None:
                    continue
                index, data = found
                signers = self._trusted.intersection(candidate.makers)
                if signers:
                    return await self._believe(candidate, descriptor, index, data, signers)
                layer = await self._check(candidate, descriptor, index, data, progress)
            except PeersGaveUp as error:
                log.info("plain.not_from_peers", diff_id=str(diff_id), reason=error.what)
                continue
            if layer is not None:
                return layer
        return None

    async def _candidates(self, diff_id: Digest) -> list[_Candidate]:
        """What peers tell of a layer: signed by a trusted maker first, then what most tell."""
        found: dict[Digest, _Candidate] = {}
        scope = trio.CancelScope(deadline=trio.current_time() + CLAIMS_SECONDS)

        def told(peer: PeerId, data: bytes) -> None:
            try:
                claim = indexclaim.from_bytes(data, diff_id, self._verify)
            except PeerFault as error:
                self._peers.blame(peer, error)
                return
            if claim is not None:
                _add(found, peer, claim, self._trusted)
                scope.deadline = min(scope.deadline, trio.current_time() + MORE_CLAIMS_SECONDS)

        with scope:
            await self._peers.index_claims(diff_id.raw, told)
        order = sorted(
            found.values(), key=lambda c: (self._trusted.isdisjoint(c.makers), -len(c.peers), c.document.raw)
        )
        return order[:CANDIDATES_MAX]

    async def _index(
        self, candidate: _Candidate, descriptor: Descriptor, diff_id: Digest
    ) -> tuple[PlainIndex, bytes] | None:
        """The index of a candidate, if it is one of this layer and of a size that the layer can have."""
        if candidate.document_bytes > INDEX_BASE_BYTES + INDEX_BYTES_PER_LAYER_BYTE * descriptor.size:
            _unlikely(diff_id, f"an index of {candidate.document_bytes} bytes")
            return None
        async with self._parsing:
            data = await self._document(candidate)
            if data is None:
                return None
            try:
                index = await trio.to_thread.run_sync(
                    partial(indexdoc.from_bytes, data, chunks_max=CHUNKS_MAX)
                )
                if index.toc.digest != diff_id:
                    raise ImageInvalid(f"index of a plain layer: it is one of {index.toc.digest}")
            except ImageInvalid as error:
                self._blame(candidate, error)
                return None
        if index.stream_bytes > STREAM_BASE_BYTES + STREAM_BYTES_PER_LAYER_BYTE * descriptor.size:
            _unlikely(diff_id, f"a stream of {index.stream_bytes} bytes")
            return None
        if index.chunk_bytes != PLAIN_CHUNK_BYTES:
            _unlikely(diff_id, f"chunks of {index.chunk_bytes} bytes")
            return None
        return index, data

    async def _document(self, candidate: _Candidate) -> bytes | None:
        kept = await self._pool.get_object(candidate.document)
        if kept is not None:
            return kept
        with trio.move_on_after(INDEX_SECONDS):
            for _ in range(INDEX_ATTEMPTS):
                data = await self._peers.document(
                    candidate.document.raw, limit_bytes=candidate.document_bytes
                )
                if data is not None:
                    return data
                await trio.sleep(INDEX_RETRY_SECONDS)  # who is busy with documents says that it has none
        return None

    async def _believe(
        self,
        candidate: _Candidate,
        descriptor: Descriptor,
        index: PlainIndex,
        data: bytes,
        signers: set[PeerId],
    ) -> SharedLayer | None:
        """Take a trusted maker's word: nothing is read now."""
        layer = await _laid_out(index, candidate.document, data)
        if self._indexes.is_lie(layer.toc.digest):
            return None
        gathering = self._gathering(layer)
        segment = await self._pool.open_segment(layer.layout, _meta(descriptor))
        await self._indexes.keep(index, segment.id, data, makers=candidate.makers, checked=False)
        async with gathering.following():
            await gathering.wait_for_holders()
        log.info(
            "plain.signed", blob=str(descriptor.digest), makers=[str(peer) for peer in sorted(signers)],
            effect="the layer is lazy; its diff id is checked when all of it is here",
        )  # fmt: skip
        self.on_signed()
        return layer

    async def _check(
        self,
        candidate: _Candidate,
        descriptor: Descriptor,
        index: PlainIndex,
        data: bytes,
        progress: Progress,
    ) -> SharedLayer | None:
        """Gather all chunks, and make a segment of them if they are the layer."""
        layer = await _laid_out(index, candidate.document, data)
        gathering = self._gathering(layer)
        free_bytes = await trio.to_thread.run_sync(_free_bytes, self._spool_dir)
        if gathering.total_bytes * DISK_COPIES > free_bytes:
            raise PeersGaveUp(f"no room to put {gathering.total_bytes} bytes together")
        with open_spool(self._spool_dir) as spool:
            try:
                async with gathering.following():
                    made = await gathering.run(index, spool, progress, descriptor)
            except ImageInvalid as error:
                self._blame(candidate, error)
                return None
            document, makers = candidate.document, candidate.makers
            if made.toc.warnings != index.toc.warnings:
                # nothing covers these words: ours are shown, and ours is the index from here on
                data = await trio.to_thread.run_sync(indexdoc.to_bytes, made)
                makers = {}
            segment = await self._pool.open_segment(layer.layout, _meta(descriptor))
            await move_into_pool(self._pool, segment, index, spool)
        document = await self._indexes.keep(made, segment.id, data, makers=makers, checked=True)
        log.info("plain.from_peers", blob=str(descriptor.digest), bytes=gathering.total_bytes)
        return SharedLayer(
            toc=await trio.to_thread.run_sync(segment_toc, made.toc),
            layout=layer.layout,
            document=document,
            data=data,
        )

    def _gathering(self, layer: SharedLayer) -> Gathering:
        return Gathering(self._pool, self._peers, self._counters, layer.toc, layer.layout, self._rate)

    def _blame(self, candidate: _Candidate, error: ImageInvalid) -> None:
        """All who told of it: an honest node tells only what it has checked against the whole stream."""
        log.warning("plain.index_lies", peers=[str(peer) for peer in candidate.peers], reason=error.what)
        for peer in candidate.peers:
            self._peers.blame(peer, ChunkCorrupt(f"peer {peer}: {error.what}"))


def _add(found: dict[Digest, _Candidate], peer: PeerId, claim: IndexClaim, trusted: Iterable[PeerId]) -> None:
    candidate = found.setdefault(claim.document, _Candidate(claim.document, claim.document_bytes))
    if claim.document_bytes != candidate.document_bytes:
        return  # one of the two is wrong; the document's digest will tell
    candidate.peers.append(peer)
    candidate.makers = indexclaim.merged([candidate.makers, claim.makers], trusted)


def _unlikely(diff_id: Digest, what: str) -> None:
    log.info(
        "plain.index_refused",
        diff_id=str(diff_id),
        reason=f"peers tell of {what}",
        effect="the registry is asked",
    )


def _meta(descriptor: Descriptor) -> SegmentMeta:
    return SegmentMeta(blob_digest=descriptor.digest, blob_bytes=descriptor.size, source="plain")


def _free_bytes(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


async def _laid_out(index: PlainIndex, document: Digest, data: bytes) -> SharedLayer:
    def lay_out() -> SharedLayer:
        toc = segment_toc(index.toc)
        layout = SegmentLayout.build(toc, compression="none")
        return SharedLayer(toc=toc, layout=layout, document=document, data=data)

    return await trio.to_thread.run_sync(lay_out)
