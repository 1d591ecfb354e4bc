"""Every way in which a peer can fail, met by a real node that a reader waits for, through a real mount.

In all of them the reader gets the right bytes well before its deadline, from the registry or from another peer; the node
answers its status and serves the next reader; the counters say what happened, and who did it has lost its place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from p2pgz.p2p.bitmaps import LIES_MAX
from tests.e2e.cli.running import forget_peak, peak_memory_mib
from tests.e2e.peers.faulty import DEADLINE_SECONDS, FILE_CHUNKS, World, open_descriptors, world
from tests.e2e.peers.swarm import wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

# the registry is asked after a second without progress; the rest is a busy machine's slowness
QUICK_SECONDS = DEADLINE_SECONDS / 2
# bytes on the way, the interpreter's own ups and downs
MEMORY_MIB = 48
REGISTRY_CONNECTIONS = 8  # are kept open for a while

PEER_FAULTS = {
    "wrong-byte": "corrupt",
    "other-bytes": "corrupt",
    "bomb": "corrupt",
    "hidden-bomb": "corrupt",
    "too-few": "protocol",
    "too-many": "protocol",
    "twice": "protocol",
    "other-number": "protocol",
    "huge-frame": "protocol",
    "unknown-frame": "protocol",
    "lies": "lie",
    "nothing": "slow",
    "stalls": "slow",
    "trickle": "slow",
    "dies": "",
    "raises": "",
    "goodbye": "",
}


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with state_folder() as folder, world(folder) as made:
        yield made


@pytest.fixture
def pid(shared: World) -> Iterator[int]:
    """The node; it must be the same one afterwards, no larger and with no more open than before."""
    pid = shared.node.node_pid()
    before = open_descriptors(pid)
    forget_peak(pid)
    start = peak_memory_mib(pid)
    yield pid
    assert shared.node.node_pid() == pid
    assert peak_memory_mib(pid) - start < MEMORY_MIB
    wait_until(lambda: open_descriptors(pid) <= before + REGISTRY_CONNECTIONS)
    assert "Traceback" not in shared.node.log()


@pytest.mark.parametrize("fault", PEER_FAULTS)
def test_reader_gets_right_bytes_and_the_peer_loses_its_place(shared: World, pid: int, fault: str) -> None:
    kind = PEER_FAULTS[fault]
    before = shared.faults()
    with shared.bad_peer(fault) as bad:
        for name in shared.fresh(1 + LIES_MAX // FILE_CHUNKS if fault == "lies" else 1):
            assert shared.read(name) < QUICK_SECONDS
        bad.wait_for("asked")
        if kind:
            wait_until(lambda: shared.faults()[kind] == before[kind] + 1, 8)
            assert shared.is_out(bad)
        wait_until(lambda: bad.id not in shared.node.peer_ids())
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
    others = {name: count for name, count in shared.faults().items() if name not in (kind, "lost")}
    assert others == {name: before[name] for name in others}


def test_frames_of_a_later_version_cost_nothing(shared: World, pid: int) -> None:
    before, sources = shared.faults(), shared.node.sources()
    with shared.bad_peer("optional-frame") as peer:
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
        assert shared.node.peer_ids() == {peer.id}
    after = shared.node.sources()
    assert after["peer"]["chunks"] - sources["peer"]["chunks"] == FILE_CHUNKS
    assert after["registry"]["chunks"] == sources["registry"]["chunks"]
    assert shared.faults() == before


def test_flood_of_frames_does_not_hold_up_a_reader(shared: World, pid: int) -> None:
    with shared.bad_peer("floods") as bad:
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
        wait_until(lambda: bad.id not in shared.node.peer_ids())
        assert shared.is_out(bad)


def test_ten_thousand_requests_do_not_hold_up_a_reader(shared: World, pid: int) -> None:
    shared.read(min(shared.contents))  # so that chunk 0, which it asks for, is here
    with shared.bad_peer("greedy") as bad:
        for name in shared.fresh(2):
            assert shared.read(name) < QUICK_SECONDS
        wait_until(lambda: shared.node.status()["node"]["busy_answers"] > 0)
        assert bad.child.poll() is None


def test_stopped_peer_is_left_and_comes_back(shared: World, pid: int) -> None:
    before = shared.faults()
    with shared.bad_peer("good") as peer:
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
        os.kill(peer.child.pid, signal.SIGSTOP)
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
        wait_until(lambda: shared.faults()["slow"] == before["slow"] + 1)
        os.kill(peer.child.pid, signal.SIGCONT)
        wait_until(lambda: peer.has("ended"))
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
    with shared.bad_peer("good") as again:  # another one; the node has not turned against peers
        chunks = shared.node.sources()["peer"]["chunks"]
        shared.read(shared.fresh()[0])
        assert shared.node.sources()["peer"]["chunks"] == chunks + FILE_CHUNKS
        assert again.id in shared.node.peer_ids()


def test_peer_that_lost_its_place_is_turned_away_and_another_identity_is_caught_again(
    shared: World, pid: int
) -> None:
    before = shared.faults()["corrupt"]
    for times, seed in enumerate(("01" * 32, "02" * 32), 1):
        with shared.bad_peer("wrong-byte", seed=seed) as bad:
            shared.read(shared.fresh()[0])
            wait_until(lambda times=times: shared.faults()["corrupt"] == before + times)  # type: ignore[misc]
            assert shared.is_out(bad)
    with shared.bad_peer("good", seed="01" * 32, joined=False) as bad:
        bad.wait_for("ended")
        assert not bad.has("joined")
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS


def test_peer_of_a_version_that_nobody_here_speaks_is_told_so(shared: World, pid: int) -> None:
    before = shared.faults()
    with shared.bad_peer("version", joined=False) as peer:
        assert "version" in peer.wait_for("ended")["reason"]
        assert shared.read(shared.fresh()[0]) < QUICK_SECONDS
    assert shared.faults() == before


def test_all_peers_bad_at_once(shared: World, pid: int) -> None:
    faults = ("wrong-byte", "other-number", "nothing", "dies", "bomb")
    with (
        shared.bad_peer(faults[0]) as a,
        shared.bad_peer(faults[1]) as b,
        shared.bad_peer(faults[2]),
        shared.bad_peer(faults[3]),
        shared.bad_peer(faults[4]) as e,
    ):
        for name in shared.fresh(5):
            assert shared.read(name) < QUICK_SECONDS
        wait_until(lambda: not shared.node.peer_ids())
        assert shared.is_out(a) or shared.is_out(b) or shared.is_out(e)


def test_good_peer_among_bad_ones_is_found_without_the_registry(shared: World, pid: int) -> None:
    with (
        shared.registry_does(status=500),
        shared.bad_peer("wrong-byte"),
        shared.bad_peer("nothing"),
        shared.bad_peer("good"),
        shared.bad_peer("lies"),
    ):
        for name in shared.fresh(3):
            assert shared.read(name) < DEADLINE_SECONDS


def test_nobody_has_it_is_an_error_in_time_and_no_more(shared: World, pid: int) -> None:
    (name, later) = shared.fresh(2)
    with shared.registry_does(status=500), shared.bad_peer("nothing"), shared.bad_peer("wrong-byte"):
        before = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            shared.read(name)
        assert time.monotonic() - before < DEADLINE_SECONDS + 3
    shared.read_at_last(name)  # the same file, when the registry is back
    assert shared.read(later) < QUICK_SECONDS


def test_storm_of_killed_readers(shared: World, pid: int) -> None:
    """Two hundred readers of missing bytes, all killed while the peer says nothing and the registry only errors."""
    names = shared.fresh(5)
    with shared.bad_peer("nothing"), shared.registry_does(status=500):
        readers = [
            subprocess.Popen(
                ["dd", f"if={shared.node.root / names[n % 4]}", "of=/dev/null", "bs=4096", f"skip={n % 70}"],
                stderr=subprocess.DEVNULL,
            )
            for n in range(200)
        ]
        time.sleep(0.3)  # some wait in the kernel, some have not begun: any moment will do
        for reader in readers:
            reader.kill()
        for reader in readers:
            reader.wait(10)
    for name in names:
        shared.read_at_last(name)
