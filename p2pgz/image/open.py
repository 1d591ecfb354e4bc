"""From a reference to a merged tree: manifest → layers → TOCs → tree file. All layers of an image are opened in parallel.

Called by the node for every command about an image. Documents are kept by digest in the pool and the finished tree under
the manifest's digest, so an image that is known here is opened again without parsing, and without a request but for the
tag. Nothing of an image that cannot be opened whole is left behind except verified documents and chunks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    MAX_INDEX_DEPTH,
    MAX_MANIFEST_BYTES,
    SIZE_UNKNOWN,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    parse_config,
    parse_manifest_or_index,
    select_platform,
)
from p2pgz.core.platform import Platform
from p2pgz.core.ports import ImageSource, PeerSource
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnreachable, StateError
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Access, Place, Shares
from p2pgz.image.layer_records import LayerRecord, OpenLayer, domain_of
from p2pgz.image.layers import LayerOpener
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.opened import ImageRecord, OpenImage, map_tree, write_tree
from p2pgz.image.opening import Away, LazyConfig, Wanted, documents_of, first_error, naming, silent
from p2pgz.image.plain_layers import PlainLayers
from p2pgz.image.samefiles import shared_files
from p2pgz.image.tags import LOOK_UP_SECONDS, Tags, stale_warning
from p2pgz.image.treebuild import build_tree
from p2pgz.image.treefile import TreeFile
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="image")

Progress = Callable[[dict[str, Any]], Awaitable[None]]

# Layers opened at a time: each is one request of up to some hundred KiB
LAYERS_AT_A_TIME: Final = 16
# Documents and TOCs; a registry that is silent longer than this is down for us. Plain layers have no deadline but stalls.
OPEN_SECONDS: Final = 120.0
TREES: Final = "trees"


class ImageOpener:
    """Opens images; keeps the open ones, since mounts of one image share their tree."""

    def __init__(
        self,
        pool: Pool,
        fetcher: ChunkFetcher,
        state_path: Path,
        peers: PeerSource | None = None,
        shares: Shares | None = None,
        plain: PlainLayers | None = None,
    ) -> None:
        self._pool = pool
        self._shares = shares or Shares()
        self._fetcher = fetcher
        self._trees = state_path / TREES
        self._documents = Documents(pool, peers, fetcher.leasing, shares)
        self.tags = Tags(pool.catalog)
        self.layers = LayerOpener(pool, self._documents, fetcher.counters, state_path, plain)
        self._opening: dict[tuple[str, Digest], trio.Lock] = {}

    async def open(
        self,
        reference: Reference,
        source: ImageSource,
        *,
        platform: Platform,
        allow_unverified_toc: bool,
        progress: Progress,
        insist_on_platform: bool = False,
        tag_seconds: float = LOOK_UP_SECONDS,
        lowest: int = 0,
    ) -> OpenImage:
        """Open an image by reference, or only its `lowest` layers.

        Raises ImageNotFound, ImageInvalid, AuthRefused or SourceUnavailable.

        A tag that cannot be looked up (within `tag_seconds`) means what it meant here last: `stale_since` says so.
        """
        with naming(reference):
            try:
                with trio.fail_after(OPEN_SECONDS):
                    resolved = await self.tags.resolve(reference, source, platform, seconds=tag_seconds)
                    try:
                        found = await self._manifest(reference, source, platform, resolved.descriptor)
                    except SourceUnreachable:  # just after it has answered
                        last = self.tags.last(reference, platform)
                        if last is None or resolved.stale_since is not None:
                            raise
                        resolved = last
                        found = await self._manifest(reference, source, platform, last.descriptor)
                    manifest, place, indexes = found
                    if insist_on_platform:
                        await self._check_platform(reference, source, manifest, platform, place.access)
            except trio.TooSlowError:
                raise SourceUnreachable(f"{source.name}: no answer within {OPEN_SECONDS:g} s") from None
            wanted = Wanted(
                reference=reference,
                source=source,
                manifest=manifest,
                place=place,
                allow_unverified_toc=allow_unverified_toc,
                lowest=lowest,
            )
            async with self._lock(place):
                image = await self._known(wanted)
                if image is None:
                    image = await self._unknown(wanted, progress)
            if not wanted.is_part:  # what a part has is shared as what the whole has
                await self._shares.add(
                    place, segments=image.layers, documents=documents_of(manifest), indexes=indexes
                )
        if resolved.stale_since is None:
            await self.tags.note(reference, platform, manifest.digest)
        else:
            image.stale_since = resolved.stale_since
            warning = stale_warning(reference, source.name, resolved.stale_since)
            image.warnings = [*image.warnings, warning]
        return image

    def _lock(self, place: Place) -> trio.Lock:
        """One task at a time opens an image."""
        return self._opening.setdefault((place.domain, place.manifest), trio.Lock())

    async def open_known(
        self,
        manifest_digest: Digest,
        reference: Reference,
        source: ImageSource,
        *,
        allow_unverified_toc: bool,
        lowest: int = 0,
    ) -> OpenImage:
        """An image that was opened on this host before; nothing is asked of `source` until a chunk is missing.

        Raises StateError when too little of it is left here.
        """
        domain = self._shares.index_access(reference.name).domain
        document = await self._pool.get_object(manifest_digest, domain=domain)
        if document is not None:
            place = self._shares.place(reference.name, manifest_digest, document)
        else:  # the repository's mode may be another one than when it was opened: mounts of it go on
            place = self._shares.former_place(reference.name, manifest_digest)
            document = await self._pool.get_object(manifest_digest, domain=place.manifest_domain)
        if document is None:
            raise StateError(
                f"{reference}: its manifest is not kept here", hint="mount it while its source answers"
            )
        manifest = parse_manifest_or_index(document, "", where=str(reference))
        if not isinstance(manifest, Manifest):
            raise StateError(f"{reference}: {manifest_digest} is not an image")
        wanted = Wanted(
            reference=reference,
            source=source,
            manifest=manifest,
            place=place,
            allow_unverified_toc=allow_unverified_toc,
            lowest=lowest,
        )
        async with self._lock(place):
            image = await self._known(wanted)
            if image is None:
                await self._unknown(replace(wanted, source=Away(source.name)), silent)
                image = await self._known(wanted)
        if image is None:
            raise StateError(
                f"{reference}: too little of it is kept here", hint="mount it while its source answers"
            )
        return image

    async def _manifest(
        self, reference: Reference, source: ImageSource, platform: Platform, descriptor: Descriptor
    ) -> tuple[Manifest, Place, list[Digest]]:
        """The manifest, where its image belongs, and the indexes on the way to it."""
        access = self._shares.index_access(reference.name)
        indexes: list[Digest] = []
        for _ in range(MAX_INDEX_DEPTH + 1):
            document = await self._document(source, descriptor, access)
            parsed = parse_manifest_or_index(document, descriptor.media_type, where=str(reference))
            if isinstance(parsed, Manifest):
                return parsed, self._shares.place(reference.name, parsed.digest, document), indexes
            assert isinstance(parsed, Index)
            indexes.append(descriptor.digest)
            descriptor = select_platform(parsed, platform, where=str(reference))
        raise ImageInvalid(f"{reference}: indexes inside indexes, more than {MAX_INDEX_DEPTH} deep")

    async def _check_platform(
        self,
        reference: Reference,
        source: ImageSource,
        manifest: Manifest,
        platform: Platform,
        access: Access,
    ) -> None:
        """An image without an index is for one platform: refuse it when the user has asked for another one."""
        config = await self._config(source, manifest, access)
        offered = Platform.of(config.os, config.architecture, config.variant)
        if platform.suits(offered) is None:
            raise ImageNotFound(
                f"{reference}: is an image for {offered}, not {platform}",
                hint="leave --platform out to take it as it is",
            )

    async def config(
        self, reference: Reference, source: ImageSource, image: OpenImage
    ) -> tuple[Manifest, ImageConfig]:
        """Manifest and config of an image that is open."""
        manifest, place = await self._manifest_of(reference, source, image)
        return manifest, await self._config(source, manifest, place.access)

    async def layers_of(self, reference: Reference, source: ImageSource, image: OpenImage) -> list[OpenLayer]:
        """The layers of an image that is open, with their TOCs."""
        manifest, place = await self._manifest_of(reference, source, image)
        wanted = Wanted(
            reference=reference, source=source, manifest=manifest, place=place, allow_unverified_toc=False
        )
        return await self._open_layers(wanted, silent)

    async def _manifest_of(
        self, reference: Reference, source: ImageSource, image: OpenImage
    ) -> tuple[Manifest, Place]:
        descriptor = Descriptor(media_type="", digest=image.digest, size=SIZE_UNKNOWN)
        manifest, place, _ = await self._manifest(reference, source, Platform.of("linux", ""), descriptor)
        return manifest, place

    async def _config(self, source: ImageSource, manifest: Manifest, access: Access) -> ImageConfig:
        document = await self._document(source, manifest.config, access)
        where = f"config {manifest.config.digest}"
        return parse_config(document, len(manifest.layers), os="", where=where)

    async def _document(self, source: ImageSource, descriptor: Descriptor, access: Access) -> bytes:
        """A document from the pool, from peers, or from the source."""
        known_size = descriptor.size != SIZE_UNKNOWN
        document = await self._documents.get(
            descriptor.digest,
            limit_bytes=descriptor.size if known_size else MAX_MANIFEST_BYTES,
            from_source=lambda: source.document(descriptor),
            source=source,
            access=access,
        )
        if known_size and len(document) != descriptor.size:
            raise ImageInvalid(
                f"{descriptor.digest} has {len(document)} bytes, not the {descriptor.size} that its descriptor says"
            )
        return document

    async def _known(self, wanted: Wanted) -> OpenImage | None:
        """The image as it was opened before, if all of it is still here."""
        domain = wanted.place.domain
        path = self._trees / wanted.tree_name
        try:
            tree = map_tree(path)
            record = msgspec.json.decode(tree.info, type=ImageRecord)
            if any(layer.unverified for layer in record.layers) and not wanted.allow_unverified_toc:
                return None
            segments = self._segments(tree, record, domain)
        except FileNotFoundError:
            return None
        except (StateError, OSError, msgspec.MsgspecError) as error:
            log.warning("tree.unusable", path=str(path), reason=str(error))
            return None
        blobs = {layer.digest: layer for layer in wanted.manifest.layers}
        for layer in record.layers:
            descriptor = blobs.get(Digest.parse(layer.blob))
            if descriptor is None:
                return None
            segment = self._pool.segment(Digest.parse(layer.segment), domain_of(layer, domain))
            if segment is None or (layer.streamed and self.layers.plain.is_lie(segment.id)):
                return None
            self._add_origin(wanted, segment, descriptor, layer)
        return self._finish(wanted, tree, path, segments, record)

    async def _unknown(self, wanted: Wanted, progress: Progress) -> OpenImage:
        domain = wanted.place.domain
        layers = await self._open_layers(wanted, progress)
        inputs = [LayerInput(layer.toc, layer.layout.extents, layer.segment.id) for layer in layers]
        path = self._trees / wanted.tree_name
        shared = await shared_files(self._pool, layers, domain)

        def build() -> ImageRecord:
            merged = merge_layers(inputs)
            record = ImageRecord([layer.record for layer in layers], merged.warnings)
            find = lambda keys: {key: shared[key] for key in keys if key in shared}  # noqa: E731
            write_tree(path, build_tree(merged, shared_files=find, info=msgspec.json.encode(record)))
            return record

        record = await trio.to_thread.run_sync(build)
        for text in record.warnings:
            log.warning("image.warning", reference=str(wanted.reference), text=text)
        tree = map_tree(path)
        for layer, descriptor in zip(layers, wanted.layers, strict=True):
            self._add_origin(wanted, layer.segment, descriptor, layer.record)
        return self._finish(wanted, tree, path, self._segments(tree, record, domain), record)

    def _segments(self, tree: TreeFile, record: ImageRecord, domain: str) -> list[Segment]:
        """The segments that a tree refers to, in its order; raises StateError when one is gone."""
        domains = {layer.segment: domain_of(layer, domain) for layer in record.layers}
        segments = []
        for digest in tree.segments:
            if (segment := self._pool.segment(digest, domains.get(str(digest), domain))) is None:
                raise StateError(f"segment {digest} is not in the pool any more", hint="it is opened anew")
            segments.append(segment)
        return segments

    async def _open_layers(self, wanted: Wanted, progress: Progress) -> list[OpenLayer]:
        """All layers at once; the same layer listed twice is opened once."""
        opened: dict[Digest, OpenLayer] = {}
        limit = trio.CapacityLimiter(LAYERS_AT_A_TIME)
        manifest, access = wanted.manifest, wanted.place.access
        config = LazyConfig(manifest, lambda: self._document(wanted.source, manifest.config, access))

        async def one(number: int, descriptor: Descriptor) -> None:
            async with limit:
                opened[descriptor.digest] = await self.layers.open(
                    wanted.reference,
                    wanted.source,
                    descriptor,
                    access=access,
                    diff_id=lambda: config.diff_id(number),
                    allow_unverified_toc=wanted.allow_unverified_toc,
                    progress=progress,
                )

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(config.load)
                seen: set[Digest] = set()
                for number, descriptor in enumerate(wanted.layers):
                    if descriptor.digest not in seen:
                        seen.add(descriptor.digest)
                        nursery.start_soon(one, number, descriptor)
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        return [opened[descriptor.digest] for descriptor in wanted.layers]

    def _add_origin(
        self, wanted: Wanted, segment: Segment, descriptor: Descriptor, record: LayerRecord
    ) -> None:
        origin = Origin(
            segment=segment,
            source=wanted.source,
            descriptor=descriptor,
            streamed=record.streamed,
            peers=wanted.place.shared and not record.unverified,
            secret=wanted.place.secret,
        )
        self._fetcher.add_origin(origin)

    def _finish(
        self,
        wanted: Wanted,
        tree: TreeFile,
        path: Path,
        segments: list[Segment],
        record: ImageRecord,
    ) -> OpenImage:
        domain = wanted.place.domain
        by_id = {str(segment.id): segment for segment in segments}
        return OpenImage(
            reference=str(wanted.reference),
            digest=wanted.manifest.digest,
            tree=tree,
            tree_path=path,
            segments=segments,
            layers=[
                segment
                for layer in record.layers
                if not layer.unverified
                and (segment := self._pool.segment(Digest.parse(layer.segment), domain)) is not None
            ],
            prefetch=[
                (by_id[layer.segment], layer.prefetch_end)
                for layer in record.layers
                if layer.prefetch_end and layer.segment in by_id
            ],
            warnings=record.warnings,
        )
