"""Manifests, indexes and configs of images (OCI image spec 1.1, Docker schema 2): strict parsing with limits.

Callers get these documents from a registry, a layout or a peer and have checked nothing but their length;
`check_document` comes first, then `parse_manifest_or_index` or `parse_config`. Every parser returns the
finished value or raises ImageInvalid naming the field. Digests are parsed, so no text of a document can
become a path or a URL; `urls` are kept and never followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from p2pgz.core.digest import Digest
from p2pgz.core.platform import Platform
from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import ImageInvalid, ImageNotFound

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST))  # what we ask registries for
SCHEMA1_PREFIX = "application/vnd.docker.distribution.manifest.v1+"
# The compression that a layer's media type states; the magic bytes of the blob decide in the end
LAYER_COMPRESSION: Mapping[str, str] = {
    OCI_LAYER_TAR: "none",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    DOCKER_LAYER_GZIP: "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}

REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"
TOC_DIGEST_ANNOTATION = "containerd.io/snapshot/stargz/toc.digest"
ZSTD_CHECKSUM_ANNOTATION = "io.github.containers.zstd-chunked.manifest-checksum"
ZSTD_POSITION_ANNOTATION = "io.github.containers.zstd-chunked.manifest-position"
_DIGEST_ANNOTATIONS = (TOC_DIGEST_ANNOTATION, ZSTD_CHECKSUM_ANNOTATION)
_ATTESTATION_ANNOTATION = "vnd.docker.reference.type"  # buildkit: an entry that is about another entry

MAX_MANIFEST_BYTES = (
    4 << 20
)  # distribution spec 1.1: what registries must take; containerd's and docker's limit, too
MAX_CONFIG_BYTES = 8 << 20  # histories of generated images reach some hundred KiB
MAX_LAYERS = 512  # overlayfs ends at 500 lower directories, docker at 127 layers
MAX_INDEX_DEPTH = 3  # an index may name indexes; nobody does so twice
MAX_SIZE_BYTES = (1 << 63) - 1  # descriptors' sizes are int64
SIZE_UNKNOWN = -1  # of a document asked for by digest and not seen yet; its digest alone vouches for it

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a document says about a blob: where it is is the business of a source.

    What a person asked for by digest has no media type and SIZE_UNKNOWN until the document is there.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = field(default_factory=dict)
    urls: tuple[str, ...] = ()
    platform: Platform | None = None
    """of an index's entry, if it says one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image: its config and its layers, the lowest first. `digest` is of the document's bytes."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str]
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The images of several platforms under one name. `digest` is of the document's bytes."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str]
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What an image runs as.

    `config` and `history` are as the document has them; nothing in them is checked but its type.
    """

    diff_ids: tuple[Digest, ...]
    os: str
    architecture: str
    variant: str
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    digest: Digest


def check_document(descriptor: Descriptor, data: bytes, *, where: str = "document") -> None:
    """Raise ImageInvalid unless `data` is what the descriptor promises."""
    if len(data) != descriptor.size != SIZE_UNKNOWN:
        raise ImageInvalid(
            f"{where}: {descriptor.digest} has {len(data)} bytes, its descriptor says {descriptor.size}"
        )
    if Digest.of(data) != descriptor.digest:
        raise ImageInvalid(
            f"{where}: the bytes of {descriptor.digest} have the digest {Digest.of(data)}",
            hint="the registry or a proxy on the way gave other bytes",
        )


def parse_manifest_or_index(
    data: bytes, media_type_hint: str = "", *, where: str = "manifest"
) -> Manifest | Index:
    """Parse what a tag or descriptor led to.

    `media_type_hint` is the descriptor's type or the response's Content-Type.
    """
    hint = bare_type(media_type_hint)
    _refuse_schema1(hint, where)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ImageInvalid(f"{where}: {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    document = _object(parse_strict(data, where=where), where)
    version = document.get("schemaVersion")
    if version == 1 and not isinstance(version, bool):
        _refuse_schema1(SCHEMA1_PREFIX, where)
    if version != 2 or not isinstance(version, int):
        raise ImageInvalid(f"{where}: schemaVersion is {_short(version)}, not 2")
    if "layers" in document and "manifests" in document:
        raise ImageInvalid(
            f"{where}: has both layers and manifests", hint="the image spec forbids the ambiguity"
        )
    media_type = _decide_type(document, hint, where)
    digest = Digest.of(data)
    annotations = _annotations(document, where)
    if media_type in INDEX_TYPES:
        entries = _list(document, "manifests", _parse_descriptor, where)
        return Index(media_type=media_type, manifests=tuple(entries), annotations=annotations, digest=digest)
    if len(document["layers"] if isinstance(document.get("layers"), list) else ()) > MAX_LAYERS:
        raise ImageInvalid(f"{where}: {len(document['layers'])} layers, the limit is {MAX_LAYERS}")
    return Manifest(
        media_type=media_type,
        config=_parse_descriptor(_required(document, "config", where), f"{where}: config"),
        layers=tuple(_list(document, "layers", _parse_layer, where)),
        annotations=annotations,
        digest=digest,
    )


def parse_config(data: bytes, layer_count: int, *, os: str = "linux", where: str = "config") -> ImageConfig:
    """Parse an image's config, whose diff ids must be as many as the manifest's layers.

    Empty `os` allows any.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ImageInvalid(f"{where}: {len(data)} bytes, the limit is {MAX_CONFIG_BYTES}")
    document = _object(parse_strict(data, where=where), where)
    rootfs = _object(_required(document, "rootfs", where), f"{where}: rootfs")
    if rootfs.get("type") != "layers":
        raise ImageInvalid(f'{where}: rootfs.type is {_short(rootfs.get("type"))}, not "layers"')
    diff_ids = (
        ()
        if layer_count == 0 and rootfs.get("diff_ids", ...) is None
        else tuple(
            _list(rootfs, "diff_ids", lambda value, at: Digest.parse(value, where=at), f"{where}: rootfs")
        )
    )
    if len(diff_ids) != layer_count:
        raise ImageInvalid(f"{where}: {len(diff_ids)} diff ids for {layer_count} layers")
    found_os = _text(document, "os", where)
    if os and found_os and found_os != os:
        raise ImageInvalid(
            f"{where}: an image for {found_os[:40]!r}, not {os}",
            hint="the index or tag names the wrong image",
        )
    return ImageConfig(
        diff_ids=diff_ids,
        os=found_os,
        architecture=_text(document, "architecture", where),
        variant=_text(document, "variant", where),
        config=_object(_optional(document, "config", {}), f"{where}: config"),
        history=tuple(_list(document, "history", _object, where))
        if document.get("history") is not None
        else (),
        digest=Digest.of(data),
    )


