"""The tree file's reader: every question, and what it does with damaged files."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.errors import ImageNotFound, StateError
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import Extent, Inode, TreeFile, build_tree
from p2pgz.image.treeformat import HEADER

DIGEST = Digest.of(b"segment")


def build(*entries: Entry) -> bytes:
    extents = {n: (4096 * n, n, 1) for n, entry in enumerate(entries) if entry.chunks}
    return build_tree(merge_layers([LayerInput(Toc(DIGEST, list(entries)), extents, DIGEST)]), info=b"info")


def entry(name: str, kind: str = "fifo", **more) -> Entry:
    return Entry(name=name.encode(), kind=kind, **more)


SAMPLE = (
    entry("d", "dir", mode=0o1750, uid=2**32 - 2, gid=5, mtime=-1, mtime_nsec=500_000_000),
    entry("d/f", "reg", mode=0o4755, size=3, mtime=2**33, chunks=(Chunk(b"x" * 32, 0, 3, 0, 9, 0),)),
    entry("d/link", "symlink", mode=0o777, link=b"../up/\xff"),
    entry("d/null", "char", mode=0o666, dev_major=1, dev_minor=3, xattrs={b"user.b": b"", b"user.a": b"\0x"}),
    entry("d/same", "block", xattrs={b"user.a": b"\0x", b"user.b": b""}),
    entry("d/again", "hardlink", link=b"d/f"),
    entry("abs", "symlink", link=b"/d/f"),
    entry("here", "symlink", link=b"d/."),
    entry("out", "symlink", link=b"../../../d"),
    entry("loop", "symlink", link=b"loop"),
    entry("empty", "reg"),
)


@pytest.fixture
def tree() -> TreeFile:
    return TreeFile(build(*SAMPLE))


def test_attributes(tree: TreeFile) -> None:
    assert tree.inode(tree.walk(b"d")) == Inode(0o41750, 2**32 - 2, 5, 2, 0, 4096, -500_000_000)
    assert tree.inode(tree.walk(b"d/f")) == Inode(0o104755, 0, 0, 2, 0, 3, 2**33 * 10**9)
    assert tree.inode(tree.walk(b"d/null")) == Inode(0o20666, 0, 0, 1, os.makedev(1, 3), 0, 0)
    assert tree.inode(tree.walk(b"d/link", follow=False)).size == 7
    assert (tree.total_bytes, tree.segments, tree.info) == (3, [DIGEST], b"info")
    assert tree.inode_count == 11


def test_texts_and_places(tree: TreeFile) -> None:
    assert tree.readlink(tree.walk(b"d/link", follow=False)) == b"../up/\xff"
    assert tree.readlink(tree.walk(b"d")) == b""
    for name in (b"d/null", b"d/same"):
        assert tree.xattrs(tree.walk(name)) == {b"user.a": b"\0x", b"user.b": b""}
    assert tree.xattrs(1) == {}
    assert tree.extent(tree.walk(b"d/f")) == Extent(0, 4096, 1, 1)
    for name in (b"d", b"empty", b"d/null", b"abs/../link"):
        assert (
            tree.extent(tree.walk(name, follow=False) if b".." not in name else tree.walk(b"empty")) is None
        )


def test_names_of_a_directory_come_in_byte_order_and_can_be_continued(tree: TreeFile) -> None:
    d = tree.walk(b"d")
    rows = list(tree.entries(d, 0))
    assert [name for name, _, _ in rows] == [b"again", b"f", b"link", b"null", b"same"]
    for position, (name, ino, following) in enumerate(rows):
        assert list(tree.entries(d, following)) == rows[position + 1 :]
        assert tree.lookup(d, name) == ino
        assert tree.parent(ino) == d
    assert list(tree.entries(tree.walk(b"empty"), 0)) == []
    assert list(tree.entries(d, 99)) == []
    assert tree.parent(d) == tree.parent(1) == 1


@pytest.mark.parametrize(
    "name", [b"", b"x", b"d\0", b"da", b"d/f", b"empt", b"empty ", b"empty\0\0\0", b"\xff" * 300]
)
def test_absent_names(tree: TreeFile, name: bytes) -> None:
    assert tree.lookup(1, name) == 0
    assert tree.lookup(tree.walk(b"d/null"), name) == 0


def test_names_that_share_their_beginning() -> None:
    names = [f"prefix--{n}" for n in range(0, 2000, 2)] + ["prefix--", "prefix-", "zzzzzzzz", "zzzzzzzz1"]
    tree = TreeFile(build(*[entry(name) for name in names]))
    for name, ino, _ in tree.entries(1, 0):
        assert tree.lookup(1, name) == ino
    for name in [f"prefix--{n}" for n in range(1, 2000, 2)] + [
        "prefix--~",
        "prefix",
        "zzzzzzzz0",
        "zzzzzzzz2",
    ]:
        assert tree.lookup(1, name.encode()) == 0


def test_paths_stay_inside(tree: TreeFile) -> None:
    file = tree.walk(b"d/f")
    for path in (
        b"/d/f",
        b"//d/./f",
        b"../../d/f",
        b"abs",
        b"here/f",
        b"out/f",
        b"d/../d/again",
        b"here/../d/f",
    ):
        assert tree.walk(path) == file
    assert tree.walk(b"") == tree.walk(b"/") == tree.walk(b"..") == 1
    assert tree.walk(b"abs", follow=False) == tree.lookup(1, b"abs")
    assert tree.walk(b"out/", follow=False) == tree.walk(b"d")


@pytest.mark.parametrize(
    "path", [b"no", b"d/no", b"d/f/", b"d/f/x", b"d/f/..", b"loop", b"loop/x", b"d/link", b"d/link/x"]
)
def test_paths_that_lead_nowhere(tree: TreeFile, path: bytes) -> None:
    with pytest.raises(ImageNotFound):
        tree.walk(path)


@pytest.mark.parametrize("ino", [0, -1, 12, 2**32])
def test_unknown_inodes_are_the_callers_mistake(tree: TreeFile, ino: int) -> None:
    for question in (tree.inode, tree.parent, tree.readlink, tree.xattrs, tree.extent):
        with pytest.raises(IndexError):
            question(ino)
    with pytest.raises(IndexError):
        tree.lookup(ino, b"d")


def test_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.write_bytes(build(*SAMPLE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        tree = TreeFile(mapped)
        assert tree.walk(b"here/f") == tree.lookup(tree.walk(b"d"), b"f")
        del tree


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, -1])
def test_cut_files_are_refused_at_once(length: int) -> None:
    with pytest.raises(StateError):
        TreeFile(build(*SAMPLE)[:length])


def test_longer_file_and_other_version_are_refused() -> None:
    data = build(*SAMPLE)
    with pytest.raises(StateError, match="bytes instead of"):
        TreeFile(data + b"\0")
    with pytest.raises(StateError, match="version"):
        TreeFile(data[:7] + b"\x7f" + data[8:])


def ask_everything(data: bytes) -> None:
    tree = TreeFile(data)
    for ino in range(1, tree.inode_count + 1):
        tree.inode(ino)
        tree.parent(ino)
        tree.readlink(ino)
        tree.xattrs(ino)
        tree.extent(ino)
        for name, child, _ in tree.entries(ino, 0):
            tree.lookup(ino, name)
            tree.inode(child)
    for path in (b"d/f", b"here/f", b"abs", b"loop"):
        tree.walk(path)


def test_damaged_files_give_answers_or_the_named_errors() -> None:
    data = build(*SAMPLE)
    seed = 20260101
    randomness = random.Random(seed)
    print("seed", seed)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << randomness.randrange(8)
        with contextlib.suppress(StateError, ImageNotFound):
            ask_everything(bytes(damaged))
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(randomness.randrange(1, 8)):
            damaged[randomness.randrange(HEADER.size, len(data))] = randomness.randrange(256)
        with contextlib.suppress(StateError, ImageNotFound):
            ask_everything(bytes(damaged))
