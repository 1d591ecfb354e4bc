"""Takes an image out of a file (`core.exportfile`) into the pool, whole or not at all.

Called by the node for `p2pgz import`. Each chunk is verified and must belong to the image; documents, layers and chunks come
in first, and only when all of the image is here and its tree can be built does it get its manifest and its tag. So whatever
goes wrong on the way (a damaged file, no room, a client that goes away) leaves verified chunks behind that the pool may
evict, and no image. Must never ask a registry: that there is none is the point.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from p2pgz.core import indexdoc
from p2pgz.core.digest import Digest
from p2pgz.core.exportfile import Document, ExportReader, Head, Part
from p2pgz.core.indexcheck import IndexCheck
from p2pgz.core.media import Descriptor, Manifest, parse_config, parse_manifest_or_index
from p2pgz.core.model import ChunkKind
from p2pgz.core.ownindex import PlainIndex
from p2pgz.core.platform import Platform
from p2pgz.core.reference import Reference, parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.core.tail import shared_document
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import ChunkMissing, ExportInvalid, ImageInvalid, PoolFull, UsageError
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Place, Shares
from p2pgz.fetch.spool import numbered_chunks
from p2pgz.image.layers import PLAIN
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import OpenImage
from p2pgz.image.opening import Away, documents_of, naming
from p2pgz.image.plain_layers import PlainLayer
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment, SegmentMeta

# Chunks are written together: a thread hop for each would cost more than the small ones themselves
BATCH_BYTES: Final = 4 << 20
# Copied from elsewhere in the pool at a time
STEP_CHUNKS: Final = 256

Keep = Callable[[Digest, list[Segment]], Awaitable[None]]
"""keeps an image's segments from eviction while they come"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer whose segment takes chunks. `plain`: not to be remembered before its stream has been checked."""

    descriptor: Descriptor
    segment: Segment
    plain: PlainLayer | None = None


@dataclass(slots=True, kw_only=True)
class _Opened:
    """The image, once its documents are here."""

    reference: Reference
    platform: Platform
    manifest: Manifest
    place: Place
    layers: list[_Layer]
    places: dict[bytes, list[tuple[Segment, int]]] = field(default_factory=dict)
    """chunk → where it belongs"""

    @property
    def segments(self) -> list[Segment]:
        return list(dict.fromkeys(layer.segment for layer in self.layers))


