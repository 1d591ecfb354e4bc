"""The images that the end-to-end tests stand on: they run, hold what they claim, and the comparison sees differences."""

from __future__ import annotations

import os
import shutil
import stat
import urllib.request
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import RunningRegistry
from tests.e2e import lab_images
from tests.e2e.trees import differences

pytestmark = [
    pytest.mark.root,
    pytest.mark.registry,
    pytest.mark.tools("umoci", "skopeo", "debootstrap", "busybox"),
    pytest.mark.timeout(600),  # the first one builds the images
]


@pytest.mark.parametrize("name", [lab_images.SMALL, lab_images.REDIS])
def test_an_image_runs_from_an_unpacked_tree(unpacked: dict[str, Path], name: str) -> None:
    assert lab_images.READY in lab_images.run_image(unpacked[name])


def test_small_holds_one_of_everything(unpacked: dict[str, Path]) -> None:
    features = unpacked[lab_images.SMALL] / "features"
    assert not (features / "gone").exists()
    assert not (features / "gone-folder").exists()
    assert os.listdir(features / "opaque") == ["new"]
    assert (features / "hard-a").stat().st_nlink == 2
    assert stat.S_ISFIFO((features / "fifo").stat().st_mode)
    assert (features / "null").stat().st_rdev == os.makedev(1, 3)
    assert os.getxattr(features / "xattr", "user.p2pgz") == b"a value"
    assert (features / "old").stat().st_mtime == -86_400
    assert (features / "many/000").read_bytes() == b"replaced\n"


def test_both_images_are_in_the_registry(lab_registry: RunningRegistry) -> None:
    with urllib.request.urlopen(f"http://{lab_registry.address}/v2/_catalog", timeout=5) as answer:
        assert b'["lab/redis","lab/small"]' in answer.read()


def test_the_comparison_sees_every_kind_of_difference(unpacked: dict[str, Path], tmp_path: Path) -> None:
    original = unpacked[lab_images.SMALL] / "features"
    copy = tmp_path / "copy"
    lab_images.run("cp", "-a", original, copy)
    assert differences(original, copy) == []

    (copy / "hard-b").unlink()
    (copy / "extra").touch()
    (copy / "etc").mkdir()
    (copy / "setuid").chmod(0o755)
    os.chown(copy / "fifo", 5, 5)
    os.setxattr(copy / "xattr", "user.p2pgz", b"another")
    with (copy / "large").open("r+b") as file:
        file.write(b"?")
    found = "\n".join(differences(original, copy))
    for expected in (
        "b'hard-b': missing",
        "b'hard-a': nlink",
        "b'extra': should not be there",
        "b'setuid': mode",
        "b'fifo': owner",
        "b'xattr': xattrs",
        "b'large': content",
    ):
        assert expected in found
    shutil.rmtree(copy)
