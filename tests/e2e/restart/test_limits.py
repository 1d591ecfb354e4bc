"""One image whose source hangs, with hundreds of readers: the other images, and the node, do not notice."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.restart.lazy_node import LazyNode, run, state_folder, wait_until, write_plain_layout

READERS = 500
FILES = 500
FILE_BYTES = 20_000
MEASURED_READS = 200
PIECE_BYTES = 128 << 10
READ_MS = 50.0
DEADLINE_SECONDS = 6.0
ENVIRONMENT = {"P2PGZ_FETCH__FILL": "false", "P2PGZ_FETCH__READ_DEADLINE_SECONDS": str(DEADLINE_SECONDS)}
EVER = 1 << 30
NODE_GROWTH_BYTES = 64 << 20
NODE_FILES = 200
FS_GROWTH_BYTES = 48 << 20
# Hung readers, each in a read of its own; says when all of them are
_READ_ALL = """
import os, sys, threading
threading.stack_size(64 << 10)
fds = [os.open(name, os.O_RDONLY) for name in sys.argv[1:]]
started = threading.Semaphore(0)
def read(fd):
    started.release()
    try:
        os.pread(fd, 4096, 0)
    except OSError:
        pass
threads = [threading.Thread(target=read, args=(fd,)) for fd in fds]
for thread in threads: thread.start()
for _ in threads: started.acquire()
print("reading", flush=True)
for thread in threads: thread.join()
"""

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as registry:
        yield registry


def push(folder: Path, registry: str, name: str, contents: dict[str, bytes]) -> str:
    write_plain_layout(folder / name, contents)
    reference = f"{registry}/lab/{name}:t"
    run("convert", f"oci:{folder / name}:t", reference)
    return reference


@pytest.fixture(scope="module")
def images(
    registry: RegistryThread, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, dict[str, str]]:
    """A good one with its hashes, and one of many small files."""
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(1)
    good = {f"f{n}": rng.randbytes(2 << 20) for n in range(4)}
    many = {f"f{n:03}": rng.randbytes(FILE_BYTES) for n in range(FILES)}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in good.items()}
    return (
        push(folder, registry.address, "good", good),
        push(folder, registry.address, "many", many),
        hashes,
    )


def own_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def read_times_ms(path: Path, rng: random.Random) -> list[float]:
    """Of pieces that the page cache does not have."""
    times = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        for _ in range(MEASURED_READS):
            offset = rng.randrange(0, size - PIECE_BYTES, 4096)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            assert len(os.pread(fd, PIECE_BYTES, offset)) == PIECE_BYTES
            times.append((time.perf_counter() - begin) * 1000)
    finally:
        os.close(fd)
    return sorted(times)


def mount(node: LazyNode, mode: str, reference: str, root: Path) -> bool:
    root.mkdir()
    done = node.call("mount", "--mode", mode, "--no-fill", reference, root, check=False)
    assert done.returncode in ({0, 14} if mode == "erofs" else {0}), done.stderr  # 14: not on this kernel
    return done.returncode == 0


def test_an_image_whose_source_hangs_leaves_the_others_alone(
    registry: RegistryThread, images: tuple[str, str, dict[str, str]]
) -> None:
    good, many, hashes = images
    readers: subprocess.Popen[bytes] | None = None
    with state_folder() as folder:
        node = LazyNode(folder / "state", environment=ENVIRONMENT)
        try:
            node.start()
            modes = [
                mode
                for mode in ("tree", "erofs")
                if mount(node, mode, good, folder / f"good-{mode}")
                and mount(node, mode, many, folder / f"many-{mode}")
            ]
            for mode in modes:
                for name, expected in hashes.items():
                    data = (folder / f"good-{mode}" / name).read_bytes()
                    assert hashlib.sha256(data).hexdigest() == expected
            before: dict[str, Any] = node.status()["node"]
            fs_before = {entry["pid"]: own_bytes(entry["pid"]) for entry in node.status()["mounts"]}
            hangs = Fault(on="/blobs/", silent=True, times=EVER)
            registry.spoil(hangs)
            names = [
                str(folder / f"many-{modes[n % len(modes)]}" / f"f{n % FILES:03}") for n in range(READERS)
            ]
            readers = subprocess.Popen([sys.executable, "-c", _READ_ALL, *names], stdout=subprocess.PIPE)
            assert readers.stdout is not None
            said = readers.stdout.readline()
            assert said == b"reading\n"
            wait_until(lambda: hangs.times < EVER)
            for mode in modes:
                times = read_times_ms(folder / f"good-{mode}" / "f1", random.Random(2))
                print(f"{mode}: median {times[len(times) // 2]:.2f} ms, longest {times[-1]:.2f} ms")
                assert times[int(0.95 * len(times))] < READ_MS
                assert len(os.listdir(folder / f"many-{mode}")) == FILES
            begin = time.perf_counter()
            during = node.status()["node"]
            seconds = time.perf_counter() - begin
            print(f"{seconds:.2f} s for `p2pgz status`, {before['tasks']} then {during['tasks']} tasks")
            assert readers.poll() is None
            assert during["memory_bytes"] - before["memory_bytes"] < NODE_GROWTH_BYTES
            assert during["open_files"] < NODE_FILES
            assert during["tasks"] < before["tasks"] + 8 * READERS
            for pid, size in fs_before.items():
                assert own_bytes(pid) - size < FS_GROWTH_BYTES
            readers.kill()
            readers.wait(5)
            readers.stdout.close()
            # the kernel does not say who left: what was asked for is given up at its deadline, not later
            wait_until(lambda: node.status()["node"]["tasks"] < before["tasks"] + 50, 4 * DEADLINE_SECONDS)
            registry.spoil()
            # requests that the registry never answered hold its connections for ten seconds each
            wait_until(lambda: reads(folder / "many-tree" / "f000"), 30)
        finally:
            registry.spoil()
            if readers is not None:
                readers.kill()
                readers.wait()
            node.close()


def reads(path: Path) -> bool:
    try:
        return len(path.read_bytes()) == FILE_BYTES
    except OSError:
        return False
