"""Mounted images while chunks are evicted, damaged on the disk, or find no room there: readers see right bytes only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.evictions import Campaign, Image, ask_status, push
from tests.e2e.restart.lazy_node import P2PGZ, LazyNode, state_folder
from tests.e2e.restart.test_node import drop_caches, sha256

SEED = 11
FILES = 16
INTEGRITY = 12
FULL = 1
DISK_BYTES = 48 << 20
FLIPPED_AT = 100_000
IDLE_RATE = 50_000_000

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Image]]:
    """Two images without a byte in common, and the registry that has them."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield [
            push(tmp_path_factory.mktemp("image") / "plain", registry.address, seed, FILES)
            for seed in (SEED, SEED + 1)
        ]


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def make_node(folder: Path) -> Iterator[Callable[..., LazyNode]]:
    """Starts a node with these settings; it is ended after the test."""
    nodes: list[LazyNode] = []

    def make(state: str = "state", **environment: str) -> LazyNode:
        node = LazyNode(folder / state, environment={"P2PGZ_PEERS__ENABLED": "never", **environment})
        node.log = folder / "node.log"
        nodes.append(node)
        node.start()
        return node

    yield make
    for node in nodes:
        node.close()


def mounted(node: LazyNode, reference: str, mode: str = "tree", *options: str, name: str = "root") -> Path:
    root = node.state.parent / name
    root.mkdir(exist_ok=True)
    node.call("mount", "--mode", mode, *(options or ["--no-fill"]), reference, root)
    return root


def wrong(root: Path, hashes: dict[str, str]) -> list[str]:
    """The files whose bytes are not theirs."""
    return [name for name, expected in hashes.items() if sha256(root / name) != expected]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_synced(node: LazyNode) -> None:
    """All that was read is on the disk and on record."""
    until(lambda: (pool := ask_status(node)["pool"])["unsynced_bytes"] == 0 and pool["chunks"] > 0)


def collect(node: LazyNode) -> dict[str, Any]:
    """`pool gc --all`, once what was read a moment ago may go."""
    time.sleep(0.4)
    result: dict[str, Any] = json.loads(node.call("pool", "gc", "--all", "--json").stdout)
    return result


def data_file(node: LazyNode) -> Path:
    """The segment file with the most bytes."""
    return max((node.state / "pool").glob("*.seg"), key=lambda path: path.stat().st_blocks)


