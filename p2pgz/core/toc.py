"""The table of contents of a layer: out of its compressed member, checked against what the manifest says
about it.

Called by `core.tail` (and `convert`, which checks what it wrote). Nothing of a TOC is looked at before its
digest is known to be the one that the manifest vouches for; inflating it is bounded. Specifications: eStargz
("TOC", "Footer"), and the annotations of stargz-snapshotter's and containers' zstd:chunked writers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from p2pgz.core.digest import Digest
from p2pgz.core.footer import Footer
from p2pgz.core.members import MemberInflater
from p2pgz.core.toc_entries import (
    MAX_INNER_BYTES,
    MAX_LAYER_BYTES,
    NO_PREFETCH_LANDMARK,
    PREFETCH_LANDMARK,
    TOC_FILE_NAME,
    parse_toc,
)
from p2pgz.core.toc_schema import MAX_TOC_ENTRIES, MAX_TOC_JSON_BYTES
from p2pgz.errors import ChunkCorrupt, ImageInvalid

__all__ = [
    "CONTAINERS_CHECKSUM_ANNOTATION",
    "CONTAINERS_POSITION_ANNOTATION",
    "MAX_INNER_BYTES",
    "MAX_LAYER_BYTES",
    "MAX_TOC_ENTRIES",
    "MAX_TOC_JSON_BYTES",
    "NO_PREFETCH_LANDMARK",
    "PREFETCH_LANDMARK",
    "SGZ_CHECKSUM_ANNOTATION",
    "SGZ_POSITION_ANNOTATION",
    "TAR_SPLIT_POSITION_ANNOTATION",
    "TOC_DIGEST_ANNOTATION",
    "TOC_FILE_NAME",
    "UNCOMPRESSED_SIZE_ANNOTATION",
    "check_toc_digests",
    "claims_toc",
    "extract_external_toc",
    "extract_toc",
    "is_vouched",
    "parse_position",
    "parse_toc",
]

TOC_DIGEST_ANNOTATION: Final = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE_ANNOTATION: Final = "io.containers.estargz.uncompressed-size"
SGZ_CHECKSUM_ANNOTATION: Final = "io.containers.zstd-chunked.manifest-checksum"
SGZ_POSITION_ANNOTATION: Final = "io.containers.zstd-chunked.manifest-position"
CONTAINERS_CHECKSUM_ANNOTATION: Final = "io.github.containers.zstd-chunked.manifest-checksum"
CONTAINERS_POSITION_ANNOTATION: Final = "io.github.containers.zstd-chunked.manifest-position"
TAR_SPLIT_POSITION_ANNOTATION: Final = "io.github.containers.zstd-chunked.tarsplit-position"

_CHECKSUMS = (SGZ_CHECKSUM_ANNOTATION, CONTAINERS_CHECKSUM_ANNOTATION)
_POSITIONS = (SGZ_POSITION_ANNOTATION, CONTAINERS_POSITION_ANNOTATION)
_TAR_BLOCK_BYTES = 512
_POSITION = re.compile(r"(\d{1,19}):(\d{1,19}):(\d{1,19}):(\d{1,19})", re.ASCII)
_OCTAL = re.compile(rb"[ \0]*([0-7]{1,12})[ \0]*")


def extract_toc(footer: Footer, compressed: bytes) -> bytes:
    """The TOC's JSON out of the bytes that the footer says are the TOC; raises ImageInvalid when they are not
    one.

    At most MAX_TOC_JSON_BYTES are inflated, whatever the bytes hold.
    """
    if footer.toc_raw_bytes is None:
        return _from_tar(compressed)
    if footer.toc_raw_bytes > MAX_TOC_JSON_BYTES:
        raise _too_large(footer.toc_raw_bytes)
    return _inflate("zstd", compressed, 0, footer.toc_raw_bytes)


def extract_external_toc(layer_blob: bytes) -> bytes:
    """The TOC's JSON out of a layer of a TOC image: a tar.gz whose first entry it is."""
    return _from_tar(layer_blob)


