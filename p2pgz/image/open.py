"""From a reference to a merged tree: manifest → layers → TOCs → tree file. All layers of an image are opened in parallel.

Called by the node for every command about an image. Documents are kept by digest in the pool and the finished tree under
the manifest's digest, so an image that is known here is opened again without parsing, and without a request but for the
tag. Nothing of an image that cannot be opened whole is left behind except verified documents and chunks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from p2pgz.core.content import FileRef, content_key
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
from p2pgz.errors import ImageInvalid, ImageNotFound, IntegrityError, SourceUnavailable, StateError
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.layers import LayerOpener, LayerRecord, OpenLayer, domain_of
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.opened import ImageRecord, OpenImage, map_tree, write_tree
from p2pgz.image.treebuild import build_tree
from p2pgz.image.treefile import TreeFile
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN, Segment

log = structlog.get_logger(component="image")

Progress = Callable[[dict[str, Any]], Awaitable[None]]

# Layers opened at a time: each is one request of up to some hundred KiB
LAYERS_AT_A_TIME: Final = 16
# Documents and TOCs; a registry that is silent longer than this is down for us. Plain layers have no deadline but stalls.
OPEN_SECONDS: Final = 120.0
# 2 us a key: a step of 4 ms
LOOKUP_KEYS: Final = 2048
TREES: Final = "trees"
BROKEN_HINT: Final = "this copy is damaged or was built wrongly: get another one, or tell its publisher"


class ImageOpener:
    """Opens images; keeps the open ones, since mounts of one image share their tree."""

    def __init__(
        self, pool: Pool, fetcher: ChunkFetcher, state_path: Path, peers: PeerSource | None = None
    ) -> None:
        self._pool = pool
        self._fetcher = fetcher
        self._trees = state_path / TREES
        self._documents = Documents(pool, peers)
        self._layers = LayerOpener(pool, self._documents, fetcher.counters, state_path)
        self._opening: dict[Digest, trio.Lock] = {}

    async def open(
        self,
        reference: Reference,
        source: ImageSource,
        *,
        platform: Platform,
        allow_unverified_toc: bool,
        progress: Progress,
        insist_on_platform: bool = False,
    ) -> OpenImage:
        """Open an image by reference; raises ImageNotFound, ImageInvalid, AuthRefused or SourceUnavailable."""
        with _naming(reference):
            try:
                with trio.fail_after(OPEN_SECONDS):
                    manifest = await self._manifest(reference, source, platform)
                    if insist_on_platform:
                        await self._check_platform(reference, source, manifest, platform)
            except trio.TooSlowError:
                raise SourceUnavailable(f"{source.name}: no answer within {OPEN_SECONDS:g} s") from None
            lock = self._opening.setdefault(manifest.digest, trio.Lock())
            async with lock:
                image = await self._known(reference, source, manifest, allow_unverified_toc)
                if image is None:
                    image = await self._unknown(reference, source, manifest, allow_unverified_toc, progress)
        return image

    async def open_known(
        self,
        manifest_digest: Digest,
        reference: Reference,
        source: ImageSource,
        *,
        allow_unverified_toc: bool,
    ) -> OpenImage:
        """An image that was opened on this host before; nothing is asked of `source` until a chunk is missing.

        Raises StateError when too little of it is left here.
        """
        document = await self._pool.get_object(manifest_digest)
        if document is None:
            raise StateError(
                f"{reference}: its manifest is not kept here", hint="mount it while its source answers"
            )
        manifest = parse_manifest_or_index(document, "", where=str(reference))
        if not isinstance(manifest, Manifest):
            raise StateError(f"{reference}: {manifest_digest} is not an image")
        async with self._opening.setdefault(manifest.digest, trio.Lock()):
            image = await self._known(reference, source, manifest, allow_unverified_toc)
            if image is None:
                away = _Away(source.name)
                await self._unknown(reference, away, manifest, allow_unverified_toc, _silent)
                image = await self._known(reference, source, manifest, allow_unverified_toc)
        if image is None:
            raise StateError(
                f"{reference}: too little of it is kept here", hint="mount it while its source answers"
            )
        return image

    async def _manifest(self, reference: Reference, source: ImageSource, platform: Platform) -> Manifest:
        descriptor = await source.resolve(reference)
        for _ in range(MAX_INDEX_DEPTH + 1):
            document = await self._document(source, descriptor)
            parsed = parse_manifest_or_index(document, descriptor.media_type, where=str(reference))
            if isinstance(parsed, Manifest):
                return parsed
            assert isinstance(parsed, Index)
            descriptor = select_platform(parsed, platform, where=str(reference))
        raise ImageInvalid(f"{reference}: indexes inside indexes, more than {MAX_INDEX_DEPTH} deep")

    async def _check_platform(
        self, reference: Reference, source: ImageSource, manifest: Manifest, platform: Platform
    ) -> None:
        """An image without an index is for one platform: refuse it when the user has asked for another one."""
        document = await self._document(source, manifest.config)
        config = parse_config(document, len(manifest.layers), os="", where=f"config {manifest.config.digest}")
        offered = Platform.of(config.os, config.architecture, config.variant)
        if platform.suits(offered) is None:
            raise ImageNotFound(
                f"{reference}: is an image for {offered}, not {platform}",
                hint="leave --platform out to take it as it is",
            )

    async def _document(self, source: ImageSource, descriptor: Descriptor) -> bytes:
        """A document from the pool, from peers, or from the source."""
        known_size = descriptor.size != SIZE_UNKNOWN
        document = await self._documents.get(
            descriptor.digest,
            limit_bytes=descriptor.size if known_size else MAX_MANIFEST_BYTES,
            from_source=lambda: source.document(descriptor),
        )
        if known_size and len(document) != descriptor.size:
            raise ImageInvalid(
                f"{descriptor.digest} has {len(document)} bytes, not the {descriptor.size} that its descriptor says"
            )
        return document

    async def _known(
        self, reference: Reference, source: ImageSource, manifest: Manifest, allow_unverified_toc: bool
    ) -> OpenImage | None:
        """The image as it was opened before, if all of it is still here."""
        path = self._tree_path(manifest.digest)
        try:
            tree = map_tree(path)
            record = msgspec.json.decode(tree.info, type=ImageRecord)
            if any(layer.unverified for layer in record.layers) and not allow_unverified_toc:
                return None
            segments = self._segments(tree, record)
        except FileNotFoundError:
            return None
        except (StateError, OSError, msgspec.MsgspecError) as error:
            log.warning("tree.unusable", path=str(path), reason=str(error))
            return None
        blobs = {layer.digest: layer for layer in manifest.layers}
        for layer in record.layers:
            descriptor = blobs.get(Digest.parse(layer.blob))
            if descriptor is None:
                return None
            segment = self._pool.segment(Digest.parse(layer.segment), domain_of(layer))
            if segment is None:
                return None
            self._add_origin(segment, source, descriptor, layer)
        return self._finish(reference, manifest, tree, path, segments, record)

    async def _unknown(
        self,
        reference: Reference,
        source: ImageSource,
        manifest: Manifest,
        allow_unverified_toc: bool,
        progress: Progress,
    ) -> OpenImage:
        layers = await self._open_layers(reference, source, manifest, allow_unverified_toc, progress)
        inputs = [LayerInput(layer.toc, layer.layout.extents, layer.segment.id) for layer in layers]
        path = self._tree_path(manifest.digest)

        shared = await self._shared_files(layers)

        def build() -> tuple[bytes, ImageRecord]:
            merged = merge_layers(inputs)
            record = ImageRecord([layer.record for layer in layers], merged.warnings)
            find = lambda keys: {key: shared[key] for key in keys if key in shared}  # noqa: E731
            return build_tree(merged, shared_files=find, info=msgspec.json.encode(record)), record

        data, record = await trio.to_thread.run_sync(build)
        await trio.to_thread.run_sync(write_tree, path, data)
        for text in record.warnings:
            log.warning("image.warning", reference=str(reference), text=text)
        tree = map_tree(path)
        for layer, descriptor in zip(layers, manifest.layers, strict=True):
            self._add_origin(layer.segment, source, descriptor, layer.record)
        return self._finish(reference, manifest, tree, path, self._segments(tree, record), record)

    async def _shared_files(self, layers: list[OpenLayer]) -> dict[bytes, FileRef]:
        """Files of these layers that other segments hold completely, asked for in steps that do not stall the loop."""
        own = {layer.segment.id for layer in layers}
        keys = await trio.to_thread.run_sync(
            lambda: list(
                {content_key(entry.chunks) for layer in layers for entry in layer.toc.entries if entry.chunks}
            )
        )
        found: dict[bytes, FileRef] = {}
        if all(layer.record.unverified for layer in layers):
            return found
        for start in range(0, len(keys), LOOKUP_KEYS):
            found |= self._pool.lookup_files(SHARED_DOMAIN, keys[start : start + LOOKUP_KEYS])
            await trio.lowlevel.checkpoint()
        return {key: ref for key, ref in found.items() if ref.segment not in own}

    def _segments(self, tree: TreeFile, record: ImageRecord) -> list[Segment]:
        """The segments that a tree refers to, in its order; raises StateError when one is gone."""
        domains = {layer.segment: domain_of(layer) for layer in record.layers}
        segments = []
        for digest in tree.segments:
            segment = self._pool.segment(digest, domains.get(str(digest), SHARED_DOMAIN))
            if segment is None:
                raise StateError(
                    f"segment {digest} is not in the pool any more", hint="the image is opened anew"
                )
            segments.append(segment)
        return segments

    async def _open_layers(
        self,
        reference: Reference,
        source: ImageSource,
        manifest: Manifest,
        allow_unverified_toc: bool,
        progress: Progress,
    ) -> list[OpenLayer]:
        """All layers at once; the same layer listed twice is opened once."""
        opened: dict[Digest, OpenLayer] = {}
        limit = trio.CapacityLimiter(LAYERS_AT_A_TIME)
        config = _LazyConfig(self, source, manifest)

        async def one(number: int, descriptor: Descriptor) -> None:
            async with limit:
                opened[descriptor.digest] = await self._layers.open(
                    reference,
                    source,
                    descriptor,
                    diff_id=lambda: config.diff_id(number),
                    allow_unverified_toc=allow_unverified_toc,
                    progress=progress,
                )

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(config.load)
                seen: set[Digest] = set()
                for number, descriptor in enumerate(manifest.layers):
                    if descriptor.digest not in seen:
                        seen.add(descriptor.digest)
                        nursery.start_soon(one, number, descriptor)
        except BaseExceptionGroup as group:
            raise _first_error(group) from group
        return [opened[descriptor.digest] for descriptor in manifest.layers]

    def _add_origin(
        self, segment: Segment, source: ImageSource, descriptor: Descriptor, record: LayerRecord
    ) -> None:
        self._fetcher.add_origin(
            Origin(segment=segment, source=source, descriptor=descriptor, streamed=record.streamed)
        )

    def _finish(
        self,
        reference: Reference,
        manifest: Manifest,
        tree: TreeFile,
        path: Path,
        segments: list[Segment],
        record: ImageRecord,
    ) -> OpenImage:
        by_id = {str(segment.id): segment for segment in segments}
        return OpenImage(
            reference=str(reference),
            digest=manifest.digest,
            tree=tree,
            tree_path=path,
            segments=segments,
            prefetch=[
                (by_id[layer.segment], layer.prefetch_end)
                for layer in record.layers
                if layer.prefetch_end and layer.segment in by_id
            ],
            warnings=record.warnings,
        )

    def _tree_path(self, manifest: Digest) -> Path:
        return self._trees / f"{manifest.hex}.tree"


class _Away:
    """A source that is not to be asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def resolve(self, reference: Reference) -> Descriptor:
        raise self._error()

    async def document(self, descriptor: Descriptor) -> bytes:
        raise self._error()

    def blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        raise self._error()

    def _error(self) -> StateError:
        return StateError(
            f"{self.name}: too little of an image is kept here", hint="mount it while its source answers"
        )


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


class _LazyConfig:
    """The image's config, fetched beside the layers: plain layers need their diff ids, and its errors are the image's."""

    def __init__(self, opener: ImageOpener, source: ImageSource, manifest: Manifest) -> None:
        self._opener = opener
        self._source = source
        self._manifest = manifest
        self._config: ImageConfig | None = None
        self._loaded = trio.Event()

    async def load(self) -> None:
        document = await self._opener._document(self._source, self._manifest.config)  # same module
        self._config = parse_config(
            document, len(self._manifest.layers), where=f"config {self._manifest.config.digest}"
        )
        self._loaded.set()

    async def diff_id(self, number: int) -> Digest:
        """The diff id of a layer; when loading fails the nursery of both cancels this wait."""
        await self._loaded.wait()
        assert self._config is not None
        return self._config.diff_ids[number]


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Several layers may fail at once; the user needs the first cause, the group stays its `__cause__`."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _first_error(error)
        return error
    return group


@contextmanager
def _naming(reference: Reference) -> Iterator[None]:
    """Say of every broken image which one it is, and what to do about it."""
    try:
        yield
    except IntegrityError as error:
        if str(reference) not in error.what:
            error.what = f"{reference}: {error.what}"
        error.hint = error.hint or BROKEN_HINT
        raise
