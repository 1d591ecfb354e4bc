"""Layers that nobody converted: one pass over the whole blob, verified as a whole before anything of it is shown.

Two uses. `stream_layer` reads a layer for the first time: payloads go to a nameless spool file, and become a segment only
when the blob digest and the diff id of the stream are right. `restream` reads it again for chunks that were lost: there
each chunk is checked against the known table and kept at once. Design, section 4.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pgz.core.decompress import Decompressor
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.ownindex import PlainIndex, PlainIndexer, stored_chunks
from p2pgz.core.ports import ImageSource
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ImageInvalid, PoolFull
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.stall import watched
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment, SegmentMeta

Progress = Callable[[dict[str, Any]], Awaitable[None]]
Payloads = list[tuple[bytes, bytes]]

# One thread hop for this much compressed data: 60 us against some milliseconds of inflating and hashing
STEP_BYTES = 256 << 10
# What is put into the pool in one go, when a spool becomes a segment
ADD_BYTES = 4 << 20


class _LayerStream:
    """Hashes, inflates and indexes a blob; `feed` and `finish` run in a worker thread and return payloads."""

    def __init__(self, descriptor: Descriptor, diff_id: Digest, name: str) -> None:
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
        if index.toc.digest != self._diff_id:
            raise ImageInvalid(
                f"layer {self._descriptor.digest}: its contents are {index.toc.digest}, "
                f"the image's config says {self._diff_id}"
            )
        return found, index


async def _run(
    source: ImageSource,
    descriptor: Descriptor,
    diff_id: Digest,
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
) -> tuple[PlainIndex, SegmentLayout, Segment]:
    """Read a plain layer whole and make a complete segment of it, named by its diff id.

    Raises ChunkCorrupt or ImageInvalid when a digest is wrong: nothing of the layer is kept then. Memory is bounded, the
    spool is as large as the layer's file contents and gone with the call, whatever happens.
    """
    with _spool(spool_dir) as spool:

        async def take(payloads: Payloads) -> None:
            if payloads:
                await trio.to_thread.run_sync(_append, spool, [payload for _, payload in payloads])

        index = await _run(source, descriptor, diff_id, take, progress)
        layout = SegmentLayout.build(index.toc, compression="none")
        meta = SegmentMeta(blob_digest=descriptor.digest, blob_bytes=descriptor.size, source="plain")
        segment = await pool.open_segment(layout, meta)
        await _move_into_pool(pool, segment, index, spool)
    return index, layout, segment


@contextlib.contextmanager
def _spool(directory: Path) -> Iterator[int]:
    try:
        spool = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PoolFull(f"{directory}: no temporary file can be made: {error.strerror}") from error
    try:
        yield spool
    finally:
        os.close(spool)


def _append(spool: int, payloads: list[bytes]) -> None:
    for payload in payloads:
        view = memoryview(payload)
        try:
            while view:
                view = view[os.write(spool, view) :]
        except OSError as error:
            raise PoolFull(
                f"no room for a layer that has to be read whole: {error.strerror}",
                hint="free some space in the state directory, or convert the image",
            ) from error


async def _move_into_pool(pool: Pool, segment: Segment, index: PlainIndex, spool: int) -> None:
    """Read the payloads back in stream order and add them; each is verified, since the spool is only a file."""
    number_of = {}
    n = 0
    for entry in index.toc.entries:
        for chunk in entry.chunks:
            number_of[chunk.offset, chunk.end] = n
            n += 1
    batch: list[tuple[int, int, int]] = []
    at = start = 0

    async def add() -> None:
        await pool.add_many(segment, await trio.to_thread.run_sync(_read_back, spool, segment, batch))

    for chunk in stored_chunks(index.toc):
        batch.append((number_of[chunk.offset, chunk.end], at, chunk.size))
        at += chunk.size
        if at - start >= ADD_BYTES:
            await add()
            batch, start = [], at
    await add()


def _read_back(
    spool: int, segment: Segment, batch: list[tuple[int, int, int]]
) -> list[tuple[int, VerifiedChunk]]:
    return [
        (n, verify(segment.table.digest(n), os.pread(spool, size, at), source="spool file"))
        for n, at, size in batch
    ]


async def restream(pool: Pool, origin: Origin) -> None:
    """Read a plain layer's blob once more and keep each missing chunk as it comes; raises what the source raises."""
    segment = origin.segment
    table = segment.table
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
                    flight.land()

    origin.requested += 1
    await _run(origin.source, origin.descriptor, segment.id, take, None)
