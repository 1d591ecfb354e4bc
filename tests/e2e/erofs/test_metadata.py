"""The kernel's view of EROFS metadata that we wrote: every vector, extremes, and the same tree in tree mode."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.image.erofs import watch_device, write_metadata
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree
from p2pgz.mount.attach import move_mount
from p2pgz.mount.erofs_mount import make_detached_erofs
from tests.unit.image.test_vectors import (
    EDGES,
    FLAVOURS,
    VECTORS,
    index,
    layer_files,
    make_tree,
    read_toc,
    through_the_link,
)

pytestmark = pytest.mark.root


@contextmanager
def shown(tree: TreeFile, folder: Path) -> Iterator[Path]:
    """The tree as the kernel shows it; files hold zeros."""
    metadata, root = folder / "image.erofs", folder / "root"
    metadata.write_bytes(write_metadata(tree))
    devices = []
    for n in range(watch_device(tree)):
        devices.append(folder / f"device{n}")
        with devices[-1].open("wb") as file:
            file.truncate(1 << 43)  # ext4 takes no larger one
    root.mkdir()
    mount = make_detached_erofs(metadata, devices, suid=True, dev=True)
    move_mount(mount.mount_fd, root)
    os.close(mount.mount_fd)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


def differences(entries: list[dict], root: Path) -> list[object]:
    spec = importlib.util.spec_from_file_location("check", VECTORS / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check(entries, root, ignore={"content"})


@pytest.mark.parametrize("vector", index(), ids=lambda vector: vector["name"])
def test_layer_is_what_the_reference_shows(vector: dict, tmp_path: Path) -> None:
    expected = json.loads((VECTORS / vector["expected"]).read_text())
    external = VECTORS / "blobs" / f"{vector['name']}.toc.tar.gz"
    toc = read_toc(
        (VECTORS / vector["file"]).read_bytes(), external.read_bytes() if external.exists() else None
    )
    lists = ("entries_toc", "entries") if expected["use"] == "either" else (expected["use"],)
    with shown(make_tree(toc)[0], tmp_path) as root:
        assert min([differences(expected[key], root) for key in lists], key=len) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_image_is_what_the_specification_says(flavour: str, tmp_path: Path) -> None:
    expected = json.loads((VECTORS / "expected" / f"image-{flavour}.json").read_text())
    tree, _ = make_tree(*[read_toc(blob) for blob in layer_files(VECTORS / "image", flavour)])
    lists = [expected[key] for key in ("entries", "entries_toc") if key in expected]
    with shown(tree, tmp_path) as root:
        assert min([differences(entries, root) for entries in lists], key=len) == []


@pytest.mark.parametrize("question", EDGES)
def test_layers_on_which_tools_disagree(question: str, tmp_path: Path) -> None:
    entries = EDGES[question]["by_spec_rules"]
    if question == "through-symlink":
        entries = through_the_link(entries)
    tree, _ = make_tree(*[read_toc(blob) for blob in layer_files(VECTORS / "image-edge", question)])
    with shown(tree, tmp_path) as root:
        assert differences(entries, root) == []


def test_extremes(tmp_path: Path) -> None:
    """200 000 names in one directory, names of 255 bytes, a file of 1 TiB, 300 devices."""
    entries = [Entry(name=b"many", kind="dir"), Entry(name=b"n" * 255, kind="dir")]
    entries += [Entry(name=b"many/%06d-%s" % (n, b"x" * (n % 50)), kind="fifo") for n in range(200_000)]
    entries += [Entry(name=b"n" * 255 + b"/" + b"%03d" % n + b"m" * 252, kind="fifo") for n in range(300)]
    size = (1 << 40) + 5
    big = Entry(name=b"terabyte", kind="reg", size=size, chunks=(Chunk(b"x" * 32, 0, size, 0, 9, 0),))
    value = b"v" * 65_535
    entries.append(Entry(name=b"attributes", kind="reg", xattrs={b"user.a": value, b"user.b": b"w"}))
    entries.append(Entry(name=b"link", kind="symlink", link=b"l" * 4095))
    layers = [LayerInput(Toc(Digest.of(b"l"), [*entries, big]), {len(entries): (0, 0, 1)}, Digest.of(b"l"))]
    for n in range(300):
        chunk = Chunk(Digest.of(b"%d" % n).raw, 0, 5, 0, 9, 0)
        entry = Entry(name=b"device-%d" % n, kind="reg", size=5, chunks=(chunk,))
        digest = Digest.of(b"layer %d" % n)
        layers.append(LayerInput(Toc(digest, [entry]), {0: (4096 * n, 0, 1)}, digest))
    tree = TreeFile(build_tree(merge_layers(layers)))
    assert watch_device(tree) == 302
    with shown(tree, tmp_path) as root:
        found = os.listdir(root / "many")
        assert len(found) == len(set(found)) == 200_000
        for name in found[::5000]:
            assert (root / "many" / name).is_fifo()
        assert not (root / "many" / "100000-").exists() or "100000-" in found
        assert len(os.listdir(os.fsencode(root) + b"/" + b"n" * 255)) == 300
        assert (root / ("n" * 255) / ("150" + "m" * 252)).is_fifo()
        assert (root / "terabyte").stat().st_size == size
        with (root / "terabyte").open("rb") as file:
            file.seek(size - 5)
            assert file.read() == bytes(5)
        assert os.getxattr(root / "attributes", "user.a") == value
        assert os.getxattr(root / "attributes", "user.b") == b"w"
        assert os.readlink(root / "link") == "l" * 4095
        for n in range(300):
            # each device file has its number at the place of its file
            with (tmp_path / f"device{tree.extent(tree.walk(b'device-%d' % n)).segment}").open("r+b") as file:  # type: ignore[union-attr]
                file.seek(4096 * n)
                file.write(b"%05d" % n)
        for n in range(300):
            assert (root / f"device-{n}").read_bytes() == b"%05d" % n
