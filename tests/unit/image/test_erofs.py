"""The EROFS writer: what a foreign checker says of its images, extremes, what it refuses. The kernel: tests/e2e/erofs."""

from __future__ import annotations

import random
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.errors import StateError
from p2pgz.image.erofs import watch_device, write_metadata
from p2pgz.image.erofsformat import SUPERBLOCK, SUPERBLOCK_OFFSET, encode_xattrs
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree
from tests.unit.image.test_treefile import SAMPLE

DIGEST = Digest.of(b"segment")
TERABYTE = 1 << 40


def tree_of(*entries: Entry, at: int = 0) -> TreeFile:
    extents = {n: (at + 4096 * n, n, 1) for n, entry in enumerate(entries) if entry.chunks}
    return TreeFile(build_tree(merge_layers([LayerInput(Toc(DIGEST, list(entries)), extents, DIGEST)])))


def sized(name: bytes, size: int) -> Entry:
    return Entry(name=name, kind="reg", size=size, chunks=(Chunk(b"x" * 32, 0, size, 0, 9, 0),))


def check(tree: TreeFile, folder: Path) -> str:
    """What fsck.erofs says."""
    (folder / "image").write_bytes(write_metadata(tree))
    devices = []
    for n in range(watch_device(tree)):
        path = folder / f"device{n}"
        path.touch()
        devices.append(f"--device={path}")
    done = subprocess.run(
        ["fsck.erofs", "-d3", *devices, str(folder / "image")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.tools("fsck.erofs")
def test_foreign_checker_finds_no_fault(tmp_path: Path) -> None:
    assert "No errors found" in check(tree_of(*SAMPLE), tmp_path)
    assert "No errors found" in check(tree_of(), tmp_path)


@pytest.mark.tools("fsck.erofs")
@pytest.mark.parametrize("seed", range(4))
def test_foreign_checker_finds_no_fault_in_random_trees(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    entries: list[Entry] = []
    folders = [b""]
    for n in range(3000):
        folder = choose.choice(folders[-40:])
        name = (
            folder
            + b"%d" % n
            + choose.randbytes(choose.randrange(1, 120)).replace(b"/", b"x").replace(b"\0", b"y")
        )
        kind = choose.choice(("dir", "reg", "symlink", "fifo", "char"))
        more: dict[str, object] = {}
        if choose.random() < 0.3:
            more["xattrs"] = {
                b"user.%d" % k: choose.randbytes(choose.choice((0, 3, 200, 5000)))
                for k in range(choose.randrange(1, 5))
            }
        if kind == "reg" and choose.random() < 0.8:
            more |= {"size": 5, "chunks": (Chunk(b"x" * 32, 0, 5, 0, 9, 0),)}
        elif kind == "symlink":
            more["link"] = b"t" * choose.choice((1, 60, 2000, 2100, 4090))
        elif kind == "dir":
            folders.append(name + b"/")
        entries.append(Entry(name=name, kind=kind, **more))  # type: ignore[arg-type]
    assert "No errors found" in check(tree_of(*entries), tmp_path)


@pytest.mark.tools("fsck.erofs")
def test_extremes(tmp_path: Path) -> None:
    entries = [Entry(name=b"many", kind="dir"), Entry(name=b"n" * 255, kind="dir")]
    entries += [Entry(name=b"many/%06d" % n, kind="fifo") for n in range(20_000)]
    entries += [Entry(name=b"n" * 255 + b"/" + b"%03d" % n + b"m" * 252, kind="fifo") for n in range(100)]
    entries += [sized(b"terabyte", TERABYTE), sized(b"nine terabytes", 9 * TERABYTE)]
    entries.append(Entry(name=b"attributes", kind="fifo", xattrs={b"user.a": b"v" * 65_535, b"user.b": b"w"}))
    assert "No errors found" in check(tree_of(*entries), tmp_path)


def test_root_has_the_trees_number_and_file_system_the_images_size() -> None:
    entries = [sized(b"%d" % n, 1 << 20) for n in range(50)]
    tree = tree_of(*entries)
    image = bytes(write_metadata(tree))
    fields = SUPERBLOCK.unpack_from(image, SUPERBLOCK_OFFSET)
    root_nid, inodes, blocks = fields[5], fields[6], fields[9]
    assert (root_nid, inodes, blocks * 4096) == (1, 51, len(image))
    (watch_blocks,) = struct.unpack_from("<I", image, 1152 + 128 + 64)
    assert (blocks + watch_blocks) * 4096 == 50 << 20


def test_same_tree_gives_the_same_bytes() -> None:
    assert write_metadata(tree_of(*SAMPLE)) == write_metadata(tree_of(*SAMPLE))


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (tree_of(sized(b"beyond", 100), at=16 * TERABYTE), "beyond what EROFS addresses"),
        (tree_of(sized(b"too long", 17 * TERABYTE)), "beyond what EROFS addresses"),
        (tree_of(Entry(name=b"a", kind="fifo", xattrs={b"user.a": b"v" * 65_536})), "does not fit"),
        (tree_of(Entry(name=b"a", kind="fifo", xattrs={b"system.other": b"v"})), "of no kind"),
        (tree_of(Entry(name=b"a", kind="fifo", xattrs={b"user.": b"v"})), "of no kind"),
        (
            tree_of(Entry(name=b"a", kind="fifo", xattrs={b"user.%d" % n: b"v" * 65_000 for n in range(5)})),
            "do not fit",
        ),
    ],
)
def test_what_erofs_cannot_express_is_refused(tree: TreeFile, text: str) -> None:
    with pytest.raises(StateError, match=text):
        write_metadata(tree)


def test_last_addressable_block_is_still_taken() -> None:
    write_metadata(tree_of(sized(b"last", 4096), at=(0xFFFF_FFFE) * 4096))
    with pytest.raises(StateError):  # that number means "hole"
        write_metadata(tree_of(sized(b"last", 4096), at=0xFFFF_FFFF * 4096))


def test_attribute_names_are_split_at_the_prefixes_of_the_kernel() -> None:
    encoded = encode_xattrs({b"system.posix_acl_access": b"acl", b"trusted.overlay.opaque": b"y"})
    assert encoded[12:] == b"\x00\x02\x03\x00acl\0" + b"\x0e\x04\x01\x00overlay.opaquey\0"
    assert encode_xattrs({}) == b""


def test_types_of_names_are_right() -> None:
    tree = tree_of(*SAMPLE)
    image = bytes(write_metadata(tree))
    at = 4096 + 32
    _, count, mode, _, size, *_ = struct.unpack_from("<HHHHQ", image, at)
    assert (count, stat.S_ISDIR(mode)) == (0, True)
    names = image[at + 64 : at + 64 + size]
    first = struct.unpack_from("<QHBB", names)
    entries = [struct.unpack_from("<QHBB", names, n) for n in range(0, first[1], 12)]
    ends = [entry[1] for entry in entries[1:]] + [size]
    found = {names[entry[1] : end]: entry[2] for entry, end in zip(entries, ends, strict=True)}
    assert found == {b".": 2, b"..": 2, b"abs": 7, b"d": 2, b"empty": 1, b"here": 7, b"loop": 7, b"out": 7}
