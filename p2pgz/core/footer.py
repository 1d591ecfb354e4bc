"""The last bytes of a lazily readable layer: which format it has and where its table of contents is.

Called by `core.tail` for reading and by `convert` for writing. Everything in a footer is a claim: nothing is
read or allocated by it before it has been checked against the size of the blob. Five footers exist (eStargz
specification, "Footer"; the legacy stargz and the external-TOC variants of it; stargz-snapshotter's and
containers' zstd:chunked, two lengths and two magics one letter apart).
"""

from __future__ import annotations

import re
import struct
from typing import Final, Literal, NamedTuple

from p2pgz.errors import ImageInvalid

FooterKind = Literal["estargz", "stargz", "external", "zstd-sgz", "zstd-containers"]

# One request for this many last bytes brings footer and TOC of a layer of up to about 5 000 files (50
# compressed bytes per file) for the price of a round trip: 20 ms at 100 Mbit/s
TAIL_BYTES: Final = 256 << 10
# Real layers end near 300 000 entries, 15 MB compressed. Bounds what a footer can make us download.
MAX_TOC_COMPRESSED_BYTES: Final = 128 << 20

ESTARGZ_FOOTER_BYTES: Final = 51
LEGACY_FOOTER_BYTES: Final = 47
EXTERNAL_FOOTER_BYTES: Final = 46
ZSTD_SGZ_FOOTER_BYTES: Final = 40
ZSTD_CONTAINERS_FOOTER_BYTES: Final = 64
# The TOC and the footer of zstd:chunked are the contents of skippable frames (RFC 8878, 3.1.2); positions
# point behind the frame's header
SKIPPABLE_HEADER_BYTES: Final = 8

_GZIP_WITH_EXTRA = b"\x1f\x8b\x08\x04"  # RFC 1952: magic, deflate, FLG.FEXTRA
_GZIP_HEADER = _GZIP_WITH_EXTRA + b"\0\0\0\0\x00\xff"  # no time, no flags, unknown system
_GZIP_EMPTY_REST = b"\x01\x00\x00\xff\xff" + b"\0" * 8  # a stored block of nothing, CRC and size of nothing
_ESTARGZ_EXTRA = struct.pack("<H2sH", 26, b"SG", 22)
_LEGACY_EXTRA = struct.pack("<H", 22)
_EXTERNAL_EXTRA = struct.pack("<H2sH", 21, b"SG", 17) + b"STARGZEXTERNALTOC"
_STARGZ_MAGIC = b"STARGZ"
_SGZ_MAGIC = b"GnUlInUx"
_CONTAINERS_MAGIC = b"GNUlInUx"
_SKIPPABLE_MAGIC = 0x184D2A50
_MANIFEST_TYPE_CRFS = 1  # the only TOC schema that zstd:chunked defines
_HEX_OFFSET = re.compile(rb"[0-9a-fA-F]{16}")
_MAX_OFFSET = (1 << 63) - 1


class Footer(NamedTuple):
    """Where the TOC of a blob is. Positions are within the blob.

    `toc_offset` is -1 and the lengths None when the TOC is in another blob (`external`); gzip footers do not
    say how long the TOC's JSON is (`toc_raw_bytes` None). File content lies before `payload_end`.
    """

    kind: FooterKind
    toc_offset: int
    toc_compressed_bytes: int | None
    toc_raw_bytes: int | None
    footer_bytes: int
    payload_end: int

    @property
    def compression(self) -> Literal["gzip", "zstd"]:
        """How the members of the blob are packed."""
        return "zstd" if self.kind.startswith("zstd") else "gzip"


def parse_footer(tail: bytes, blob_size: int) -> Footer | None:
    """The footer at the end of `tail`, the last bytes of a blob of `blob_size` bytes; None when there is no
    footer.

    Raises ImageInvalid for a footer whose numbers are malformed or lie outside the blob.
    """
    if tail[-8:] in (_SGZ_MAGIC, _CONTAINERS_MAGIC):
        return _parse_zstd(tail, blob_size)
    footer = tail[-ESTARGZ_FOOTER_BYTES:]
    if (
        footer[:4] == _GZIP_WITH_EXTRA
        and footer[10:16] == _ESTARGZ_EXTRA
        and footer[32:38] == _STARGZ_MAGIC
        and len(footer) == ESTARGZ_FOOTER_BYTES
    ):
        return _gzip_footer("estargz", footer[16:32], ESTARGZ_FOOTER_BYTES, blob_size)
    footer = tail[-LEGACY_FOOTER_BYTES:]
    if (
        footer[:4] == _GZIP_WITH_EXTRA
        and footer[10:12] == _LEGACY_EXTRA
        and footer[28:34] == _STARGZ_MAGIC
        and len(footer) == LEGACY_FOOTER_BYTES
    ):
        return _gzip_footer("stargz", footer[12:28], LEGACY_FOOTER_BYTES, blob_size)
    footer = tail[-EXTERNAL_FOOTER_BYTES:]
    if (
        footer[:4] == _GZIP_WITH_EXTRA
        and footer[10:33] == _EXTERNAL_EXTRA
        and len(footer) == EXTERNAL_FOOTER_BYTES
    ):
        return Footer("external", -1, None, None, EXTERNAL_FOOTER_BYTES, blob_size - EXTERNAL_FOOTER_BYTES)
    return None


