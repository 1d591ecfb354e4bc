"""A service that is killed as a whole, under a systemd that keeps its mounts' descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.mount.umount import unmount
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.conftest import is_zombie
from tests.e2e.restart.fake_systemd import FakeSystemd
from tests.e2e.restart.lazy_node import LazyNode, push_image, sha256, state_folder, wait_until

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return push_image(tmp_path_factory.mktemp("image") / "plain", registry.address, seed=9, files=8)


@pytest.fixture
def systemd() -> Iterator[FakeSystemd]:
    with state_folder() as folder:
        running = FakeSystemd(folder)
        yield running
        running.close()


@pytest.fixture
def node(systemd: FakeSystemd) -> Iterator[LazyNode]:
    with state_folder() as folder:
        node = LazyNode(folder / "state")
        systemd.start(node)
        yield node
        node.close()


def kill_all_of(node: LazyNode) -> None:
    """Node, file system processes and holder: what systemd does to a service that does not stop."""
    pids = [node.holder_pid(), *node.fs_pids()]
    node.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not all(map(is_zombie, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def mounted(node: LazyNode, reference: str, name: str = "root") -> Path:
    root = node.state.parent / name
    root.mkdir()
    node.call("mount", "--mode", "tree", "--no-fill", reference, root)
    return root


def test_a_mount_survives_the_death_of_node_fs_and_holder_together(
    systemd: FakeSystemd, node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    reference, hashes = image
    root, other = mounted(node, reference), mounted(node, reference, "other")
    assert sha256(root / "f000") == hashes["f000"]
    before = {mount["dir"]: mount["id"] for mount in node.status()["mounts"]}
    wait_until(lambda: len(systemd.stored) == 2)
    file = (root / "f001").open("rb")
    for _ in range(2):
        kill_all_of(node)
        reader = subprocess.Popen(["sha256sum", root / "f002"], stdout=subprocess.PIPE, text=True)
        time.sleep(0.1)
        assert reader.poll() is None, "nobody is there to answer, and still it did not wait"
        systemd.start(node)
        assert reader.communicate(timeout=20)[0].split()[0] == hashes["f002"]
        assert {mount["dir"]: mount["id"] for mount in node.status()["mounts"]} == before
    assert len(file.read()) == (root / "f001").stat().st_size  # opened before both
    file.close()
    assert sha256(other / "f003") == hashes["f003"]
    for directory in (root, other):
        node.call("umount", directory)
    wait_until(lambda: not systemd.stored)


def test_a_mount_that_was_unmounted_meanwhile_is_forgotten(
    systemd: FakeSystemd, node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    root = mounted(node, image[0])
    wait_until(lambda: len(systemd.stored) == 1)
    kill_all_of(node)
    unmount(root, lazy=True)
    systemd.start(node)
    wait_until(lambda: not systemd.stored)
    assert node.status()["mounts"] == []


def test_names_that_are_not_ours_are_left_alone(
    systemd: FakeSystemd, node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    root = mounted(node, image[0])
    wait_until(lambda: len(systemd.stored) == 1)
    kill_all_of(node)
    ours = dict(systemd.stored)
    systemd.stored.clear()
    strange = ["connection", "p2pgz-x", "p2pgz--", "p2pgz-00ff-notanumber", "p2pgz-00ff-77"]
    systemd.stored |= {name: os.open("/dev/null", os.O_RDONLY) for name in strange} | ours
    systemd.start(node)
    assert sha256(root / "f004") == image[1]["f004"]
    node.call("umount", root)
    wait_until(lambda: not set(systemd.stored) & set(ours))