def _from_tar(compressed: bytes) -> bytes:
    header = _inflate("gzip", compressed, 0, _TAR_BLOCK_BYTES)
    name = header[:100].rstrip(b"\0")
    size = _OCTAL.fullmatch(header[124:136])
    stated_sum = _OCTAL.fullmatch(header[148:156])
    # the checksum field itself counts as eight blanks (POSIX, "ustar Interchange Format")
    actual_sum = sum(header) - sum(header[148:156]) + 8 * 0x20
    if size is None or stated_sum is None or int(stated_sum[1], 8) != actual_sum:
        raise ImageInvalid("TOC: its place in the blob does not hold a tar header")
    if name != TOC_FILE_NAME.encode() or header[156:157] not in (b"0", b"\0"):
        raise ImageInvalid(f"TOC: the tar entry in its place is {name[:100]!r}, not {TOC_FILE_NAME}")
    json_bytes = int(size[1], 8)
    if json_bytes > MAX_TOC_JSON_BYTES:
        raise _too_large(json_bytes)
    return _inflate("gzip", compressed, _TAR_BLOCK_BYTES, json_bytes) if json_bytes else b""


def _too_large(json_bytes: int) -> ImageInvalid:
    return ImageInvalid(
        f"TOC of {json_bytes} bytes is larger than {MAX_TOC_JSON_BYTES}",
        hint="the layer is damaged or has far too many files to be read lazily",
    )


def _inflate(compression: Literal["gzip", "zstd"], compressed: bytes, start: int, size: int) -> bytes:
    inflater = MemberInflater(compression, [(start, size)])
    try:
        done = inflater.feed(compressed)
        inflater.close()
    except ChunkCorrupt as error:
        raise ImageInvalid(f"TOC: {error.what}") from error
    return done[0][1]


def is_vouched(footer: Footer, annotations: Mapping[str, str]) -> bool:
    """Whether the manifest has a digest of the TOC that applies to this format."""
    if TOC_DIGEST_ANNOTATION in annotations:
        return True
    return footer.toc_raw_bytes is not None and any(name in annotations for name in _CHECKSUMS)


def claims_toc(annotations: Mapping[str, str]) -> bool:
    """Whether the manifest says that the layer has a TOC, whatever the blob's last bytes say."""
    return any(name in annotations for name in (TOC_DIGEST_ANNOTATION, *_CHECKSUMS, *_POSITIONS))


def check_toc_digests(
    footer: Footer,
    toc_json: bytes,
    toc_compressed: bytes,
    annotations: Mapping[str, str],
    *,
    allow_unverified: bool = False,
) -> Digest:
    """The digest of the TOC's JSON, once every annotation that applies to the format agrees with it.

    The TOC digest is of the JSON; the manifest checksums, for zstd:chunked only, are of the compressed bytes
    (`toc_compressed`), and manifest positions must be the footer's. Raises ImageInvalid for a mismatch, a
    malformed annotation, or when no annotation vouches for the TOC and `allow_unverified` is not set.
    """
    digest = Digest.of(toc_json)
    if TOC_DIGEST_ANNOTATION in annotations:
        _expect(annotations, TOC_DIGEST_ANNOTATION, digest)
    if footer.toc_raw_bytes is not None:
        compressed_digest = Digest.of(toc_compressed)
        for name in _CHECKSUMS:
            if name in annotations:
                _expect(annotations, name, compressed_digest)
        for name in _POSITIONS:
            if name in annotations:
                _expect_position(annotations, name, footer)
    if not allow_unverified and not is_vouched(footer, annotations):
        raise ImageInvalid(
            "the manifest has no digest of this layer's TOC, so nothing but the registry vouches for it",
            hint="--allow-unverified-toc trusts the registry; converting the image again adds the digest",
        )
    return digest


def _expect(annotations: Mapping[str, str], name: str, found: Digest) -> None:
    expected = Digest.parse(annotations[name], where=f"annotation {name}")
    if found != expected:
        raise ImageInvalid(
            f"TOC is {found}, but the manifest says {expected} ({name})",
            hint="the blob is damaged or the image was put together wrongly",
        )


def parse_position(annotations: Mapping[str, str], name: str) -> tuple[int, int, int, int]:
    """Offset, compressed bytes, raw bytes and schema of a TOC, as a position annotation has them; raises ImageInvalid."""
    match = _POSITION.fullmatch(annotations[name])
    if match is None:
        raise ImageInvalid(f"annotation {name}: {annotations[name][:80]!r} is not four numbers")
    offset, compressed_bytes, raw_bytes, manifest_type = map(int, match.groups())
    return offset, compressed_bytes, raw_bytes, manifest_type


def _expect_position(annotations: Mapping[str, str], name: str, footer: Footer) -> None:
    offset, compressed_bytes, raw_bytes, manifest_type = parse_position(annotations, name)
    footer_says = (footer.toc_offset, footer.toc_compressed_bytes, footer.toc_raw_bytes, 1)
    if (offset, compressed_bytes, raw_bytes, manifest_type) != footer_says:
        raise ImageInvalid(f"annotation {name}: {annotations[name]} is not where the footer says the TOC is")
