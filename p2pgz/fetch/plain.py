"""Layers that nobody converted: one pass over the whole blob, verified as a whole before anything of it is shown.

Two uses. `stream_layer` reads a layer for the first time: payloads go to a spool file (`fetch.spool`), and become a segment
only when the blob digest and the diff id of the stream are right. `restream` reads it again for chunks that were lost:
there each chunk is checked against the known table and kept at once. Design, section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pgz.core.decompress import Decompressor
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.ownindex import PlainIndex, PlainIndexer, segment_toc
from p2pgz.core.ports import ImageSource
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkCorrupt, ImageInvalid
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.spool import append, move_into_pool, open_spool
from p2pgz.fetch.stall import watched
from p2pgz.fetch.trace import Kind, Source, Trace
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN, Segment, SegmentMeta

Progress = Callable[[dict[str, Any]], Awaitable[None]]
Payloads = list[tuple[bytes, bytes]]

# One thread hop for this much compressed data: 60 us against some milliseconds of inflating and hashing
STEP_BYTES = 256 << 10


class _LayerStream:
    """Hashes, inflates and indexes a blob; `feed` and `finish` run in a worker thread and return payloads."""

    def __init__(self, descriptor: Descriptor, diff_id: Digest | None, name: str) -> None:
        self._descriptor = descriptor
        self._diff_id = diff_id
        self._name = name
        self._blob_hash = hashlib.sha256()
        self._decompressor = Decompressor()
        self._indexer = PlainIndexer()

    def feed(self, data: bytes) -> Payloads:
        self._blob_hash.update(data)
        found: Payloads = []
        for piece in self._decompressor.feed(data):
            found += self._indexer.feed(piece)
        return found

    def finish(self) -> tuple[Payloads, PlainIndex]:
        """The last payloads and the index; raises ImageInvalid when the blob is not what its digests promise."""
        digest = Digest(self._blob_hash.digest())
        if digest != self._descriptor.digest:
            raise ChunkCorrupt(
                f"{self._name}: layer {self._descriptor.digest} has other bytes: {digest}",
                hint="the registry or a proxy on the way gave other bytes",
            )
        found: Payloads = []
        for piece in self._decompressor.finish():
            found += self._indexer.feed(piece)
        index = self._indexer.finish()
        if self._diff_id not in (None, index.toc.digest):
            raise ImageInvalid(
                f"layer {self._descriptor.digest}: its contents are {index.toc.digest}, "
                f"the image's config says {self._diff_id}"
            )
        return found, index


async def _run(
    source: ImageSource,
    descriptor: Descriptor,
    diff_id: Digest | None,
    take: Callable[[Payloads], Awaitable[None]],
    progress: Progress | None,
) -> PlainIndex:
    stream = _LayerStream(descriptor, diff_id, source.name)
    received = 0
    async with watched(source.blob(descriptor, 0, descriptor.size), source.name) as pieces:
        gathered: list[bytes] = []
        gathered_bytes = 0
        async for piece in pieces:
            gathered.append(piece)
            gathered_bytes += len(piece)
            if gathered_bytes < STEP_BYTES:
                continue
            received += gathered_bytes
            await take(await trio.to_thread.run_sync(stream.feed, b"".join(gathered)))
            gathered, gathered_bytes = [], 0
            if progress is not None:
                await progress(_progress_event(descriptor, received))
        await take(await trio.to_thread.run_sync(stream.feed, b"".join(gathered)))
    payloads, index = await trio.to_thread.run_sync(stream.finish)
    await take(payloads)
    return index


def _progress_event(descriptor: Descriptor, received: int) -> dict[str, Any]:
    percent = 100 * received // descriptor.size if descriptor.size else 100
    return {
        "event": "progress",
        "text": f"layer {descriptor.digest.hex[:12]} is not lazy: reading all of it, {percent} %",
        "done": received,
        "total": descriptor.size,
    }


async def stream_layer(
    pool: Pool,
    source: ImageSource,
    descriptor: Descriptor,
    diff_id: Digest,
    spool_dir: Path,
    progress: Progress,
    *,
    domain: str = SHARED_DOMAIN,
) -> tuple[PlainIndex, SegmentLayout, Segment]:
    """Read a plain layer whole and make a complete segment of it.

    Raises ChunkCorrupt or ImageInvalid when a digest is wrong: nothing of the layer is kept then. Memory is bounded, the
    spool is as large as the layer's file contents and gone with the call, whatever happens.
    """
    with open_spool(spool_dir) as spool:

        async def take(payloads: Payloads) -> None:
            if payloads:
                await trio.to_thread.run_sync(append, spool, [payload for _, payload in payloads])

        index = await _run(source, descriptor, diff_id, take, progress)
        layout = await trio.to_thread.run_sync(
            lambda: SegmentLayout.build(segment_toc(index.toc), compression="none")
        )
        meta = SegmentMeta(
            domain=domain, blob_digest=descriptor.digest, blob_bytes=descriptor.size, source="plain"
        )
        segment = await pool.open_segment(layout, meta)
        await move_into_pool(pool, segment, index, spool)
    return index, layout, segment


async def restream(pool: Pool, origin: Origin, trace: Trace) -> None:
    """Read a plain layer's blob once more and keep each missing chunk as it comes; raises what the source raises."""
    segment = origin.segment
    table = segment.table
    source = Source(Kind.REGISTRY, origin.source.name)
    began = trio.current_time()
    numbers: dict[bytes, list[int]] = {}
    for n in segment.presence.missing(0, table.chunk_count):
        numbers.setdefault(table.digest(n), []).append(n)

    async def take(payloads: Payloads) -> None:
        for digest, payload in payloads:
            for n in numbers.pop(digest, ()):
                check = partial(verify, digest, payload, source=origin.source.name)
                chunk = await trio.to_thread.run_sync(check)
                await pool.add(segment, n, chunk)
                if (flight := origin.flights.pop(n, None)) is not None:
                    trace.landed(segment, flight, source)
                    flight.land()
                else:
                    trace.note(segment.domain, table, [n], source, trio.current_time() - began)

    origin.requested += 1
    # no diff id: that of the blob's digest is right
    await _run(origin.source, origin.descriptor, None, take, None)
