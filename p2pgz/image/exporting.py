"""Writes an image into a file (`core.exportfile`), but for the chunks that the other side has.

Called by the node for `p2pgz export`. What is missing here is fetched first, from wherever it comes; what is read from the
disk is hashed again, since a file that turns out damaged where it is needed cannot be asked for again. Must never write
what nothing vouches for: layers whose TOC is only the registry's word are refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.exportfile import ExportWriter, Head
from p2pgz.core.media import Manifest, parse_manifest_or_index
from p2pgz.core.model import ChunkKind
from p2pgz.core.platform import Platform
from p2pgz.core.reference import Reference
from p2pgz.core.schedule import Priority
from p2pgz.core.tail import shared_document
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ChunkMissing, ImageInvalid, StateError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Shares
from p2pgz.image.layers import LayerOpener
from p2pgz.image.opened import OpenImage
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment

# What is fetched, read, hashed and packed at a time
BATCH_BYTES: Final = 8 << 20
# A chunk that is evicted between fetching and reading is fetched again
ATTEMPTS: Final = 5

LeaveOut = Callable[[Segment, int, bytes], bool]
"""whether the other side has a chunk: segment, number, digest"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be written, decided beforehand: the head's counts are promises."""

    head: Head
    documents: list[tuple[Digest, bytes]]
    segments: list[tuple[Segment, list[int]]]


async def plan_export(
    image: OpenImage,
    reference: Reference,
    name: Reference,
    platform: Platform,
    *,
    pool: Pool,
    shares: Shares,
    layers: LayerOpener,
    leave_out: LeaveOut,
) -> Export:
    """Decide what belongs in the file of an image that `reference` named here and that is to be called `name` there."""
    access = shares.index_access(reference.name)
    text = await pool.get_object(image.digest, domain=access.domain)
    if text is None:
        raise StateError(
            f"{reference}: its manifest is not kept here", hint="free some space, then try again"
        )
    manifest = parse_manifest_or_index(text, "", where=str(reference))
    assert isinstance(manifest, Manifest)
    place = shares.place(reference.name, image.digest, text)
    documents: dict[Digest, bytes] = {image.digest: text}
    indexes = shares.indexes(place)
    for digest, domain in [(manifest.config.digest, place.domain), *((d, access.domain) for d in indexes)]:
        found = await pool.get_object(digest, domain=domain)
        if found is None and digest == manifest.config.digest:
            raise StateError(
                f"{reference}: its config is not kept here", hint="free some space, then try again"
            )
        if found is not None:
            documents[digest] = found
    plain: dict[str, str] = {}
    for layer in manifest.layers:
        described = await layers.described(layer, place.access)
        if described is None:
            raise ImageInvalid(
                f"layer {layer.digest} of {reference}: nothing vouches for its TOC, so nobody could check it",
                hint="convert the image, and export the result",
            )
        documents[described[0]] = described[1]
        if shared_document(layer.annotations) is None:
            plain[str(layer.digest)] = str(described[0])
    own = list(dict.fromkeys(image.layers))
    chosen = await trio.to_thread.run_sync(lambda: _choose(own, leave_out))
    head = Head(
        reference=str(name),
        platform=str(platform),
        manifest=str(image.digest),
        indexes=[str(digest) for digest in indexes if digest in documents],
        plain=plain,
        documents=len(documents),
        chunks=sum(len(wanted) for _, wanted in chosen.segments),
        chunk_bytes=sum(segment.bytes_of(wanted) for segment, wanted in chosen.segments),
        left_out_chunks=chosen.left_out,
    )
    return Export(head=head, documents=list(documents.items()), segments=chosen.segments)


@dataclass(slots=True)
class _Choice:
    segments: list[tuple[Segment, list[int]]]
    left_out: int = 0


def _choose(segments: list[Segment], leave_out: LeaveOut) -> _Choice:
    """Each chunk once, in the order of the blobs. Zeros need no bytes."""
    seen: set[bytes] = set()
    choice = _Choice([])
    for segment in segments:
        table = segment.table
        wanted = []
        for n in sorted(range(table.chunk_count), key=lambda n: (table.blob_offset[n], table.inner[n])):
            digest = table.digest(n)
            if table.kind[n] == ChunkKind.ZEROS or digest in seen:
                continue
            seen.add(digest)
            if leave_out(segment, n, digest):
                choice.left_out += 1
            else:
                wanted.append(n)
        choice.segments.append((segment, wanted))
    return choice


async def write_export(export: Export, pool: Pool, fetcher: ChunkFetcher) -> AsyncIterator[bytes]:
    """The file's bytes; raises what fetching raises."""
    writer = ExportWriter()
    yield writer.head(export.head)
    for digest, data in export.documents:
        yield await trio.to_thread.run_sync(writer.document, digest, data)
    for segment, wanted in export.segments:
        for batch in _batches(segment, wanted):
            chunks = await _verified(segment, batch, pool, fetcher)
            yield await trio.to_thread.run_sync(lambda some: b"".join(map(writer.chunk, some)), chunks)
    yield writer.end()


def _batches(segment: Segment, wanted: list[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    gathered = 0
    for n in wanted:
        batch.append(n)
        gathered += segment.table.size[n]
        if gathered >= BATCH_BYTES:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


async def _verified(
    segment: Segment, batch: list[int], pool: Pool, fetcher: ChunkFetcher
) -> list[VerifiedChunk]:
    """These chunks, fetched if need be, hashed again; one that the disk has spoilt is fetched anew."""
    found: dict[int, VerifiedChunk] = {}
    for _ in range(ATTEMPTS):
        left = [n for n in batch if n not in found]
        if not left:
            break
        await fetcher.ensure_chunks(
            segment, [n for n in left if not segment.presence.has(n)], Priority.READ_AHEAD
        )
        found |= {n: chunk for n in left if (chunk := pool.unkept(segment, n)) is not None}
        await segment.claim(left)
        try:
            here = [n for n in left if segment.presence.has(n)]
            read, bad = await trio.to_thread.run_sync(_read, segment, here)
        finally:
            segment.release(left)
        found |= read
        for n in bad:  # see image.verify: never removed under a reader
            segment.presence.clear(n)
        if bad:
            await pool.revive(segment, bad)
    if len(found) < len(batch):
        raise ChunkMissing(
            f"segment {segment.id}: its chunks are pushed out before they are written",
            hint="free some space, or raise pool.quota_bytes",
        )
    return [found[n] for n in batch]


def _read(segment: Segment, chunks: list[int]) -> tuple[dict[int, VerifiedChunk], list[int]]:
    good: dict[int, VerifiedChunk] = {}
    bad: list[int] = []
    for n in chunks:
        try:
            good[n] = verify(segment.table.digest(n), bytes(segment.view(n)), source="pool")
        except ChunkCorrupt:
            bad.append(n)
    return good, bad


def inventory(pool: Pool, domain: str, segments: list[Segment]) -> Iterator[bytes]:
    """The digests of all chunks that a domain of the pool has. Runs in a thread."""
    for segment in segments:
        if segment.domain == domain:
            for n in range(segment.table.chunk_count):
                if segment.presence.has(n) or segment.recorded(n):
                    yield segment.table.digest(n)
