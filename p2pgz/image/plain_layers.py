"""Layers that nobody converted, opened: from peers by chunk, or from the registry as one stream.

Called by `image.layers`. What comes out is the same in both cases: a TOC, the index document to remember, and a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from p2pgz.core import indexdoc
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.model import ChunkKind, Toc
from p2pgz.core.ownindex import PlainIndex, segment_toc
from p2pgz.core.ports import ImageSource
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.indexes import INDEXES, PlainIndexes
from p2pgz.fetch.plain import Progress, stream_layer
from p2pgz.fetch.plainshare import PlainShare
from p2pgz.fetch.shares import Access
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN, Segment

log = structlog.get_logger(component="image")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLayer:
    """A plain layer by its index; `toc` is named as its segment is."""

    toc: Toc
    layout: SegmentLayout
    document: Digest
    data: bytes


class PlainLayers:
    """Opens plain layers. `share` is None on a node without peers."""

    def __init__(
        self,
        pool: Pool,
        counters: Counters,
        state_path: Path,
        indexes: PlainIndexes | None = None,
        share: PlainShare | None = None,
    ) -> None:
        self._pool = pool
        self._counters = counters
        self._state_path = state_path
        self._indexes = indexes or PlainIndexes(pool, state_path / INDEXES)
        self._share = share

    def is_lie(self, segment: Digest) -> bool:
        """Whether the index that names this segment turned out to be none of its layer."""
        return self._indexes.is_lie(segment)

    async def known(self, document: Digest, data: bytes, diff_id: Digest) -> PlainLayer | None:
        """A layer by the index that was kept; None when it is another layer's, or a lie."""
        layer = await _parsed(document, data)
        # of another diff id: another image's config lies about this blob, or ours does. Read it and say so
        if layer[0] != diff_id or self.is_lie(layer[1].toc.digest):
            return None
        return layer[1]

    async def from_peers(
        self, descriptor: Descriptor, diff_id: Digest, access: Access, progress: Progress
    ) -> PlainLayer | None:
        """A layer that is in the pool under another blob's name, or that peers have; None when it is neither.

        Not for images that are not for everyone: asking for an index names a digest, and so does giving one.
        """
        if access.domain != SHARED_DOMAIN:
            return None
        record = self._indexes.record(diff_id)
        if record is not None and record.checked and self._is_here(record.segment):
            data = await self._pool.get_object(record.document)
            if data is not None:
                return await self.known(record.document, data, diff_id)
        if self._share is None:
            return None
        shared = await self._share.open(descriptor, diff_id, progress)
        if shared is None:
            return None
        return PlainLayer(toc=shared.toc, layout=shared.layout, document=shared.document, data=shared.data)

    def _is_here(self, segment_id: Digest) -> bool:
        segment = self._pool.segment(segment_id)
        if segment is None:
            return False
        kind = segment.table.kind
        absent = segment.presence.missing(0, segment.table.chunk_count)
        return all(kind[n] == ChunkKind.ZEROS or segment.recorded(n) for n in absent)

    async def keep_checked(self, index: PlainIndex, segment: Segment, data: bytes) -> None:
        """An index that has been checked against its whole stream: peers may have it, if the layer is for everyone."""
        if segment.domain == SHARED_DOMAIN:
            await self._indexes.keep(index, segment.id, data, makers={}, checked=True)

    async def from_source(
        self,
        source: ImageSource,
        descriptor: Descriptor,
        diff_id: Digest,
        access: Access,
        progress: Progress,
    ) -> PlainLayer:
        """Read the whole blob; raises ImageInvalid, ChunkCorrupt, or what the source raises."""
        log.info("layer.plain", blob=str(descriptor.digest), bytes=descriptor.size, effect="it is read whole")
        began = trio.current_time()
        index, layout, segment = await stream_layer(
            self._pool, source, descriptor, diff_id, self._state_path, progress, domain=access.domain
        )
        self._counters.whole_layer(segment, source.name, trio.current_time() - began)
        data = await trio.to_thread.run_sync(indexdoc.to_bytes, index)
        if access.domain == SHARED_DOMAIN:
            document = await self._indexes.keep(index, segment.id, data, makers={}, checked=True)
        else:
            document = await trio.to_thread.run_sync(Digest.of, data)
        toc = await trio.to_thread.run_sync(segment_toc, index.toc)
        return PlainLayer(toc=toc, layout=layout, document=document, data=data)


async def _parsed(document: Digest, data: bytes) -> tuple[Digest, PlainLayer]:
    def parse() -> tuple[Digest, PlainLayer]:
        index = indexdoc.from_bytes(data)
        toc = segment_toc(index.toc)
        layout = SegmentLayout.build(toc, compression="none")
        return index.toc.digest, PlainLayer(toc=toc, layout=layout, document=document, data=data)

    return await trio.to_thread.run_sync(parse)
