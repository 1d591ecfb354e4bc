"""A node that is killed, upgraded or rebooted under its mounts: readers only wait, and nothing is asked of the network."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from p2pgz.mount.umount import unmount
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e.restart.lazy_node import LazyNode, Readers, push_image, sha256, state_folder, wait_until

COMMIT_SECONDS = (
    2.0  # the index is written once a second; what was read later than that is fetched again after a kill
)

MODES = ("tree", "erofs")
DEAD_ERRNOS = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}  # EIO is what EROFS makes of the others
BOTH = pytest.mark.parametrize("mode", MODES)

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return push_image(tmp_path_factory.mktemp("image") / "plain", registry.address, seed=1)


@pytest.fixture
def registry_of_its_own(tmp_path: Path) -> Iterator[RunningRegistry]:
    """For tests that stop it and start it again."""
    with running_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def node(folder: Path) -> Iterator[LazyNode]:
    node = LazyNode(folder / "state")
    node.start()
    yield node
    node.close()


def mounted(node: LazyNode, reference: str, mode: str = "tree", *options: str) -> Path:
    root = node.state.parent / "root"
    with suppress(OSError):  # it is there, and may be a dead mount
        root.mkdir()
    node.call("mount", "--mode", mode, "--no-fill", *options, reference, root)
    return root


def drop_caches(root: Path) -> None:
    for path in root.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_killed_node_takes_its_mounts_up_again(node: LazyNode, image: tuple[str, dict[str, str]]) -> None:
    reference, hashes = image
    root = mounted(node, reference, "erofs")
    assert sha256(root / "f000") == hashes["f000"]
    before = node.mount_of(root)
    node.kill()
    drop_caches(root)
    assert sha256(root / "f000") == hashes["f000"]  # what is here is served without a node
    reader = subprocess.Popen(["sha256sum", root / "f001"], stdout=subprocess.PIPE, text=True)
    begin = time.monotonic()
    node.start()
    print(f"node back after {time.monotonic() - begin:.2f} s")
    assert reader.communicate(timeout=20)[0].split()[0] == hashes["f001"]
    after = node.mount_of(root)
    assert {key: after[key] for key in ("id", "ref", "digest", "dir", "pid", "restarts")} == {
        key: before[key] for key in ("id", "ref", "digest", "dir", "pid", "restarts")
    }
    node.call("umount", root)
    wait_until(lambda: not node.status()["mounts"])
    node.kill(signal.SIGTERM)
    assert not list(node.state.glob("fs-*.sock"))


def test_node_ended_by_sigterm_leaves_mounts_to_the_next(
    node: LazyNode, image: tuple[str, dict[str, str]]
) -> None:
    reference, hashes = image
    root = mounted(node, reference, "erofs")
    node.kill(signal.SIGTERM)
    node.start()
    assert sha256(root / "f002") == hashes["f002"]
    node.call("umount", root)


def test_restart_needs_no_registry(
    node: LazyNode, registry_of_its_own: RunningRegistry, tmp_path: Path
) -> None:
    registry = registry_of_its_own
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=2, files=8)
    root = mounted(node, reference)
    assert sha256(root / "f003") == hashes["f003"]
    time.sleep(COMMIT_SECONDS)
    for number in (signal.SIGKILL, signal.SIGTERM):
        node.kill(number)
        registry.stop()
        try:
            node.start()
            drop_caches(root)
            assert sha256(root / "f003") == hashes["f003"]
            assert node.mount_of(root)["ref"] == reference
        finally:
            registry.start()
    assert sha256(root / "f004") == hashes["f004"]
    node.call("umount", root)


@BOTH
def test_killed_fs_is_restarted(node: LazyNode, image: tuple[str, dict[str, str]], mode: str) -> None:
    reference, hashes = image
    root = mounted(node, reference, mode)
    file = (root / "f005").open("rb")
    for name in ("f006", "f016", "f026"):
        os.kill(node.fs_pid(), signal.SIGKILL)
        begin = time.monotonic()
        os.statvfs(root)
        assert sha256(root / name) == hashes[name]
        assert time.monotonic() - begin < 2.0
    assert hashlib.sha256(file.read()).hexdigest() == hashes["f005"]
    file.close()
    assert node.mount_of(root)["restarts"] == 3
    node.call("umount", root)


@BOTH
def test_node_and_fs_killed_at_once(node: LazyNode, image: tuple[str, dict[str, str]], mode: str) -> None:
    reference, hashes = image
    root = mounted(node, reference, mode)
    pid = node.fs_pid()
    node.kill()
    os.kill(pid, signal.SIGKILL)
    reader = subprocess.Popen(["sha256sum", root / "f007"], stdout=subprocess.PIPE, text=True)
    node.start()
    assert reader.communicate(timeout=20)[0].split()[0] == hashes["f007"]
    assert node.mount_of(root)["restarts"] == 1
    node.call("umount", root)


def test_stopped_fs_is_replaced(node: LazyNode, image: tuple[str, dict[str, str]]) -> None:
    reference, hashes = image
    root = mounted(node, reference, "erofs")
    pid = node.fs_pid()
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert sha256(root / "f008") == hashes["f008"]
    assert 5 < time.monotonic() - begin < 15  # ten pings, a second apart
    node.call("umount", root)


def test_stopped_node_goes_on(node: LazyNode, image: tuple[str, dict[str, str]]) -> None:
    reference, hashes = image
    root = mounted(node, reference)
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    reader = subprocess.Popen(["sha256sum", root / "f009"], stdout=subprocess.PIPE, text=True)
    time.sleep(1)
    node.process.send_signal(signal.SIGCONT)
    assert reader.communicate(timeout=20)[0].split()[0] == hashes["f009"]
    assert node.mount_of(root)["restarts"] == 0
    node.call("umount", root)


@pytest.mark.parametrize(("mode", "resend"), [("tree", "false"), ("erofs", "true")])
def test_upgrade_exchanges_node_and_fs_under_readers(
    folder: Path, image: tuple[str, dict[str, str]], mode: str, resend: str
) -> None:
    """Without resend the old `fs` is drained; a request that it had read but not looked at was once lost."""
    reference, hashes = image
    node = LazyNode(folder / "state", environment={"P2PGZ_MOUNT__RESEND": resend})
    node.start()
    try:
        root = mounted(node, reference, mode)
        before = node.fs_pid()
        with Readers(root, hashes, seed=3) as readers:
            for _ in range(2):
                print(node.call("upgrade").stdout.strip())
        print(f"{readers.reads} reads, longest wait {readers.longest_seconds:.2f} s")
        assert readers.faults == []
        assert readers.longest_seconds <= 5
        after = node.fs_pid()
        assert after != before
        assert node.process is not None
        assert node.process.poll() is None
        node.call("umount", root)
    finally:
        node.close()


def test_killed_holder_is_replaced(node: LazyNode, image: tuple[str, dict[str, str]]) -> None:
    reference, hashes = image
    root = mounted(node, reference, "erofs")
    os.kill(node.holder_pid(), signal.SIGKILL)
    wait_until(lambda: node.fs_pids() == [node.mount_of(root)["pid"]])
    os.kill(node.fs_pid(), signal.SIGKILL)
    assert sha256(root / "f010") == hashes["f010"]
    node.call("umount", root)


@BOTH
def test_mount_whose_holder_and_fs_died_is_named_and_repaired(
    node: LazyNode, image: tuple[str, dict[str, str]], mode: str
) -> None:
    reference, hashes = image
    root = mounted(node, reference, mode)
    pid = node.fs_pid()
    os.kill(node.holder_pid(), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError) as caught:
        sha256(root / "f011")
    assert caught.value.errno in DEAD_ERRNOS
    wait_until(lambda: node.mount_of(root)["state"] == "lost")
    said = node.mount_of(root)["error"]
    assert ("p2pgz umount" if mode == "erofs" else "p2pgz mount") in said
    if mode == "erofs":  # whether somebody serves it does not show on such a mount
        node.call("umount", root)
    mounted(node, reference, mode)
    assert sha256(root / "f011") == hashes["f011"]
    assert node.mount_of(root)["state"] in {"lazy", "complete"}
    node.call("umount", root)


@BOTH
def test_everything_killed_at_once_is_repaired_by_the_next_node(
    node: LazyNode, image: tuple[str, dict[str, str]], mode: str
) -> None:
    reference, hashes = image
    root = mounted(node, reference, mode)
    pid = node.fs_pid()
    holder = node.holder_pid()
    node.kill()
    os.kill(holder, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    node.start()
    wait_until(lambda: [mount["state"] for mount in node.status()["mounts"]] == ["lazy"])
    assert sha256(root / "f012") == hashes["f012"]
    node.call("umount", root)


@BOTH
def test_without_resend_readers_get_an_error_and_the_image_is_mounted_again(
    folder: Path, image: tuple[str, dict[str, str]], mode: str
) -> None:
    reference, hashes = image
    node = LazyNode(folder / "state", environment={"P2PGZ_MOUNT__RESEND": "false"})
    node.start()
    try:
        root = mounted(node, reference, mode)
        file = (root / "f013").open("rb")
        os.kill(node.fs_pid(), signal.SIGKILL)
        with pytest.raises(OSError) as caught:
            file.read()
        assert caught.value.errno in DEAD_ERRNOS
        with suppress(OSError):
            file.close()
        wait_until(lambda: [mount["restarts"] for mount in node.status()["mounts"]] == [1])
        assert sha256(root / "f013") == hashes["f013"]
        node.call("umount", root)
    finally:
        node.close()


def test_nobody_left_means_an_error_not_a_hang(folder: Path, image: tuple[str, dict[str, str]]) -> None:
    node = LazyNode(folder / "state", environment={"P2PGZ_MOUNT__ABANDON_SECONDS": "2"})
    node.start()
    try:
        root = mounted(node, image[0], "erofs")
        pid = node.fs_pid()
        node.kill()
        os.kill(pid, signal.SIGKILL)
        assert os.statvfs(root).f_files  # what is not bytes is the kernel's own
        begin = time.monotonic()
        done = subprocess.run(["cat", root / "f013"], capture_output=True, check=False, timeout=20)
        print(f"cat: {done.stderr.decode().strip()} after {time.monotonic() - begin:.1f} s")
        assert done.returncode != 0
        unmount(root)
    finally:
        node.close()