class ImageImport:
    """One file on its way in: `feed` its bytes, then `finish`. `expected`: the only manifest that is taken."""

    def __init__(
        self,
        name: str,
        *,
        pool: Pool,
        fetcher: ChunkFetcher,
        opener: ImageOpener,
        shares: Shares,
        keep: Keep,
        expected: Digest | None = None,
    ) -> None:
        self._name = name
        self._pool = pool
        self._fetcher = fetcher
        self._opener = opener
        self._shares = shares
        self._keep = keep
        self._expected = expected
        self._reader = ExportReader(name)
        self._documents: dict[Digest, bytes] = {}
        self._opened: _Opened | None = None
        self._batch: dict[Segment, list[tuple[int, VerifiedChunk]]] = {}
        self._batch_bytes = 0

    async def feed(self, data: bytes) -> None:
        """The next bytes; raises ExportInvalid, ImageInvalid, PoolFull."""
        parts = self._reader.feed(data)
        while some := await trio.to_thread.run_sync(_next_parts, parts):
            for part in some:
                await self._take(part)

    async def _take(self, part: Part) -> None:
        if isinstance(part, Head):
            if self._expected is not None and part.manifest != str(self._expected):
                raise ExportInvalid(
                    f"{self._name}: it is {part.manifest}, not {self._expected}",
                    hint="this is another file than the one that you mean, or somebody has changed it",
                )
            return
        if isinstance(part, Document):
            self._documents[part.digest] = part.data
            return
        if self._opened is None:
            self._opened = await self._open()
        places = self._opened.places.get(part.digest)
        if places is None:
            raise ExportInvalid(f"{self._name}: chunk {Digest(part.digest)} does not belong to its image")
        for segment, n in places:
            if segment.table.size[n] != len(part):
                raise ExportInvalid(f"{self._name}: a TOC gives chunk {Digest(part.digest)} another size")
            self._batch.setdefault(segment, []).append((n, part))
        self._batch_bytes += len(part)
        if self._batch_bytes >= BATCH_BYTES:
            await self._write()

    async def _open(self) -> _Opened:
        """All documents are here: open the layers by them."""
        head = self._reader.head
        assert head is not None
        try:
            reference = parse_reference(head.reference)
            platform = Platform.parse(head.platform)
        except UsageError as error:
            raise ExportInvalid(f"{self._name}: {error.what}") from error
        if reference.transport != "registry":
            raise ExportInvalid(f"{self._name}: {reference} is no name in a registry")
        with naming(reference):
            text = self._document(Digest.parse(head.manifest), "manifest")
            manifest = parse_manifest_or_index(text, "", where=str(reference))
            if not isinstance(manifest, Manifest):
                raise ImageInvalid(f"{head.manifest} is not an image")
            document = self._document(manifest.config.digest, "config")
            config = parse_config(document, len(manifest.layers), os="", where="config")
            place = self._shares.place(reference.name, manifest.digest, text)
            layers: dict[Digest, _Layer] = {}
            for number, layer in enumerate(manifest.layers):
                if layer.digest not in layers:
                    layers[layer.digest] = await self._layer(head, layer, config.diff_ids[number], place)
        opened = _Opened(
            reference=reference,
            platform=platform,
            manifest=manifest,
            place=place,
            layers=list(layers.values()),
        )
        await trio.to_thread.run_sync(_find_places, opened)
        await self._keep(manifest.digest, opened.segments)
        return opened

    def _document(self, digest: Digest, what: str) -> bytes:
        document = self._documents.get(digest)
        if document is None:
            raise ExportInvalid(f"{self._name}: its {what} {digest} is not in it")
        return document

    async def _layer(self, head: Head, layer: Descriptor, diff_id: Digest, place: Place) -> _Layer:
        digest = shared_document(layer.annotations)
        if digest is not None:
            opened = await self._opener.layers.adopt(layer, self._document(digest, "TOC"), place.access)
            return _Layer(descriptor=layer, segment=opened.segment)
        if str(layer.digest) not in head.plain:
            raise ExportInvalid(f"{self._name}: nothing in it says what is in layer {layer.digest}")
        digest = Digest.parse(head.plain[str(layer.digest)])
        document = self._document(digest, "index")
        plain = await self._opener.layers.plain.known(digest, document, diff_id)
        if plain is None:
            raise ExportInvalid(f"{self._name}: index {digest} is not one of layer {layer.digest}")
        meta = SegmentMeta(domain=place.domain, blob_digest=layer.digest, blob_bytes=layer.size, source=PLAIN)
        segment = await self._pool.open_segment(plain.layout, meta)
        return _Layer(descriptor=layer, segment=segment, plain=plain)

    async def _write(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, {}, 0
        for segment, chunks in batch.items():
            try:
                await self._pool.add_many(segment, chunks)
            except PoolFull as error:
                raise self._no_room() from error
            if any(not segment.presence.has(n) for n, _ in chunks):
                raise self._no_room()

    def _no_room(self) -> PoolFull:
        return PoolFull(
            f"{self._name}: its image does not fit into the pool",
            hint="free some space, raise pool.quota_bytes, or unpin images; then import again",
        )

    async def finish(self) -> OpenImage:
        """The file has ended: make its image known, if all of it is here."""
        self._reader.finish()
        opened = self._opened or await self._open()
        await self._write()
        await self._complete(opened)
        for layer in opened.layers:
            if layer.plain is not None:
                await self._check_plain(layer, layer.plain, opened.place)
            if layer.segment.presence.present_count() < layer.segment.table.chunk_count:
                raise self._no_room()
        await self._pool.flush()
        return await self._publish(opened)

    async def _complete(self, opened: _Opened) -> None:
        """What was left out of the file is elsewhere in the pool, or else the image is not whole."""
        lacking = 0
        for layer in opened.layers:
            segment = layer.segment
            if self._fetcher.origin(segment) is None:
                self._fetcher.add_origin(
                    Origin(
                        segment=segment,
                        source=Away(self._name),
                        descriptor=layer.descriptor,
                        streamed=layer.plain is not None,
                        peers=False,
                        secret=opened.place.secret,
                    )
                )
            origin = self._fetcher.origin(segment)
            assert origin is not None
            absent = segment.presence.missing(0, segment.table.chunk_count)
            here = [n for n in absent if self._fetcher.is_local(origin, n)]
            lacking += len(absent) - len(here)
            for start in range(0, len(here), STEP_CHUNKS):
                await self._fetcher.ensure_chunks(
                    segment, here[start : start + STEP_CHUNKS], Priority.READ_AHEAD
                )
        if lacking:
            raise ChunkMissing(
                f"{self._name}: {lacking} chunks of its image are neither in it nor in this pool",
                hint="export again, with a new inventory of this side or without one",
            )

    async def _check_plain(self, layer: _Layer, plain: PlainLayer, place: Place) -> None:
        """An index is somebody's word until the stream that it makes is the layer's; see `core.indexcheck`."""
        segment, blob = layer.segment, layer.descriptor.digest
        every = range(segment.table.chunk_count)
        await segment.claim(every)
        try:
            index = await trio.to_thread.run_sync(_rebuilt, segment, plain.data)
        except ImageInvalid as error:
            raise ExportInvalid(f"{self._name}: layer {blob}: {error.what}") from error
        finally:
            segment.release(every)
        # whatever the file's index says beside what is in the stream (warnings) nothing covers: ours is kept
        data = await trio.to_thread.run_sync(indexdoc.to_bytes, index)
        digest = await trio.to_thread.run_sync(Digest.of, data)
        layers = self._opener.layers
        await layers.plain.keep_checked(index, segment, data)
        await layers.keep_plain(
            layer.descriptor,
            PlainLayer(toc=plain.toc, layout=plain.layout, document=digest, data=data),
            place.access,
        )

    async def _publish(self, opened: _Opened) -> OpenImage:
        """The manifest comes last: from then on a mount by digest finds the image."""
        head, place = self._reader.head, opened.place
        assert head is not None
        config = opened.manifest.config.digest
        indexes = [Digest.parse(text) for text in head.indexes]
        await self._pool.put_object(config, self._document(config, "config"), domain=place.domain)
        for digest in [*indexes, opened.manifest.digest]:
            document = self._document(digest, "index")
            await self._pool.put_object(digest, document, domain=place.manifest_domain)
        image = await self._opener.open_known(
            opened.manifest.digest, opened.reference, Away(self._name), allow_unverified_toc=False
        )
        await self._shares.add(
            place, segments=image.layers, documents=documents_of(opened.manifest), indexes=indexes
        )
        await self._opener.tags.note(opened.reference, opened.platform, opened.manifest.digest)
        return image

    def summary(self, image: OpenImage) -> dict[str, Any]:
        """What people are told."""
        head = self._reader.head
        assert head is not None
        return {
            "reference": image.reference,
            "digest": str(image.digest),
            "platform": head.platform,
            "bytes": image.chunk_bytes,
            "chunks": head.chunks,
            "chunk_bytes": head.chunk_bytes,
            "left_out_chunks": head.left_out_chunks,
        }


def _next_parts(parts: Iterator[Part]) -> list[Part]:
    """Some of what a piece of the file holds, since it may unpack to thousands of times as much. Runs in a thread."""
    some: list[Part] = []
    size = 0
    for part in parts:
        some.append(part)
        size += len(part) if isinstance(part, VerifiedChunk) else 0
        if size >= BATCH_BYTES:
            break
    return some


def _find_places(opened: _Opened) -> None:
    """Runs in a thread: a large layer has a hundred thousand chunks."""
    for segment in opened.segments:
        table = segment.table
        for n in range(table.chunk_count):
            if table.kind[n] != ChunkKind.ZEROS:
                opened.places.setdefault(table.digest(n), []).append((segment, n))


def _rebuilt(segment: Segment, data: bytes) -> PlainIndex:
    """Make the stream of a plain layer out of its segment, and index it anew. Runs in a thread."""
    index = indexdoc.from_bytes(data)
    check = IndexCheck(index)
    for n, _ in numbered_chunks(index.toc):
        check.take(bytes(segment.view(n)))
    return check.finish()