def flip(path: Path, offset: int = FLIPPED_AT) -> None:
    """What a failing disk does."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
        os.fsync(file.fileno())


@pytest.mark.parametrize("mode", ["tree", "erofs"])
def test_readers_of_all_of_an_image_in_a_pool_of_a_tenth_of_it(
    folder: Path, images: list[Image], mode: str
) -> None:
    """The short version of `make evict`."""
    figures, faults = Campaign(folder, mode, images[0], SEED).run(3.0, kills=False)
    print(json.dumps(figures))
    assert faults == []
    assert figures["reads"] > 20
    assert figures["refetched_bytes"] > 0
    assert figures["evicted_bytes"] > figures["quota_bytes"]


def test_segment_that_the_kernel_reads_by_itself_is_replaced_when_unused_and_never_punched(
    make_node: Callable[..., LazyNode], images: list[Image]
) -> None:
    node, (reference, hashes, _) = make_node(P2PGZ_FETCH__FILL_DELAY_SECONDS="0"), images[0]
    root = mounted(node, reference, "erofs", "--fill")
    until(lambda: node.mount_of(root)["state"] == "complete")
    subprocess.run(["umount", root], check=True)
    until(lambda: not ask_status(node)["mounts"])
    mounted(node, reference, "erofs")
    segment = data_file(node)
    before, blocks = segment.stat().st_ino, segment.stat().st_blocks
    assert collect(node)["evicted_bytes"] == 0
    assert (segment.stat().st_ino, segment.stat().st_blocks) == (before, blocks)
    host = node.fs_pid()
    os.kill(node.holder_pid(), signal.SIGKILL)
    os.kill(host, signal.SIGKILL)  # the mount stays: nobody has to be asked for any of its bytes
    until(lambda: node.mount_of(root)["state"] == "lost")
    assert collect(node)["evicted_bytes"] > FILES * 500_000
    assert segment.stat().st_ino != before
    assert segment.stat().st_blocks < blocks / 10
    drop_caches(root)
    assert wrong(root, hashes) == []  # from the old file, which has no name any more
    subprocess.run(["umount", root], check=True)
    mounted(node, reference, "tree")
    assert wrong(root, hashes) == []


def test_process_that_no_node_can_ask_stops_eviction(
    make_node: Callable[..., LazyNode], images: list[Image]
) -> None:
    """A file system process that went on without its node, which does not know the image any more."""
    node, (reference, hashes, _) = make_node(), images[0]
    root = mounted(node, reference)
    assert wrong(root, hashes) == []
    until_synced(node)
    node.kill()
    with closing(sqlite3.connect(node.state / "index.db")) as index, index:
        assert index.execute("DELETE FROM objects").rowcount > 0
    node.start()
    assert [mount["dir"] for mount in ask_status(node)["mounts"]] == []
    said = node.call("pool", "gc", "--all")
    assert said.stdout.startswith("0 B freed")
    assert "1 segments stay" in said.stderr
    assert collect(node)["evicted_bytes"] == 0
    drop_caches(root)
    assert wrong(root, hashes) == []
    subprocess.run(["umount", root], check=True)


@pytest.mark.slow
def test_stopped_process_keeps_its_chunks_and_costs_a_collection_five_seconds(
    make_node: Callable[..., LazyNode], images: list[Image]
) -> None:
    node, (reference, hashes, _) = make_node(), images[0]
    root = mounted(node, reference)
    assert wrong(root, hashes) == []
    pid = node.fs_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        result = collect(node)
        assert time.monotonic() - begin < 15
        assert (result["evicted_bytes"], result["eviction_failures"]) == (0, 1)
    finally:
        os.kill(pid, signal.SIGCONT)
    drop_caches(root)
    assert wrong(root, hashes) == []
    assert ask_status(node)["pool"]["eviction_failures"] == 1


@pytest.mark.parametrize("mode", ["tree", "erofs"])
def test_flipped_bit_under_a_mount_is_found_and_no_longer_seen_by_anybody(
    make_node: Callable[..., LazyNode], images: list[Image], mode: str
) -> None:
    node, (reference, hashes, _) = make_node(), images[0]
    root = mounted(node, reference, mode)
    assert wrong(root, hashes) == []
    until_synced(node)
    flip(data_file(node))
    if mode == "tree":
        drop_caches(root)
    else:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    [damaged] = wrong(root, hashes)  # that is what silent corruption is; the kernel has the wrong page now
    done = node.call("pool", "scrub", "--rate", "0", "--json", check=False)
    assert done.returncode == INTEGRITY
    found = json.loads(done.stdout)
    assert (len(found["wrong"]), found["refetched_chunks"], found["finished"]) == (1, 1, True)
    if mode == "erofs":  # what EROFS made of it is the kernel's alone: docs/how-to/keep-the-pool-small.md
        drop_caches(root)
    until(lambda: sha256(root / damaged) == hashes[damaged], 5)
    assert wrong(root, hashes) == []
    assert json.loads(node.call("pool", "scrub", "--rate", "0", "--json").stdout)["wrong"] == []
    pool = ask_status(node)["pool"]
    assert (pool["scrub_wrong_chunks"], pool["scrub_refetched_chunks"]) == (1, 1)


@pytest.mark.slow
def test_damage_is_found_in_idle_time_and_a_scrub_keeps_to_its_rate(
    make_node: Callable[..., LazyNode], images: list[Image]
) -> None:
    node = make_node(
        P2PGZ_POOL__SCRUB_INTERVAL_SECONDS="1", P2PGZ_POOL__SCRUB_BYTES_PER_SECOND=str(IDLE_RATE)
    )
    reference, hashes, _ = images[0]
    root = mounted(node, reference)
    first = next(iter(hashes))
    until(lambda: wrong(root, hashes) == [])
    until_synced(node)
    flip(data_file(node))
    until(lambda: ask_status(node)["pool"]["scrub_refetched_chunks"] == 1)
    assert wrong(root, hashes) == []
    # a reader who always has something to read from the disk leaves no idle time
    checked, longest_gap, last = 0, 0.0, time.monotonic()
    settled_at = time.monotonic() + 2
    until_seconds = settled_at + 2.5
    while time.monotonic() < until_seconds:
        drop_caches(root)
        assert sha256(root / first) == hashes[first]
        longest_gap, last = max(longest_gap, time.monotonic() - last), time.monotonic()
        if time.monotonic() < settled_at:
            checked = ask_status(node)["pool"]["scrubbed_bytes"]
        time.sleep(0.1)
    if (
        longest_gap < 0.8
    ):  # else this machine was too busy to be read from, and the node may have found it idle
        assert ask_status(node)["pool"]["scrubbed_bytes"] == checked
    begin = time.monotonic()
    scrubbed = json.loads(node.call("pool", "scrub", "--rate", "6000000", "--json").stdout)
    assert time.monotonic() - begin > 0.9 * scrubbed["bytes"] / 6_000_000


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, which a test fills."""
    image, directory = folder / "disk.img", folder / "disk"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def fill_up(directory: Path) -> Path:
    """Take every block that is left."""
    hog = directory / "hog"
    with hog.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 512):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return hog


