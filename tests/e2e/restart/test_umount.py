"""Mounts in use, and what a node that was killed leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.mount.umount import find_mounts
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.conftest import is_zombie
from tests.e2e.restart.lazy_node import LazyNode, push_image, sha256, state_folder, wait_until

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return push_image(tmp_path_factory.mktemp("image") / "plain", registry.address, seed=6, files=6)


@pytest.fixture
def node() -> Iterator[LazyNode]:
    with state_folder() as folder:
        node = LazyNode(folder / "state")
        node.start()
        yield node
        node.close()


def mounted(node: LazyNode, reference: str, name: str = "root") -> Path:
    root = node.state.parent / name
    root.mkdir(exist_ok=True)
    node.call("mount", "--mode", "tree", "--no-fill", reference, root)
    return root


def test_a_mount_in_use_stays_until_it_is_detached_and_then_serves_its_last_user(
    node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    reference, hashes = image
    root = mounted(node, reference)
    pid = node.fs_pid()
    with (root / "f001").open("rb") as file:
        refused = node.call("umount", root, check=False)
        assert refused.returncode == 14
        assert f"in use by pytest ({os.getpid()})" in refused.stderr.replace("python", "pytest")
        assert "--lazy" in refused.stderr
        assert sha256(root / "f000") == hashes["f000"]
        node.call("umount", "--lazy", root)
        assert list(root.iterdir()) == []
        assert [mount.directory for mount in find_mounts() if mount.directory == str(root)] == []
        again = mounted(node, reference)  # the place is free
        assert sha256(again / "f002") == hashes["f002"]
        node.kill()
        node.start()  # nobody forgets the one that is only a file any more
        assert len(file.read()) == (again / "f001").stat().st_size
        assert not is_zombie(pid)
    wait_until(lambda: is_zombie(pid))  # gone, or ours to bury since its node was killed
    node.call("umount", again)
    wait_until(lambda: not node.status()["mounts"])


def test_what_a_killed_node_left_is_cleaned_at_the_next_start(
    node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    reference, hashes = image
    root, other = mounted(node, reference), mounted(node, reference, "other")
    pids = [node.holder_pid(), *node.fs_pids()]
    node.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", other], check=True)  # one was unmounted, one is dead (ENOTCONN)
    stale = node.state / "fs-00112233445566aa-0badcafe.sock"  # nobody knows this one
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(stale))
    half = node.state / "pool" / "half.seg.tmp"
    half.write_bytes(b"half of a file")
    node.start()
    wait_until(lambda: [mount["dir"] for mount in node.status()["mounts"]] == [str(root)])
    assert sha256(root / "f003") == hashes["f003"]
    assert list(other.iterdir()) == []
    assert not stale.exists()
    assert not half.exists()
    sockets = {path.name for path in node.state.glob("fs-*.sock")}
    assert len(sockets) == 1
    node.call("umount", root)
    wait_until(lambda: not list(node.state.glob("fs-*.sock")))
