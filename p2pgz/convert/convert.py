"""Converting images: every layer anew, config, manifest and index to match.

`convert_image` copies from one repository or layout to another, for the command line. Layers pass through temporary files
one at a time, each in a worker thread, so memory does not grow with the image. What stays: all fields of config, manifest
and index but digests, sizes, media types and the annotations that describe a layer's format. What goes: attestations, which
speak about digests that are no more. OCI image spec 1.1.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import trio

from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.convert.writer import WrittenLayer
from p2pgz.core.digest import Digest
from p2pgz.core.footer import parse_footer
from p2pgz.core.media import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_INDEX_DEPTH,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    parse_config,
    parse_manifest_or_index,
    select_platform,
)
from p2pgz.core.platform import Platform
from p2pgz.core.ports import ImageSink, ImageSource
from p2pgz.core.reference import Reference
from p2pgz.core.toc import (
    CONTAINERS_CHECKSUM_ANNOTATION,
    CONTAINERS_POSITION_ANNOTATION,
    SGZ_CHECKSUM_ANNOTATION,
    SGZ_POSITION_ANNOTATION,
    TAR_SPLIT_POSITION_ANNOTATION,
    TOC_DIGEST_ANNOTATION,
    UNCOMPRESSED_SIZE_ANNOTATION,
)
from p2pgz.errors import ImageInvalid, SourceUnavailable

_FORMAT_ANNOTATIONS = frozenset({
    TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION, SGZ_CHECKSUM_ANNOTATION, SGZ_POSITION_ANNOTATION,
    CONTAINERS_CHECKSUM_ANNOTATION, CONTAINERS_POSITION_ANNOTATION, TAR_SPLIT_POSITION_ANNOTATION,
    "io.github.containers.zstd-chunked.tarsplit-checksum",  # written until 2024
})  # fmt: skip
# For each footer the format's name, and the annotation without which its readers do not read in parts
_PROOFS = {
    "estargz": ("estargz", TOC_DIGEST_ANNOTATION), "zstd-sgz": ("zstd:chunked-stargz", TOC_DIGEST_ANNOTATION),
    "zstd-containers": ("zstd:chunked", TAR_SPLIT_POSITION_ANNOTATION),
}  # fmt: skip
_TO_OCI = {DOCKER_MANIFEST: OCI_MANIFEST, DOCKER_INDEX: OCI_INDEX, DOCKER_CONFIG: OCI_CONFIG}
_ABOUT_ANNOTATION = "vnd.docker.reference.type"  # buildkit: an attestation about another entry
_FOOTER_READ_BYTES = 128
_COPY_BYTES = 1 << 20


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `convert_image` shall do. `platform` None means all platforms of an index.

    Layers that have the wanted format already are kept as they are unless `force`, or files are to come first.
    """

    layer: LayerOptions = LayerOptions()
    platform: Platform | None = None
    force: bool = False


class LayerProgress(msgspec.Struct, frozen=True):
    """How far a layer is: bytes of the input blob read so far, of all. `done` once the output is stored."""

    digest: Digest
    done_bytes: int
    total_bytes: int
    state: str
    """download, convert, upload, kept or done"""


class LayerReport(msgspec.Struct, frozen=True):
    """What became of one layer of the source. `written` is None when it was kept."""

    source: Descriptor
    target: Descriptor
    written: WrittenLayer | None


class ConvertedImage(msgspec.Struct, frozen=True):
    """The result: what the target reference names now, and all layers and warnings on the way."""

    descriptor: Descriptor
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...]


Report = Callable[[LayerProgress], None]
"""Called from the event loop's thread and from worker threads; must not block"""


async def convert_image(
    source: ImageSource,
    reference: Reference,
    sink: ImageSink,
    target: Reference,
    options: ConvertOptions,
    *,
    report: Report | None = None,
    scratch_directory: Path | None = None,
) -> ConvertedImage:
    """Convert what `reference` names in `source` into `sink` under `target`.

    Raises what source and sink raise, and ImageInvalid for layers that break their format. Safe to repeat after a failure:
    blobs that the sink has are not sent again.
    """
    options.layer.check()
    job = _Job(source, sink, options, report or (lambda progress: None), scratch_directory)
    found = await source.resolve(reference)
    document = await source.document(found)
    parsed = parse_manifest_or_index(document, found.media_type, where=str(reference))
    depth = 0
    while options.platform is not None and isinstance(parsed, Index):
        depth += 1
        if depth > MAX_INDEX_DEPTH:
            raise ImageInvalid(
                f"{reference}: indexes within indexes", hint="choose one of its manifests by digest"
            )
        found = select_platform(parsed, options.platform, where=str(reference))
        document = await source.document(found)
        parsed = parse_manifest_or_index(document, found.media_type, where=str(reference))
    if isinstance(parsed, Index):
        descriptor = await job.index(document, parsed, target, 1)
    else:
        descriptor = await job.manifest(document, parsed, target)
    return ConvertedImage(descriptor, tuple(job.layers.values()), (*job.warnings, *job.absent_files()))


