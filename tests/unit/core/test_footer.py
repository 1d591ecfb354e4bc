import struct

import pytest

from p2pgz.core import footer as f
from p2pgz.errors import ImageInvalid

BLOB_BYTES = 1000


def blob_with(footer: bytes) -> bytes:
    return b"\0" * (BLOB_BYTES - len(footer)) + footer


@pytest.mark.parametrize(
    ("made", "kind", "size", "toc_offset", "payload_end"),
    [
        (f.make_estargz_footer(700), "estargz", 51, 700, 700),
        (f.make_legacy_footer(700), "stargz", 47, 700, 700),
        (f.make_external_footer(), "external", 46, -1, 954),
        (f.make_zstd_sgz_footer(700, 100, 400), "zstd-sgz", 40, 700, 692),
        (f.make_zstd_containers_footer(700, 100, 400), "zstd-containers", 64, 700, 692),
    ],
)
def test_what_is_made_is_parsed(made: bytes, kind: str, size: int, toc_offset: int, payload_end: int) -> None:
    blob = blob_with(made)
    footer = f.parse_footer(blob[-f.TAIL_BYTES :], BLOB_BYTES)
    assert footer is not None
    assert (footer.kind, footer.footer_bytes, len(made)) == (kind, size, size)
    assert (footer.toc_offset, footer.payload_end) == (toc_offset, payload_end)
    assert footer.compression == ("zstd" if kind.startswith("zstd") else "gzip")
    # the footer alone is enough
    assert f.parse_footer(made, BLOB_BYTES) == footer


def test_lengths() -> None:
    gzip = f.parse_footer(f.make_estargz_footer(700), BLOB_BYTES)
    assert gzip is not None
    assert (gzip.toc_compressed_bytes, gzip.toc_raw_bytes) == (249, None)
    zstd = f.parse_footer(f.make_zstd_sgz_footer(700, 100, 400), BLOB_BYTES)
    assert zstd is not None
    assert (zstd.toc_compressed_bytes, zstd.toc_raw_bytes) == (100, 400)


@pytest.mark.parametrize("tail", [b"", b"\0" * 64, f.make_estargz_footer(7)[1:], b"GnUlInU", b"STARGZ"])
def test_no_footer(tail: bytes) -> None:
    assert f.parse_footer(tail, 100) is None


@pytest.mark.parametrize(
    "made", [f.make_estargz_footer(0), f.make_legacy_footer(0), f.make_external_footer()]
)
def test_every_byte_of_the_header_counts(made: bytes) -> None:
    for at in [0, 1, 2, 3, *range(10, 16 if len(made) == 51 else 12 if len(made) == 47 else 33)]:
        damaged = bytearray(made)
        damaged[at] ^= 1
        assert f.parse_footer(bytes(damaged), BLOB_BYTES) is None


@pytest.mark.parametrize(
    "digits", [b"-00000000000007f", b"0x000000000000ff", b" 00000000000000f", b"0000_0000_0000_0"]
)
def test_only_hexadecimal_digits(digits: bytes) -> None:
    made = f.make_estargz_footer(0)
    with pytest.raises(ImageInvalid, match="hexadecimal"):
        f.parse_footer(made[:16] + digits + made[32:], BLOB_BYTES)


@pytest.mark.parametrize("toc_offset", [949, 950, 1 << 62, (1 << 63) - 1])
def test_toc_must_lie_before_the_footer(toc_offset: int) -> None:
    assert f.parse_footer(f.make_estargz_footer(948), BLOB_BYTES) is not None
    with pytest.raises(ImageInvalid, match="not before the footer"):
        f.parse_footer(f.make_estargz_footer(toc_offset), BLOB_BYTES)


@pytest.mark.parametrize(
    ("toc_offset", "compressed_bytes", "raw_bytes"),
    [
        (7, 1, 1),
        (0, 1, 1),
        (700, 253, 1),
        (952, 1, 1),
        (700, 0, 1),
        (700, 1, 0),
        (1 << 63, 1, 1),
        (8, (1 << 64) - 8, 1),
    ],
)
def test_zstd_toc_must_lie_in_the_blob(toc_offset: int, compressed_bytes: int, raw_bytes: int) -> None:
    with pytest.raises(ImageInvalid):
        f.parse_footer(f.make_zstd_sgz_footer(toc_offset, compressed_bytes, raw_bytes), BLOB_BYTES)


def test_zstd_limits_are_exact() -> None:
    assert f.parse_footer(f.make_zstd_sgz_footer(8, 944, 1), BLOB_BYTES) is not None
    assert f.parse_footer(f.make_zstd_containers_footer(8, 920, 1), BLOB_BYTES) is not None
    with pytest.raises(ImageInvalid, match="outside"):
        f.parse_footer(f.make_zstd_containers_footer(8, 921, 1), BLOB_BYTES)


def test_zstd_footer_cut_short() -> None:
    with pytest.raises(ImageInvalid, match="cut short"):
        f.parse_footer(f.make_zstd_containers_footer(8, 1, 1)[-40:], BLOB_BYTES)
    with pytest.raises(ImageInvalid, match="cut short"):
        f.parse_footer(f.make_zstd_sgz_footer(8, 1, 1), 40)


def test_unknown_manifest_type() -> None:
    made = bytearray(f.make_zstd_sgz_footer(8, 1, 1))
    made[24:32] = struct.pack("<Q", 2)
    with pytest.raises(ImageInvalid, match="type 2"):
        f.parse_footer(bytes(made), BLOB_BYTES)


def test_footer_cannot_make_us_download_without_end() -> None:
    blob_size = 10 << 30
    with pytest.raises(ImageInvalid, match="larger than"):
        f.parse_footer(f.make_estargz_footer(100), blob_size)
    with pytest.raises(ImageInvalid, match="larger than"):
        f.parse_footer(f.make_zstd_sgz_footer(100, 5 << 30, 100), blob_size)


@pytest.mark.parametrize("make", [f.make_estargz_footer, f.make_legacy_footer])
@pytest.mark.parametrize("toc_offset", [-1, 1 << 63])
def test_offsets_that_cannot_be_written(make, toc_offset: int) -> None:
    with pytest.raises(ValueError, match="63 bits"):
        make(toc_offset)


def test_skippable_frame() -> None:
    assert f.make_skippable_frame(b"abc") == b"\x50\x2a\x4d\x18\x03\0\0\0abc"