def _gzip_footer(
    kind: Literal["estargz", "stargz"], digits: bytes, footer_bytes: int, blob_size: int
) -> Footer:
    # int() would also take signs, spaces and underscores
    if not _HEX_OFFSET.fullmatch(digits):
        raise ImageInvalid(f"{kind} footer: TOC offset {digits!r} is not 16 hexadecimal digits")
    toc_offset = int(digits, 16)
    compressed_bytes = blob_size - footer_bytes - toc_offset
    if compressed_bytes <= 0:
        raise ImageInvalid(
            f"{kind} footer: TOC offset {toc_offset} is not before the footer of {blob_size} bytes of blob"
        )
    _check_compressed(kind, compressed_bytes)
    return Footer(kind, toc_offset, compressed_bytes, None, footer_bytes, toc_offset)


def _parse_zstd(tail: bytes, blob_size: int) -> Footer:
    kind: FooterKind
    if tail[-8:] == _SGZ_MAGIC:
        kind, footer_bytes = "zstd-sgz", ZSTD_SGZ_FOOTER_BYTES
    else:
        kind, footer_bytes = "zstd-containers", ZSTD_CONTAINERS_FOOTER_BYTES
    room_end = blob_size - footer_bytes - SKIPPABLE_HEADER_BYTES
    if len(tail) < footer_bytes or room_end < 0:
        raise ImageInvalid(f"{kind} footer: cut short: blob of {blob_size} bytes")
    toc_offset, compressed_bytes, raw_bytes, manifest_type = struct.unpack_from(
        "<4Q", tail, len(tail) - footer_bytes
    )
    if manifest_type != _MANIFEST_TYPE_CRFS:
        raise ImageInvalid(f"{kind} footer: manifest type {manifest_type} is unknown")
    if toc_offset < SKIPPABLE_HEADER_BYTES or toc_offset + compressed_bytes > room_end:
        raise ImageInvalid(
            f"{kind} footer: TOC at {toc_offset} of {compressed_bytes} bytes is outside the blob"
        )
    if not compressed_bytes or not raw_bytes:
        raise ImageInvalid(f"{kind} footer: the TOC is empty")
    _check_compressed(kind, compressed_bytes)
    payload_end = toc_offset - SKIPPABLE_HEADER_BYTES
    return Footer(kind, toc_offset, compressed_bytes, raw_bytes, footer_bytes, payload_end)


def _check_compressed(kind: str, compressed_bytes: int) -> None:
    if compressed_bytes > MAX_TOC_COMPRESSED_BYTES:
        raise ImageInvalid(
            f"{kind} footer: TOC of {compressed_bytes} bytes is larger than {MAX_TOC_COMPRESSED_BYTES}",
            hint="the layer is damaged or has far too many files to be read lazily",
        )


def make_estargz_footer(toc_offset: int) -> bytes:
    """The 51 bytes that end an eStargz blob."""
    if not 0 <= toc_offset <= _MAX_OFFSET:
        raise ValueError(f"TOC offset {toc_offset} does not fit into 63 bits")
    return _GZIP_HEADER + _ESTARGZ_EXTRA + b"%016x" % toc_offset + _STARGZ_MAGIC + _GZIP_EMPTY_REST


def make_legacy_footer(toc_offset: int) -> bytes:
    """The 47 bytes that end a blob of the first stargz writer."""
    if not 0 <= toc_offset <= _MAX_OFFSET:
        raise ValueError(f"TOC offset {toc_offset} does not fit into 63 bits")
    return _GZIP_HEADER + _LEGACY_EXTRA + b"%016x" % toc_offset + _STARGZ_MAGIC + _GZIP_EMPTY_REST


def make_external_footer() -> bytes:
    """The 46 bytes that end a blob whose TOC is elsewhere."""
    return _GZIP_HEADER + _EXTERNAL_EXTRA + _GZIP_EMPTY_REST


def make_skippable_frame(content: bytes) -> bytes:
    """A zstd frame that decoders skip: header and `content`."""
    return struct.pack("<II", _SKIPPABLE_MAGIC, len(content)) + content


def make_zstd_sgz_footer(toc_offset: int, compressed_bytes: int, raw_bytes: int) -> bytes:
    """The 40 bytes of stargz-snapshotter's zstd:chunked footer, without the frame header that goes before
    them."""
    return struct.pack("<4Q8s", toc_offset, compressed_bytes, raw_bytes, _MANIFEST_TYPE_CRFS, _SGZ_MAGIC)


def make_zstd_containers_footer(
    toc_offset: int,
    compressed_bytes: int,
    raw_bytes: int,
    *,
    tar_split_offset: int = 0,
    tar_split_compressed_bytes: int = 0,
    tar_split_raw_bytes: int = 0,
) -> bytes:
    """The 64 bytes of containers' zstd:chunked footer, without the frame header that goes before them."""
    return struct.pack(
        "<7Q8s",
        toc_offset,
        compressed_bytes,
        raw_bytes,
        _MANIFEST_TYPE_CRFS,
        tar_split_offset,
        tar_split_compressed_bytes,
        tar_split_raw_bytes,
        _CONTAINERS_MAGIC,
    )