@pytest.mark.tools("mkfs.ext4")
def test_full_disk_costs_no_reader_anything_and_ends_by_itself(
    small_disk: Path, make_node: Callable[..., LazyNode], images: list[Image], tmp_path: Path
) -> None:
    node, (reference, hashes, _), (other, other_hashes, _) = make_node("disk/state"), *images
    root = mounted(node, reference)
    early = dict(list(hashes.items())[:2])
    assert wrong(root, early) == []
    until_synced(node)
    (small_disk / "other").mkdir()
    hog = fill_up(small_disk)
    assert os.statvfs(small_disk).f_bavail == 0
    assert wrong(root, hashes) == []
    drop_caches(root)
    assert wrong(root, hashes) == []  # again, and from the network again
    status = ask_status(node)
    assert status["pool"]["state"] == "full"
    assert status["pool"]["unkept_chunks"] > 0
    assert status["pool"]["unkept_bytes_now"] <= 64 << 20
    assert "FULL" in node.call("status").stdout
    assert "FULL" in node.call("pool", "stat").stdout
    late = list(hashes)[-1]
    words = [*P2PGZ, "--state-dir", str(node.state), "cat", reference, f"/{late}"]
    read = subprocess.run(words, capture_output=True, check=True, cwd="/").stdout
    assert hashlib.sha256(read).hexdigest() == hashes[late]
    # what cannot be done without room is refused by name; the index gave up its reserve, which somebody else has now, and
    # what the pool has to give to get that back as well
    for _ in range(10):
        fill_up(small_disk)
        refused = node.call("mount", "--no-fill", other, node.state.parent / "other", check=False)
        if refused.returncode:
            break
        node.call("umount", node.state.parent / "other")
    assert refused.returncode == FULL
    assert "room" in refused.stderr or "space" in refused.stderr.lower()
    # neither the node's death nor its restart need any
    node.kill()
    node.start()
    drop_caches(root)
    assert wrong(root, hashes) == []
    for file in node.state.glob("index.db*"):  # the node lets nobody else open it
        shutil.copy(file, tmp_path)
    with closing(sqlite3.connect(tmp_path / "index.db")) as index:
        assert index.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    hog.unlink()
    until(lambda: ask_status(node)["pool"]["state"] == "keeping")
    mounted(node, other, name="other")
    assert wrong(node.state.parent / "other", other_hashes) == []
    drop_caches(root)
    assert wrong(root, hashes) == []

    def nothing_is_fetched() -> bool:
        fetched = ask_status(node)["sources"]["registry"]["bytes"]
        drop_caches(root)
        assert wrong(root, hashes) == []
        return bool(ask_status(node)["sources"]["registry"]["bytes"] == fetched)

    until(nothing_is_fetched)  # they are kept; what was read ahead while there was no room comes once more
    assert not (node.state / "index.db.damaged").exists()


@pytest.mark.tools("mkfs.ext4")
def test_file_system_that_an_error_made_read_only_costs_no_reader_anything(
    small_disk: Path, make_node: Callable[..., LazyNode], images: list[Image]
) -> None:
    node, (reference, hashes, _) = make_node("disk/state"), images[0]
    root = mounted(node, reference)
    early = dict(list(hashes.items())[:4])
    assert wrong(root, early) == []
    until_synced(node)
    source = subprocess.run(
        ["findmnt", "-no", "SOURCE", small_disk], capture_output=True, text=True, check=True
    ).stdout.strip()
    trigger = Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel cannot be told to find an error")
    trigger.write_text("1")
    with pytest.raises(OSError, match="Read-only"):
        (small_disk / "probe").write_text("")
    for _ in range(2):
        assert wrong(root, hashes) == []
        drop_caches(root)
    pool = ask_status(node)["pool"]
    assert pool["state"] == "failing"
    assert "Read-only" in pool["error"]
    assert "FAILING" in node.call("status").stdout
    assert "FAILING" in node.call("pool", "stat").stdout