def select_platform(index: Index, platform: Platform, *, where: str = "index") -> Descriptor:
    """The entry that suits `platform` best;

    raises ImageNotFound that lists what there is. Attestations are passed over.
    """
    images = [entry for entry in index.manifests if _is_image(entry)]
    if not images:
        raise ImageNotFound(f"{where}: has no images in it", hint="it names other things; check the tag")
    if len(images) == 1 and images[0].platform is None:
        return images[0]
    best: tuple[tuple[int, ...], Descriptor] | None = None
    for entry in images:
        rank = platform.suits(entry.platform) if entry.platform else None
        if rank is not None and (best is None or rank > best[0]):
            best = rank, entry
    if best is None:
        there = ", ".join(sorted({str(entry.platform or "one without a platform") for entry in images})[:30])
        raise ImageNotFound(
            f"{where}: no image for {platform}; there is: {there}", hint="choose one with --platform"
        )
    return best[1]


def bare_type(content_type: str) -> str:
    """A media type without parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def _is_image(entry: Descriptor) -> bool:
    if _ATTESTATION_ANNOTATION in entry.annotations:
        return False
    if entry.platform and "unknown" in (entry.platform.os, entry.platform.architecture):
        return False
    return entry.media_type in MANIFEST_TYPES | INDEX_TYPES


def _refuse_schema1(media_type: str, where: str) -> None:
    if media_type.startswith(SCHEMA1_PREFIX):
        raise ImageInvalid(
            f"{where}: a manifest of Docker schema 1, which cannot be read lazily",
            hint="push the image again with a current tool",
        )


def _decide_type(document: dict[str, Any], hint: str, where: str) -> str:
    """The document's own type;

    descriptor or header must not contradict it, and the lists must be those of the type.
    """
    stated = _text(document, "mediaType", where)
    known = MANIFEST_TYPES | INDEX_TYPES
    if stated and stated not in known:
        raise ImageInvalid(f"{where}: media type {stated[:100]!r} is neither a manifest nor an index")
    if stated and hint in known and hint != stated:
        raise ImageInvalid(f"{where}: says it is {stated}, was announced as {hint}")
    media_type = (
        stated or (hint if hint in known else "") or (OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    )
    if ("layers" if media_type in INDEX_TYPES else "manifests") in document:
        raise ImageInvalid(f"{where}: {media_type} with the lists of the other kind")
    return media_type


def _parse_descriptor(value: Any, where: str) -> Descriptor:
    document = _object(value, where)
    media_type = _text(document, "mediaType", where)
    if not media_type:
        raise ImageInvalid(f"{where}: mediaType is missing")
    size = _required(document, "size", where)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_SIZE_BYTES:
        raise ImageInvalid(f"{where}: size is {_short(size)}, not a number of bytes")
    urls = _optional(document, "urls", [])
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ImageInvalid(f"{where}: urls is not a list of texts")
    return Descriptor(
        media_type=media_type,
        digest=Digest.parse(_required(document, "digest", where), where=f"{where}: digest"),
        size=size,
        annotations=_annotations(document, where),
        urls=tuple(urls),
        platform=_parse_platform(document, where),
    )


def _parse_layer(value: Any, where: str) -> Descriptor:
    layer = _parse_descriptor(value, where)
    if layer.media_type not in LAYER_COMPRESSION:
        if layer.media_type.endswith("+encrypted"):
            raise ImageInvalid(
                f"{where}: the layer is encrypted", hint="p2pgz has no keys; decrypt the image first"
            )
        raise ImageInvalid(
            f"{where}: {layer.media_type[:100]!r} is not the media type of a layer",
            hint="not a container image?",
        )
    for name in _DIGEST_ANNOTATIONS:
        if name in layer.annotations:
            Digest.parse(layer.annotations[name], where=f"{where}: annotation {name}")
    return layer


def _parse_platform(document: dict[str, Any], where: str) -> Platform | None:
    if document.get("platform") is None:
        return None
    value = _object(document["platform"], f"{where}: platform")
    os, architecture, variant = (
        _text(value, key, f"{where}: platform") for key in ("os", "architecture", "variant")
    )
    return Platform.of(os, architecture, variant) if os or architecture else None


def _annotations(document: dict[str, Any], where: str) -> dict[str, str]:
    found = _object(_optional(document, "annotations", {}), f"{where}: annotations")
    for key, value in found.items():
        if not isinstance(value, str):
            raise ImageInvalid(f"{where}: annotation {key[:100]!r} is {_short(value)}, not a text")
    return found


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ImageInvalid(f"{where}: {_short(value)} is not an object")
    return value


def _required(document: dict[str, Any], key: str, where: str) -> Any:
    if document.get(key) is None:
        raise ImageInvalid(f"{where}: {key} is missing")
    return document[key]


def _optional(document: dict[str, Any], key: str, absent: Any) -> Any:
    """The value, or `absent` when the key is missing or null (Go's writers leave null for empty lists and maps)."""
    value = document.get(key)
    return absent if value is None else value


def _text(document: dict[str, Any], key: str, where: str) -> str:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise ImageInvalid(f"{where}: {key} is {_short(value)}, not a text")
    return value or ""


def _list(document: dict[str, Any], key: str, parse: Callable[[Any, str], T], where: str) -> list[T]:
    values = _required(document, key, where)
    if not isinstance(values, list):
        raise ImageInvalid(f"{where}: {key} is not a list")
    return [parse(value, f"{where}: {key}[{n}]") for n, value in enumerate(values)]


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:60]
