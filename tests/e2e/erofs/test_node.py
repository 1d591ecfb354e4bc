"""Erofs mode as users get it: chosen by the node, the same tree as in tree mode, native when complete, across nodes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.e2e.cli.conftest import disk, home, make_p2pgz, p2pgz  # noqa: F401
from tests.e2e.cli.layouts import Layout
from tests.e2e.cli.running import P2pgz, mounted, mounted_at, umount, until
from tests.e2e.trees import differences

pytestmark = pytest.mark.root

UNMOUNTABLE = 14
FILES = {f"f{n}": random.Random(n).randbytes(300_000 + n) for n in range(8)}
RESULT = "erofs-self-test.json"


def make_layer(**attributes: str) -> bytes:
    """A plain tar with a bit of everything; `attributes` are PAX headers of one file."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 1_700_000_000, 0o4755
            info.pax_headers = dict(attributes) if name == "f0" else {}
            tar.addfile(info, BytesIO(data))
        for name, kind, target in (
            ("dir", tarfile.DIRTYPE, ""),
            ("dir/link", tarfile.SYMTYPE, "../f1"),
            ("dir/hard", tarfile.LNKTYPE, "f2"),
            ("fifo", tarfile.FIFOTYPE, ""),
            ("null", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.devmajor, info.devminor, info.uid = kind, target, 1, 3, 70_000
            tar.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def image(home: Path) -> str:  # noqa: F811
    return Layout(home / "layout").add("image", make_layer(**{"SCHILY.xattr.user.a": "value"}))


def mode_of(p2pgz: P2pgz, directory: Path) -> tuple[str, str]:  # noqa: F811
    [mount] = [mount for mount in p2pgz.status()["mounts"] if mount["dir"] == str(directory)]
    return mount["mode"], mount["mode_reason"]


def test_both_modes_show_the_same_and_auto_is_erofs(
    p2pgz: P2pgz,  # noqa: F811
    home: Path,  # noqa: F811
    image: str,
) -> None:
    p2pgz.start_node()
    with (
        mounted(p2pgz, image, home / "auto"),
        mounted(p2pgz, image, home / "tree", "--mode", "tree"),
        mounted(p2pgz, image, home / "erofs", "--mode", "erofs"),
    ):
        assert mode_of(p2pgz, home / "auto") == ("erofs", "")
        assert mode_of(p2pgz, home / "erofs") == ("erofs", "")
        assert mode_of(p2pgz, home / "tree") == ("tree", "asked for")
        assert differences(home / "tree", home / "auto") == []
        assert differences(home / "tree", home / "erofs") == []
        for name, data in FILES.items():
            assert (home / "erofs" / name).read_bytes() == data
    until(lambda: p2pgz.mounts() == [], "the mounts' end")


def test_failed_self_test_means_tree_mode_and_says_why(p2pgz: P2pgz, home: Path, image: str) -> None:  # noqa: F811
    p2pgz.start_node()
    with mounted(p2pgz, image, home / "root", "--mode", "erofs"):
        result = json.loads((p2pgz.state / RESULT).read_text())
    assert (result["passed"], result["reason"]) == (True, "")
    p2pgz.stop_node()
    result |= {"passed": False, "reason": "this kernel shows zeros"}
    (p2pgz.state / RESULT).write_text(json.dumps(result))
    p2pgz.start_node()
    (home / "other").mkdir()
    said = p2pgz.fails(UNMOUNTABLE, "mount", "--mode", "erofs", image, home / "other")
    assert "this kernel shows zeros" in said
    with mounted(p2pgz, image, home / "auto"):
        assert mode_of(p2pgz, home / "auto") == ("tree", "this kernel shows zeros")
    p2pgz.stop_node()
    # another boot, another kernel perhaps: the answer of the last one does not count
    (p2pgz.state / RESULT).write_text(json.dumps(result | {"boot_id": "another"}))
    p2pgz.start_node()
    with mounted(p2pgz, image, home / "root", "--mode", "erofs"):
        assert mode_of(p2pgz, home / "root") == ("erofs", "")


def test_image_that_erofs_cannot_express_is_refused_by_name_only(p2pgz: P2pgz, home: Path) -> None:  # noqa: F811
    image = Layout(home / "layout").add("odd", make_layer(**{"SCHILY.xattr.user.big": "v" * 65_536}))
    p2pgz.start_node()
    with mounted(p2pgz, image, home / "root"):
        assert mode_of(p2pgz, home / "root")[0] == "tree"
        assert os.getxattr(home / "root" / "f0", "user.big") == b"v" * 65_536
    (home / "other").mkdir()
    said = p2pgz.run("mount", "--mode", "erofs", image, home / "other")
    assert said.code != 0
    assert "does not fit into EROFS" in said.err
    assert not mounted_at(home / "other")


def test_complete_image_is_read_without_p2pgz(p2pgz: P2pgz, home: Path, image: str) -> None:  # noqa: F811
    p2pgz.start_node()
    with mounted(p2pgz, image, home / "first", "--mode", "erofs"):
        until(lambda: p2pgz.status()["mounts"][0]["state"] == "complete", "all chunks")
    with mounted(p2pgz, image, home / "root", "--mode", "erofs"):
        for file in p2pgz.state.glob("index.db*"):  # the node lets nobody else open it
            shutil.copy(file, home)
        with sqlite3.connect(home / "index.db") as index:
            assert index.execute("SELECT native_served FROM segments").fetchall() == [(1,)]
        index.close()
        [host] = {mount["pid"] for mount in p2pgz.status()["mounts"] if mount["dir"] == str(home / "root")}
        os.kill(host, signal.SIGKILL)
        for name, data in FILES.items():
            assert (home / "root" / name).read_bytes() == data
        until(lambda: p2pgz.status()["mounts"][0]["restarts"] == 1, "the next host")
    until(lambda: p2pgz.mounts() == [], "the mount's end")
    with mounted(p2pgz, image, home / "again", "--mode", "erofs"):
        assert mode_of(p2pgz, home / "again") == ("erofs", "")


def test_next_node_takes_the_mount_over(p2pgz: P2pgz, home: Path, image: str) -> None:  # noqa: F811
    p2pgz.start_node()
    (home / "root").mkdir()
    p2pgz.ok("mount", "--mode", "erofs", "--no-fill", image, home / "root")
    assert (home / "root" / "f1").read_bytes() == FILES["f1"]
    p2pgz.stop_node(signal.SIGKILL)
    p2pgz.start_node()
    assert mode_of(p2pgz, home / "root")[0] == "erofs"
    for name, data in FILES.items():
        assert (home / "root" / name).read_bytes() == data
    umount(home / "root")
    until(lambda: p2pgz.mounts() == [], "the mount's end")
