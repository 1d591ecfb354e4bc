import hashlib
import struct

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.layout import FileExtent, SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, ChunkKind, Entry, Piece, Toc
from p2pgz.errors import StateError

ID = Digest.of(b"toc")


def chunk(n: int, size: int, offset: int, *, at: int = 0, **more: object) -> Chunk:
    digest = hashlib.sha256(str(n).encode()).digest()
    return Chunk(digest, at, size, offset, offset + 100, more.pop("inner", 0), **more)


def reg(name: str, *chunks: Chunk) -> Entry:
    return Entry(name.encode(), "reg", size=sum(c.size for c in chunks), chunks=chunks)


TOC = Toc(
    ID,
    [
        Entry(b"d", "dir"),
        reg("late", chunk(0, 4097, 500), chunk(1, 3, 600, at=4097)),
        reg("empty"),
        reg("first", chunk(2, 1, 100, inner=7)),
        reg("zeros", chunk(3, 5000, 200, kind=ChunkKind.ZEROS)),
        reg("before", chunk(4, 4096, 100)),
        reg("whole", chunk(5, 30, 700, more=(Piece(800, 900, 0, 10), Piece(900, 950, 2, 5)))),
        reg("again", chunk(6, 1, 100, inner=7)),
    ],
)


def test_files_lie_in_blob_order_on_pages_of_their_own() -> None:
    layout = SegmentLayout.build(TOC, compression="gzip")
    assert layout.extents == {
        5: FileExtent(0, 4, 1),
        3: FileExtent(4096, 2, 1),
        7: FileExtent(8192, 6, 1),
        4: FileExtent(12288, 3, 1),
        1: FileExtent(20480, 0, 2),
        6: FileExtent(28672, 5, 1),
    }
    assert layout.segment_bytes == 32768


def test_layout_depends_on_the_toc_only() -> None:
    first = SegmentLayout.build(TOC, compression="zstd").to_bytes()
    assert SegmentLayout.build(TOC, compression="zstd").to_bytes() == first


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_table_says_what_the_toc_said(compression: str) -> None:
    layout = SegmentLayout.build(TOC, compression=compression)
    table = SegmentTable(bytearray(layout.to_bytes()))
    assert (table.id, table.compression, table.segment_bytes) == (ID, compression, layout.segment_bytes)
    chunks = [(index, c) for index, entry in enumerate(TOC.entries) for c in entry.chunks]
    assert table.chunk_count == len(chunks) == len(table.size)
    for n, (index, c) in enumerate(chunks):
        assert table.segment_offset[n] == layout.extents[index].segment_offset + c.file_offset
        row = (table.size[n], table.blob_offset[n], table.blob_end[n], table.inner[n], table.kind[n])
        assert row == (c.size, c.offset, c.end, c.inner, c.kind)
        assert (table.digest(n), table.pieces(n)) == (c.digest, c.pieces())


def test_numbers_of_no_chunk() -> None:
    table = SegmentTable(SegmentLayout.build(TOC, compression="gzip").to_bytes())
    for n in (-1, table.chunk_count):
        with pytest.raises(IndexError):
            table.digest(n)


def test_empty_layer() -> None:
    layout = SegmentLayout.build(Toc(ID, []), compression="gzip")
    table = SegmentTable(layout.to_bytes())
    assert (table.chunk_count, table.segment_bytes, layout.extents) == (0, 0, {})


def test_malformed_tables_are_refused() -> None:
    good = SegmentLayout.build(TOC, compression="gzip").to_bytes()
    other_version = bytes([*good[:7], good[7] + 1, *good[8:]])
    other_compression = good[:8] + struct.pack("=Q", 3) + good[16:]
    too_many = good[:16] + struct.pack("=Q", 1 << 60) + good[24:]
    for bad in (
        b"",
        good[:10],
        good[:-1],
        good + b"\0",
        other_version,
        other_compression,
        too_many,
        good[::-1],
    ):
        with pytest.raises(StateError, match="segment table"):
            SegmentTable(bad)


def test_find_by_digest() -> None:
    table = SegmentTable(SegmentLayout.build(TOC, compression="gzip").to_bytes())
    for n in range(table.chunk_count):
        assert table.find(table.digest(n)) == n
    assert table.find(bytes(32)) is None
    # the bytes of two digests hold others that are no chunk's
    assert table.find(table.digest(0)[16:] + table.digest(1)[:16]) is None
