"""Opens a lazily readable layer from the last bytes of its blob; the caller only fetches.

Called by the image opener: fetch the last TAIL_BYTES, call `open_layer_tail`, do what the answer says. One
request is enough for nearly all layers, because the TOC stands directly before the footer.

    tail = await fetch(tail_start(blob_size), blob_size)
    answer = open_layer_tail(tail, blob_size, annotations)
    if isinstance(answer, NeedMore):
        answer = open_layer_tail(await fetch(answer.start, blob_size), blob_size, annotations)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from p2pgz.core.digest import Digest
from p2pgz.core.footer import (
    ESTARGZ_FOOTER_BYTES,
    SKIPPABLE_HEADER_BYTES,
    TAIL_BYTES,
    ZSTD_CONTAINERS_FOOTER_BYTES,
    ZSTD_SGZ_FOOTER_BYTES,
    Footer,
    FooterKind,
    parse_footer,
)
from p2pgz.core.model import Toc
from p2pgz.core.toc import (
    CONTAINERS_CHECKSUM_ANNOTATION,
    CONTAINERS_POSITION_ANNOTATION,
    TOC_DIGEST_ANNOTATION,
    check_toc_digests,
    claims_toc,
    extract_external_toc,
    extract_toc,
    is_vouched,
    parse_position,
    parse_toc,
)
from p2pgz.errors import ImageInvalid


class Opened(NamedTuple):
    """A layer that can be read lazily. `vouched`: the manifest has the TOC's digest, so it may be shared with
    peers. `document`: what others open it by (`shared_document`)."""

    toc: Toc
    toc_json: bytes
    footer: Footer
    vouched: bool
    document: bytes

    @property
    def compression(self) -> Literal["gzip", "zstd"]:
        """How the members of the blob are packed."""
        return self.footer.compression


class NeedMore(NamedTuple):
    """Fetch the blob from `start` to its end and ask again."""

    start: int


class NeedExternal(NamedTuple):
    """The TOC is a layer of another image: fetch that layer's blob and call `open_external`."""

    footer: Footer


class NotLazy(NamedTuple):
    """No footer, and no word of one in the manifest: a plain layer, to be read as a whole."""


def tail_start(blob_size: int) -> int:
    """Where the first request for a layer's tail starts."""
    return max(0, blob_size - TAIL_BYTES)


def open_layer_tail(
    tail: bytes, blob_size: int, annotations: Mapping[str, str], *, allow_unverified: bool = False
) -> Opened | NeedMore | NeedExternal | NotLazy:
    """Open the layer whose blob of `blob_size` bytes ends with `tail`; `annotations` are those of its
    descriptor.

    Raises ImageInvalid when footer or TOC is malformed, is not what the annotations say, or when nothing
    vouches for the TOC and `allow_unverified` is not set.
    """
    footer = parse_footer(tail, blob_size)
    if footer is None:
        if claims_toc(annotations):
            raise ImageInvalid(
                "the manifest says that the layer has a TOC, but the blob does not end with a footer",
                hint="the blob is damaged or was compressed anew without the annotations being removed",
            )
        return NotLazy()
    if footer.toc_compressed_bytes is None:
        return NeedExternal(footer)
    tail_offset = blob_size - len(tail)
    if footer.toc_offset < tail_offset:
        return NeedMore(footer.toc_offset)
    start = footer.toc_offset - tail_offset
    compressed = tail[start : start + footer.toc_compressed_bytes]
    toc_json = extract_toc(footer, compressed)
    check_toc_digests(footer, toc_json, compressed, annotations, allow_unverified=allow_unverified)
    return _parsed(toc_json, footer, blob_size, annotations, compressed)


def shared_document(annotations: Mapping[str, str]) -> Digest | None:
    """The digest of the document that describes the layer and that anybody may supply: the TOC's JSON, or for containers'
    zstd:chunked the compressed TOC. None when the manifest vouches for none. Raises ImageInvalid for a malformed digest."""
    if TOC_DIGEST_ANNOTATION in annotations:
        return Digest.parse(annotations[TOC_DIGEST_ANNOTATION], where=f"annotation {TOC_DIGEST_ANNOTATION}")
    if CONTAINERS_CHECKSUM_ANNOTATION in annotations and CONTAINERS_POSITION_ANNOTATION in annotations:
        name = CONTAINERS_CHECKSUM_ANNOTATION
        return Digest.parse(annotations[name], where=f"annotation {name}")
    return None


def open_document(document: bytes, blob_size: int, media_type: str, annotations: Mapping[str, str]) -> Opened:
    """Open a layer by its `shared_document`, whose digest is checked; the blob has not been seen.

    Where content ends in the blob is then not known better than by the footer's size, so that the last member may seem
    longer than it is: harmless, since members end themselves. Raises ImageInvalid.
    """
    zstd = media_type.endswith("zstd")
    if TOC_DIGEST_ANNOTATION in annotations:
        kind: FooterKind = "zstd-sgz" if zstd else "estargz"
        footer_bytes = ZSTD_SGZ_FOOTER_BYTES if zstd else ESTARGZ_FOOTER_BYTES
        end = max(0, blob_size - footer_bytes)
        footer = Footer(kind, end, None, None, footer_bytes, end)
        return _parsed(document, footer, blob_size, annotations)
    offset, compressed_bytes, raw_bytes, _ = parse_position(annotations, CONTAINERS_POSITION_ANNOTATION)
    if compressed_bytes != len(document) or offset + compressed_bytes > blob_size:
        raise ImageInvalid(
            f"annotation {CONTAINERS_POSITION_ANNOTATION}: no TOC of {len(document)} bytes can stand there"
        )
    footer = Footer(
        "zstd-containers",
        offset,
        compressed_bytes,
        raw_bytes,
        ZSTD_CONTAINERS_FOOTER_BYTES,
        offset - SKIPPABLE_HEADER_BYTES,
    )
    return _parsed(extract_toc(footer, document), footer, blob_size, annotations, document)


def open_external(
    footer: Footer,
    blob_size: int,
    toc_layer: bytes,
    annotations: Mapping[str, str],
    *,
    allow_unverified: bool = False,
) -> Opened:
    """Open the layer that gave NeedExternal, with the blob of its TOC layer; raises ImageInvalid as above."""
    toc_json = extract_external_toc(toc_layer)
    check_toc_digests(footer, toc_json, b"", annotations, allow_unverified=allow_unverified)
    return _parsed(toc_json, footer, blob_size, annotations)


def _parsed(
    toc_json: bytes,
    footer: Footer,
    blob_size: int,
    annotations: Mapping[str, str],
    compressed: bytes = b"",
) -> Opened:
    toc = parse_toc(toc_json, kind=footer.kind, payload_end=footer.payload_end, blob_size=blob_size)
    by_json = TOC_DIGEST_ANNOTATION in annotations
    return Opened(toc, toc_json, footer, is_vouched(footer, annotations), toc_json if by_json else compressed)