class _Job:
    """One conversion: remembers layers, since the images of an index share many."""

    def __init__(
        self,
        source: ImageSource,
        sink: ImageSink,
        options: ConvertOptions,
        report: Report,
        scratch: Path | None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._options = options
        self._report = report
        self._scratch = scratch
        self.layers: dict[tuple[Digest, bool], LayerReport] = {}
        self.warnings: list[str] = []

    async def index(self, document: bytes, index: Index, target: Reference | None, depth: int) -> Descriptor:
        """Convert every image of an index."""
        if depth > MAX_INDEX_DEPTH:
            raise ImageInvalid("index: too many indexes within indexes")
        tree = json.loads(document)
        kept: list[dict[str, Any]] = []
        for raw, entry in zip(tree["manifests"] or [], index.manifests, strict=True):
            if not _is_image(entry):
                self.warnings.append(
                    f"{entry.digest} was left out: it is no image, or speaks about one that changes"
                )
                continue
            child_document = await self._source.document(entry)
            child = parse_manifest_or_index(child_document, entry.media_type, where=str(entry.digest))
            if isinstance(child, Index):
                made = await self.index(child_document, child, None, depth + 1)
            else:
                made = await self.manifest(child_document, child, None)
            kept.append(_renewed(raw, made.media_type, made.digest, made.size))
        tree["manifests"] = kept
        media_type = self._media_type(index.media_type)
        return await self._put_document(tree, media_type, target)

    async def manifest(self, document: bytes, manifest: Manifest, target: Reference | None) -> Descriptor:
        """Convert one image."""
        config_document = await self._source.document(manifest.config)
        config = parse_config(config_document, len(manifest.layers), os="", where=str(manifest.config.digest))
        docker = manifest.media_type == DOCKER_MANIFEST and not self._makes_oci
        diff_ids: list[str] = []
        layers: list[dict[str, Any]] = []
        tree = json.loads(document)
        for raw, layer, diff_id in zip(tree["layers"] or [], manifest.layers, config.diff_ids, strict=True):
            made = await self._layer(layer, docker=docker)
            diff_ids.append(str(made.written.diff_id if made.written else diff_id))
            layers.append(_layer_entry(raw, made.target))
        config_tree = json.loads(config_document)
        config_tree["rootfs"]["diff_ids"] = diff_ids
        new_config = _encode(config_tree)
        config_type = manifest.config.media_type
        config_descriptor = Descriptor(
            media_type=config_type if docker else _TO_OCI.get(config_type, config_type),
            digest=Digest.of(new_config), size=len(new_config),
        )  # fmt: skip
        await self._put_bytes(config_descriptor, new_config)
        tree["layers"] = layers
        tree["config"] = _renewed(
            tree["config"], config_descriptor.media_type, config_descriptor.digest, config_descriptor.size
        )
        return await self._put_document(tree, self._media_type(manifest.media_type), target)

    def absent_files(self) -> list[str]:
        """A warning for each prioritized path that no layer has."""
        absent = dict.fromkeys(self._options.layer.prioritized)
        for made in self.layers.values():
            if made.written is not None:
                missing = set(made.written.absent)
                absent = {path: None for path in absent if path in missing}
        return [f"prioritized {path.decode(errors='replace')!r} is in no layer" for path in absent]

    @property
    def _makes_oci(self) -> bool:
        """Docker's manifests have no type for zstd layers."""
        return self._options.layer.format != "estargz"

    def _media_type(self, media_type: str) -> str:
        return _TO_OCI.get(media_type, media_type) if self._makes_oci else media_type

    async def _put_document(
        self, tree: dict[str, Any], media_type: str, target: Reference | None
    ) -> Descriptor:
        if "mediaType" in tree:
            tree["mediaType"] = media_type
        return await self._sink.put_document(_encode(tree), media_type, target)

    async def _layer(self, layer: Descriptor, *, docker: bool) -> LayerReport:
        key = (layer.digest, docker)
        made = self.layers.get(key)
        if made is None:
            try:
                made = await self._convert(layer, docker=docker)
            except OSError as error:
                folder = self._scratch or tempfile.gettempdir()
                raise SourceUnavailable(
                    f"layer {layer.digest}: scratch files in {folder}: {error.strerror}",
                    hint="a layer and what becomes of it have to fit there; TMPDIR chooses another folder",
                ) from error
            self.layers[key] = made
        return made

    async def _convert(self, layer: Descriptor, *, docker: bool) -> LayerReport:
        if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
            self.warnings.append(f"layer {layer.digest} was kept: it may not be distributed")
            self._tell(layer, layer.size, "kept")
            return LayerReport(layer, layer, None)
        lazy = await self._lazy_format(layer)
        with tempfile.TemporaryFile(prefix="p2pgz-convert-", dir=self._scratch) as blob:
            keep = lazy == self._options.layer.format and not self._options.force
            if keep and not self._options.layer.prioritized:
                if not await self._sink.has_blob(str(layer.digest)):
                    await self._download(layer, blob)
                    await self._sink.put_blob(layer, partial(_pieces, blob))
                self._tell(layer, layer.size, "kept")
                return LayerReport(layer, layer, None)
            await self._download(layer, blob)
            with tempfile.TemporaryFile(prefix="p2pgz-convert-", dir=self._scratch) as out:
                written = await trio.to_thread.run_sync(self._work, layer, blob, out, lazy is not None)
                blob.truncate(0)
                target = self._describe(layer, written, docker=docker)
                self._tell(layer, layer.size, "upload")
                if not await self._sink.has_blob(str(target.digest)):
                    await self._sink.put_blob(target, partial(_pieces, out))
        self.warnings += [f"layer {layer.digest}: {text}" for text in written.warnings]
        self._tell(layer, layer.size, "done")
        return LayerReport(layer, target, written)

    def _work(self, layer: Descriptor, blob: BinaryIO, out: BinaryIO, rewritten: bool) -> WrittenLayer:
        def progress(done: int) -> None:
            trio.from_thread.check_cancelled()
            self._tell(layer, done, "convert")

        blob.seek(0)
        try:
            return convert_layer(
                blob,
                out,
                self._options.layer,
                progress=progress,
                rewritten=rewritten,
                scratch_directory=self._scratch,
            )
        except ImageInvalid as error:
            raise ImageInvalid(f"layer {layer.digest}: {error.what}", hint=error.hint) from error

    def _describe(self, layer: Descriptor, written: WrittenLayer, *, docker: bool) -> Descriptor:
        kept = {key: value for key, value in layer.annotations.items() if key not in _FORMAT_ANNOTATIONS}
        media_type = OCI_LAYER_ZSTD if self._makes_oci else DOCKER_LAYER_GZIP if docker else OCI_LAYER_GZIP
        return Descriptor(
            media_type=media_type,
            digest=written.digest,
            size=written.size,
            annotations=kept | written.annotations,
        )

    async def _lazy_format(self, layer: Descriptor) -> str | None:
        """Which lazily readable format a layer has, with a digest for its TOC; None for plain ones."""
        if not layer.annotations.keys() & _FORMAT_ANNOTATIONS:
            return None
        start = max(0, layer.size - _FOOTER_READ_BYTES)
        async with self._source.blob(layer, start, layer.size) as pieces:
            tail = b"".join([piece async for piece in pieces])
        footer = parse_footer(tail, layer.size)
        if footer is None:
            return None
        proof = _PROOFS.get(footer.kind, ("other", ""))
        return proof[0] if proof[1] in layer.annotations else "other"

    async def _download(self, layer: Descriptor, blob: BinaryIO) -> None:
        """Bring a blob here, checked."""
        hashed = hashlib.sha256()
        done = 0
        async with self._source.blob(layer, 0, layer.size) as pieces:
            async for piece in pieces:
                hashed.update(piece)
                blob.write(piece)
                done += len(piece)
                self._tell(layer, done, "download")
        if done != layer.size:
            raise SourceUnavailable(f"{self._source.name}: layer {layer.digest} ended after {done} bytes")
        if hashed.digest() != layer.digest.raw:
            raise ImageInvalid(
                f"{self._source.name}: the bytes of layer {layer.digest} have another digest: sha256:{hashed.hexdigest()}",
                hint="the registry's copy is damaged",
            )

    async def _put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        async def read() -> AsyncIterator[bytes]:
            await trio.lowlevel.checkpoint()
            yield data

        if not await self._sink.has_blob(str(descriptor.digest)):
            await self._sink.put_blob(descriptor, read)

    def _tell(self, layer: Descriptor, done: int, state: str) -> None:
        self._report(LayerProgress(layer.digest, done, layer.size, state))


def _is_image(entry: Descriptor) -> bool:
    unknown = entry.platform is not None and "unknown" in (entry.platform.os, entry.platform.architecture)
    return (
        entry.media_type in MANIFEST_TYPES | INDEX_TYPES
        and not unknown
        and _ABOUT_ANNOTATION not in entry.annotations
    )


def _renewed(raw: dict[str, Any], media_type: str, digest: Digest, size: int) -> dict[str, Any]:
    """A descriptor that speaks about another blob now; copies of the old one go."""
    entry = raw | {"mediaType": media_type, "digest": str(digest), "size": size}
    entry.pop("data", None)
    entry.pop("urls", None)
    return entry


def _layer_entry(raw: dict[str, Any], target: Descriptor) -> dict[str, Any]:
    """A manifest's entry for a layer: what it said, with the new blob's facts."""
    entry = _renewed(raw, target.media_type, target.digest, target.size)
    if target.annotations:
        entry["annotations"] = dict(sorted(target.annotations.items()))
    return entry


def _encode(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode()


async def _pieces(blob: BinaryIO) -> AsyncIterator[bytes]:
    """One pass over a temporary file; local reads of a megabyte do not pay a thread."""
    blob.seek(0)
    while data := blob.read(_COPY_BYTES):
        await trio.lowlevel.checkpoint()
        yield data
