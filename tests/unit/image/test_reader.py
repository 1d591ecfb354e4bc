"""Reading without a mount: the chunks a read asks for, and the bytes it gives."""

from __future__ import annotations

import hashlib

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.schedule import Priority
from p2pgz.errors import ChunkMissing, ImageNotFound, StateError
from p2pgz.image import reader
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.reader import ReadPlan, plan_read, read_file, read_whole
from p2pgz.image.treefile import TreeFile, build_tree

CHUNK_BYTES = 1000
SIZE = 4500


class Image:
    """One segment with two files; chunks become visible when they are asked for."""

    def __init__(self) -> None:
        self.contents = {
            name: bytes([65 + n]) * 10 + bytes(range(250)) * 18 for n, name in enumerate((b"a", b"b"))
        }
        entries = []
        for n, (name, data) in enumerate(self.contents.items()):
            chunks = []
            for at in range(0, SIZE, CHUNK_BYTES):
                piece = data[:SIZE][at : at + CHUNK_BYTES]
                chunks.append(
                    Chunk(hashlib.sha256(piece).digest(), at, len(piece), n * 9000 + at, n * 9000 + at + 1, 0)
                )
            entries.append(Entry(name=name, kind="reg", size=SIZE, chunks=tuple(chunks)))
        entries += [Entry(name=b"empty", kind="reg"), Entry(name=b"d", kind="dir")]
        toc = Toc(Digest.of(b"toc"), entries)
        layout = SegmentLayout.build(toc, compression="gzip")
        self.tree = TreeFile(build_tree(merge_layers([LayerInput(toc, layout.extents, toc.digest)])))
        self.table = SegmentTable(layout.to_bytes())
        self.segment = bytearray(layout.segment_bytes)
        self.asked: list[tuple[int, int, int, Priority]] = []
        self.failing = False

    def table_for(self, segment: int) -> SegmentTable:
        assert segment == 0
        return self.table

    async def ensure(self, segment: int, first: int, count: int, priority: Priority) -> None:
        if self.failing:
            raise ChunkMissing("nobody has it")
        self.asked.append((segment, first, count, priority))
        for n in range(first, first + count):
            name = b"a" if n < 5 else b"b"
            at = (n % 5) * CHUNK_BYTES
            start = self.table.segment_offset[n]
            self.segment[start : start + self.table.size[n]] = self.contents[name][:SIZE][
                at : at + CHUNK_BYTES
            ]

    def view(self, segment: int, offset: int, size: int) -> memoryview:
        return memoryview(self.segment)[offset : offset + size]

    async def read(self, name: bytes, offset: int, size: int) -> bytes:
        ino = self.tree.walk(name)
        return bytes(await read_file(self.tree, self.table_for, ino, offset, size, self.ensure, self.view))


@pytest.fixture
def image() -> Image:
    return Image()


@pytest.mark.parametrize(
    ("offset", "size", "first", "count"),
    [
        (0, 1, 5, 1),
        (0, 1000, 5, 1),
        (999, 2, 5, 2),
        (1000, 1000, 6, 1),
        (4499, 9, 9, 1),
        (0, 99_999, 5, 5),
        (4000, 500, 9, 1),
    ],
)
def test_plan_covers_the_read_and_no_more(
    image: Image, offset: int, size: int, first: int, count: int
) -> None:
    plan = plan_read(image.tree, image.table_for, image.tree.walk(b"b"), offset, size)
    assert plan == ReadPlan(0, 8192 + offset, min(size, SIZE - offset), first, count)


@pytest.mark.parametrize(
    ("name", "offset", "size"),
    [(b"a", SIZE, 1), (b"a", 0, 0), (b"a", -1, 5), (b"a", 0, -5), (b"empty", 0, 9), (b"d", 0, 9)],
)
def test_nothing_to_read(image: Image, name: bytes, offset: int, size: int) -> None:
    assert plan_read(image.tree, image.table_for, image.tree.walk(name), offset, size) is None


@pytest.mark.trio
async def test_bytes_are_the_files_own(image: Image) -> None:
    for name in (b"a", b"b"):
        for offset, size in [(0, 10), (995, 10), (4400, 1000), (0, SIZE), (SIZE, 1)]:
            assert await image.read(name, offset, size) == image.contents[name][:SIZE][offset : offset + size]
    assert await image.read(b"empty", 0, 10) == b""
    assert image.asked[1] == (0, 0, 2, Priority.BLOCKED_READ)


@pytest.mark.trio
async def test_failed_read_raises_and_the_next_one_tries_again(image: Image) -> None:
    image.failing = True
    with pytest.raises(ChunkMissing):
        await image.read(b"a", 0, 10)
    image.failing = False
    assert await image.read(b"a", 0, 2) == b"AA"


@pytest.mark.trio
async def test_whole_file_in_steps(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "STEP_BYTES", 2000)
    ino = image.tree.walk(b"b")
    pieces = [
        bytes(piece) async for piece in read_whole(image.tree, image.table_for, ino, image.ensure, image.view)
    ]
    assert [len(piece) for piece in pieces] == [2000, 2000, 500]
    assert b"".join(pieces) == image.contents[b"b"][:SIZE]
    with pytest.raises(ImageNotFound):
        async for _ in read_whole(
            image.tree, image.table_for, image.tree.walk(b"d"), image.ensure, image.view
        ):
            pass


def test_tree_that_belongs_to_another_segment_is_noticed(image: Image) -> None:
    toc = Toc(Digest.of(b"other"), [])
    other = SegmentTable(SegmentLayout.build(toc, compression="gzip").to_bytes())
    with pytest.raises(StateError, match="refers to what segment"):
        plan_read(image.tree, lambda segment: other, image.tree.walk(b"a"), 0, 1)
