"""Clocks that jump, machines that sleep, readers that want to leave: nothing expires, nothing is given up, nobody hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.conftest import descendants
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.restart.kills import send
from tests.e2e.restart.lazy_node import LazyNode, push_image, sha256, state_folder, wait_until

TEN_YEARS_SECONDS = 10 * 365.25 * 86_400
# so many that what is read ahead of one file does not reach the next
FILES = 64
STRIDE = 16
EVER = 1 << 30
ABANDON_SECONDS = 2
ASLEEP_SECONDS = 5.0  # longer than a mount may be without an answer
# Loaded by every Python of the node: its wall clock is off by what the file says
_CLOCK = """
import os, time
_real, _file = time.time, os.environ["TEST_CLOCK_FILE"]
def _shifted():
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _shifted
"""

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as registry:
        yield registry


@pytest.fixture(scope="module")
def image(registry: RegistryThread, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return push_image(tmp_path_factory.mktemp("image") / "plain", registry.address, seed=5, files=FILES)


def mounted(node: LazyNode, reference: str) -> Path:
    root = node.state.parent / "root"
    root.mkdir()
    node.call("mount", "--mode", "tree", "--no-fill", reference, root)
    return root


def test_a_clock_that_jumps_by_years_is_not_noticed(
    registry: RegistryThread, image: tuple[str, dict[str, str]], folder: Path
) -> None:
    reference, hashes = image
    offset = folder / "offset"
    offset.write_text("0")
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(_CLOCK)
    path = os.pathsep.join(filter(None, [str(folder / "python"), os.environ.get("PYTHONPATH", "")]))
    registry.fake.auth, registry.fake.anonymous_pull = "bearer", True  # tokens expire
    node = LazyNode(
        folder / "state",
        environment={
            "PYTHONPATH": path,
            "TEST_CLOCK_FILE": str(offset),
            "P2PGZ_MOUNT__ABANDON_SECONDS": str(ABANDON_SECONDS),
        },
    )
    try:
        node.start()
        root = mounted(node, reference)
        pid = node.fs_pid()
        for number, years in enumerate((1, -1, 0, 1)):
            replaced = folder / "next"
            replaced.write_text(str(years * TEN_YEARS_SECONDS))
            replaced.replace(offset)
            time.sleep(1.5)  # pings, beats, commits
            for name in (f"f{STRIDE * number:03}", f"f{STRIDE * number + 1:03}", "f000"):
                assert sha256(root / name) == hashes[name]
            mount = node.mount_of(root)
            assert (mount["pid"], mount["restarts"], mount["state"]) == (pid, 0, "lazy")
        tagged = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time() > 2_000_000_000)"],
            env=node.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert tagged.stdout.strip() == "True"  # or nothing was tested
        node.call("umount", root)
        wait_until(lambda: not node.status()["mounts"])
    finally:
        registry.fake.auth = ""
        node.close()


def test_a_machine_that_sleeps_with_a_waiting_reader_goes_on_where_it_was(
    registry: RegistryThread, image: tuple[str, dict[str, str]], folder: Path
) -> None:
    """As far as processes can tell: all of them stop for longer than a mount may be without an answer."""
    reference, hashes = image
    others = descendants()
    node = LazyNode(folder / "state", environment={"P2PGZ_MOUNT__ABANDON_SECONDS": str(ABANDON_SECONDS)})
    try:
        node.start()
        root = mounted(node, reference)
        pid = node.fs_pid()
        all_of_them = [*(descendants() - others), node.holder_pid(), pid]
        hangs = Fault(on="/blobs/", silent=True, times=EVER)
        registry.spoil(hangs)
        reader = subprocess.Popen(["sha256sum", root / "f010"], stdout=subprocess.PIPE, text=True)
        wait_until(lambda: hangs.times < EVER)
        send([*all_of_them, reader.pid], signal.SIGSTOP)
        time.sleep(ASLEEP_SECONDS)
        registry.spoil()
        send([*all_of_them, reader.pid], signal.SIGCONT)
        assert reader.communicate(timeout=40)[0].split()[0] == hashes["f010"]
        mount = node.mount_of(root)
        assert (mount["pid"], mount["restarts"]) == (pid, 0)
        node.call("umount", root)
    finally:
        registry.spoil()
        node.close()


@pytest.mark.parametrize("how", ["read", "mmap"])
def test_a_reader_whose_bytes_do_not_come_can_be_killed(
    registry: RegistryThread, image: tuple[str, dict[str, str]], folder: Path, how: str
) -> None:
    code = {
        "read": "open(sys.argv[1], 'rb').read()",
        "mmap": "import mmap; f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[0]",
    }[how]
    node = LazyNode(folder / "state")
    try:
        node.start()
        root = mounted(node, image[0])
        hangs = Fault(on="/blobs/", silent=True, times=EVER)
        registry.spoil(hangs)
        reader = subprocess.Popen([sys.executable, "-c", f"import sys; {code}", root / "f012"])
        wait_until(lambda: hangs.times < EVER)
        wait_until(lambda: state_of(reader.pid) == "D")
        begin = time.monotonic()
        reader.kill()
        reader.wait(5)
        assert time.monotonic() - begin < 1.0
        pids = node.fs_pids()
        node.call("umount", root)  # not busy
        wait_until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5
        )  # long before the deadline
    finally:
        registry.spoil()
        node.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
