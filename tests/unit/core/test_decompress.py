"""Decompressing whole layers: every vector, cuts, bombs, and what stands between members and frames."""

import bz2
import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path

import pytest
import zstandard

from p2pgz.core.decompress import MAX_PIECE_BYTES, Decompressor, detect
from p2pgz.errors import ImageInvalid
from p2pgz.testing.vectors import expected_document

VECTORS = Path(__file__).parents[2] / "vectors"
BLOBS = sorted(
    path.stem
    for path in (VECTORS / "expected").glob("*.*.json")
    if "diff_id" in path.read_text() and "big" not in path.stem
)


def decompress(blob: bytes, feed_bytes: int = 1 << 16) -> bytes:
    stream = Decompressor()
    pieces: list[bytes] = []
    for at in range(0, len(blob), feed_bytes):
        pieces += stream.feed(blob[at : at + feed_bytes])
    pieces += stream.finish()
    assert all(0 < len(piece) <= MAX_PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("name", BLOBS)
def test_every_vector_gives_its_diff_id(name: str) -> None:
    document = expected_document(VECTORS / "expected" / f"{name}.json")
    stream = decompress((VECTORS / document["blob"]).read_bytes())
    assert f"sha256:{hashlib.sha256(stream).hexdigest()}" == document["diff_id"]


@pytest.mark.parametrize(
    "name",
    [
        "empty.gz.tar.gz",
        "links.zstm.tar.zst",
        "hlorder.gz.tar.gz",
        "hlorder.zst.tar.zst",
        "basic.zstm.tar.zst",
    ],
)
def test_byte_by_byte_is_the_same_as_whole(name: str) -> None:
    path = VECTORS / "blobs" / name
    if path.exists():
        blob = path.read_bytes()
        assert decompress(blob, 1) == decompress(blob, len(blob))


@pytest.mark.parametrize(
    "blob", [gzip.compress(os.urandom(3000)), zstandard.compress(os.urandom(3000)), gzip.compress(b"") * 2]
)
def test_cut_anywhere_is_refused_or_a_whole_member(blob: bytes) -> None:
    half = len(blob) // 2
    for end in [*range(1, min(len(blob), 40)), *range(40, len(blob), 101), len(blob) - 1]:
        if end == half and blob[:half] == blob[half:]:
            continue
        if detect(blob[:end]) == "none":
            continue
        with pytest.raises(ImageInvalid):
            decompress(blob[:end])


def test_short_and_empty_blobs_are_plain() -> None:
    assert decompress(b"") == b""
    assert decompress(b"ab") == b"ab"
    assert decompress(b"abc" * 2_000_000, 1 << 23) == b"abc" * 2_000_000


@pytest.mark.parametrize("head", [b"\x1f\x8b", b"\x1f\x8b\x08"])
def test_blob_of_only_a_magic_is_cut(head: bytes) -> None:
    with pytest.raises(ImageInvalid, match="cut short"):
        decompress(head)


def test_zero_bytes_may_follow_gzip_and_nothing_else_may() -> None:
    blob = gzip.compress(b"abc")
    assert decompress(blob + bytes(100_000), 7) == b"abc"
    for tail in (b"x", bytes(10) + b"x", bytes(10) + blob):
        with pytest.raises(ImageInvalid):
            decompress(blob + tail)


def test_skippable_frames_anywhere() -> None:
    skip = struct.pack("<II", 0x184D2A53, 5) + b"12345"
    nothing = struct.pack("<II", 0x184D2A5F, 0)
    frame = zstandard.compress(b"abc")
    checksummed = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(b"def")
    for feed_bytes in (1, 1000):
        assert decompress(skip + nothing + frame + skip + checksummed + nothing, feed_bytes) == b"abcdef"
    with pytest.raises(ImageInvalid, match="cut short"):
        decompress(skip[:-1])
    with pytest.raises(ImageInvalid, match="after the end"):
        decompress(frame + b"junk")


def frame_of(*blocks: bytes, descriptor: int = 0x20, rest: bytes = b"\x05") -> bytes:
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + rest + b"".join(blocks)


def block(kind: int, size: int, body: bytes, *, last: bool = False) -> bytes:
    return struct.pack("<I", last | kind << 1 | size << 3)[:3] + body


def test_block_kinds() -> None:
    assert (
        decompress(frame_of(block(0, 2, b"ab"), block(1, 3, b"c"), block(0, 0, b"", last=True))) == b"abccc"
    )
    for wrong in (
        frame_of(block(3, 1, b"a", last=True)),
        frame_of(block(0, (128 << 10) + 1, b"a", last=True)),
        frame_of(block(2, 4, b"junk", last=True)),
        frame_of(block(0, 5, b"abcde", last=True), descriptor=0x21, rest=b"\x07\x05"),
        frame_of(block(0, 5, b"abcde", last=True), descriptor=0x00, rest=b"\xf8"),
    ):
        with pytest.raises(ImageInvalid):
            decompress(wrong)


@pytest.mark.parametrize(
    "compress", [lambda data: gzip.compress(data, 1), zstandard.compress], ids=["gzip", "zstd"]
)
def test_bombs_come_out_in_bounded_pieces(compress: object) -> None:
    stream = Decompressor()
    blob = compress(bytes(64 << 20))
    sizes = [len(piece) for piece in stream.feed(blob)] + [len(piece) for piece in stream.finish()]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= MAX_PIECE_BYTES


def test_damage_is_named() -> None:
    blob = bytearray(gzip.compress(os.urandom(5000)))
    blob[-6] ^= 1
    with pytest.raises(ImageInvalid, match="gzip"):
        decompress(bytes(blob))
    blob[3] = 0xFF
    with pytest.raises(ImageInvalid):
        decompress(bytes(blob))


def test_other_compressions_are_taken_for_plain() -> None:
    assert detect(bz2.compress(b"x")) == "none"
    assert [detect(bytes([byte]) + b"\x2a\x4d\x18") for byte in (0x4F, 0x50, 0x5F, 0x60)] == [
        "none",
        "zstd",
        "zstd",
        "none",
    ]


def test_output_left_inside_after_the_last_input_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pgz.core.decompress.MAX_PIECE_BYTES", 16)
    for size in (15, 16, 17, 1000, 4096):
        for feed_bytes in (1, 7, 1 << 16):
            stream = Decompressor()
            blob = gzip.compress(bytes(size)) + gzip.compress(b"end")
            pieces = [
                piece
                for at in range(0, len(blob), feed_bytes)
                for piece in stream.feed(blob[at : at + feed_bytes])
            ]
            pieces += stream.finish()
            assert b"".join(pieces) == bytes(size) + b"end"
            assert max(map(len, pieces)) <= 16


def _odd_members() -> list[bytes]:
    """Members whose headers gzip(1) and others write, but no writer of layers: one flag each, and all."""
    body = os.urandom(700) + b"x" * 700
    raw = zlib.compressobj(wbits=-15)
    packed = raw.compress(body) + raw.flush() + struct.pack("<II", zlib.crc32(body), len(body))
    members = []
    for flags in (0, 1, 2, 4, 8, 16, 24, 30, 31):
        header = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\x00\xff"
        header += b"\x06\0ab\x02\0cd" if flags & 4 else b""
        header += b"some name\0" if flags & 8 else b""
        header += b"a comment\0" if flags & 16 else b""
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) if flags & 2 else b""
        members.append(header + packed)
    return members


@pytest.mark.parametrize("feed_bytes", [1, 2, 3, 5, 11, 13, 17, 64, 1 << 20])
def test_headers_with_name_comment_and_checksum_may_come_in_pieces(feed_bytes: int) -> None:
    members = _odd_members()
    expected = [gzip.decompress(member) for member in members]
    assert [decompress(member, feed_bytes) for member in members] == expected
    assert decompress(b"".join(members) + bytes(700), feed_bytes) == b"".join(expected)


@pytest.mark.parametrize("rest", [b"\x1f", b"\x1f\x8b\x08", b"?"])
def test_first_bytes_of_another_member_are_a_cut_stream(rest: bytes) -> None:
    with pytest.raises(ImageInvalid):
        decompress(gzip.compress(b"one") + rest)
