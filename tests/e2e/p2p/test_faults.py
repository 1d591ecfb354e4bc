"""Two processes exchange a layer's chunks into pools, and what happens when the giving one misbehaves.

Each fault: the taker keeps only right bytes, hears of it in time, the bad peer loses its place (or at least the
connection), and a good peer supplies the rest through the same exchange.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault
from p2pgz.errors import ChunkCorrupt, P2pgzError, SourceUnavailable
from p2pgz.testing.conformance_pool import check_content
from p2pgz.testing.peers import FAULTS, Peer, open_peer, peer_layer

pytestmark = pytest.mark.slow

SEED = 7
# a peer that stalls is given up after 3 s, looked at every half second; the rest is this machine's slowness
STALL_NOTICED_SECONDS = 8.0


@dataclass
class Process:
    child: subprocess.Popen[str]
    port: int
    id: PeerId


@contextmanager
def peer_process(directory: Path, fault: str = "") -> Iterator[Process]:
    command = [sys.executable, "-m", "p2pgz.testing.peers", str(directory), str(SEED), fault]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        told = json.loads(child.stdout.readline())
        yield Process(child, told["port"], PeerId.parse(told["peer"]))
    finally:
        child.send_signal(signal.SIGCONT)
        child.stdin.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


async def take(peer: Peer, giver: Process) -> None:
    await peer.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
    answer = await peer.exchange.fetch(
        giver.id, peer.swarm, peer.segment.table, peer.missing(), priority=3, landed=peer.landed
    )
    if answer.missing or answer.busy:
        raise SourceUnavailable(f"not all came: {answer}")


@pytest.mark.trio
async def test_all_chunks_cross_from_one_process_to_the_other(tmp_path: Path) -> None:
    layer = peer_layer(SEED)
    with peer_process(tmp_path / "giver") as giver:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            taker.exchange.follow(taker.swarm)
            await take(taker, giver)
            assert taker.missing() == []
            assert check_content(taker.segment, layer) == len(layer.chunks)
            with trio.fail_after(5):
                while taker.exchange.holders(taker.swarm, 3) != [giver.id]:
                    await trio.sleep(0.01)
            assert not taker.exchange.standing.counts


EXPECTED: dict[str, tuple[type[P2pgzError], Fault | None]] = {
    "wrong-byte": (ChunkCorrupt, Fault.CORRUPT),
    "other-bytes": (ChunkCorrupt, Fault.CORRUPT),
    "too-few": (SourceUnavailable, Fault.PROTOCOL),
    "too-many": (SourceUnavailable, Fault.PROTOCOL),
    "twice": (SourceUnavailable, Fault.PROTOCOL),
    "other-number": (SourceUnavailable, Fault.PROTOCOL),
    "huge-frame": (SourceUnavailable, Fault.PROTOCOL),
    "unknown-frame": (SourceUnavailable, Fault.PROTOCOL),
    "bomb": (ChunkCorrupt, Fault.CORRUPT),
    "hidden-bomb": (ChunkCorrupt, Fault.CORRUPT),
    "nothing": (SourceUnavailable, Fault.SLOW),
    "trickle": (SourceUnavailable, Fault.SLOW),
    "lies": (SourceUnavailable, Fault.LIE),
    "dies": (SourceUnavailable, None),
    "raises": (SourceUnavailable, None),
    "goodbye": (SourceUnavailable, None),
}


def test_every_fault_of_the_testing_peer_is_tested() -> None:
    assert set(FAULTS) == {*EXPECTED, "floods", "optional-frame"}


@pytest.mark.trio
@pytest.mark.parametrize("fault", EXPECTED)
async def test_bad_peer_loses_its_place_and_a_good_one_supplies(tmp_path: Path, fault: str) -> None:
    layer = peer_layer(SEED)
    error_type, blame = EXPECTED[fault]
    with peer_process(tmp_path / "bad", fault) as bad, peer_process(tmp_path / "good") as good:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            taker.exchange.follow(taker.swarm)
            await taker.exchange.connect("127.0.0.1", bad.port, expected=bad.id)
            with trio.fail_after(5):  # the lie is about what the bitmap promised
                while not taker.exchange.holders(taker.swarm, 0):
                    await trio.sleep(0.01)
            started = time.monotonic()
            with pytest.raises(error_type):
                await take(taker, bad)
            assert time.monotonic() - started < STALL_NOTICED_SECONDS
            with trio.fail_after(5):
                while taker.exchange.connection(bad.id) is not None:
                    await trio.sleep(0.01)
            check_content(taker.segment, layer)
            now = trio.current_time()
            if blame is not None:
                assert taker.exchange.standing.counts == {blame: 1}
                assert taker.exchange.standing.out_until(bad.id, now) > now
                with pytest.raises(SourceUnavailable):
                    await taker.exchange.connect("127.0.0.1", bad.port, expected=bad.id)
            await take(taker, good)
            assert check_content(taker.segment, layer) == len(layer.chunks)


@pytest.mark.trio
async def test_frames_of_a_later_version_are_skipped(tmp_path: Path) -> None:
    layer = peer_layer(SEED)
    with peer_process(tmp_path / "giver", "optional-frame") as giver:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            await take(taker, giver)
            assert check_content(taker.segment, layer) == len(layer.chunks)


@pytest.mark.trio
async def test_flood_of_frames_ends_the_connection_or_the_callers_patience(tmp_path: Path) -> None:
    layer = peer_layer(SEED)
    with peer_process(tmp_path / "giver", "floods") as giver:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            with pytest.raises((SourceUnavailable, trio.TooSlowError)), trio.fail_after(3):
                await take(taker, giver)
            assert taker.exchange.connection(giver.id) is None or not taker.segment.presence.has(0)


@pytest.mark.trio
async def test_stopped_peer_is_given_up_and_may_come_back(tmp_path: Path) -> None:
    layer = peer_layer(SEED)
    with peer_process(tmp_path / "giver") as giver:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            connection = await taker.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
            os.kill(giver.child.pid, signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(SourceUnavailable):
                await take(taker, giver)
            assert time.monotonic() - started < STALL_NOTICED_SECONDS
            assert connection.fault is Fault.SLOW
            os.kill(giver.child.pid, signal.SIGCONT)
            while until := taker.exchange.standing.out_until(giver.id, trio.current_time()):
                await trio.sleep_until(until)
            await take(taker, giver)
            assert taker.missing() == []


@pytest.mark.trio
async def test_killed_peer_is_noticed_at_once(tmp_path: Path) -> None:
    layer = peer_layer(SEED)
    with peer_process(tmp_path / "giver") as giver:
        async with open_peer(tmp_path / "taker", layer, chunks=()) as taker:
            connection = await taker.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
            giver.child.kill()
            with trio.fail_after(2):
                while not connection.ended:
                    await trio.sleep(0.01)
            with pytest.raises(SourceUnavailable):
                await take(taker, giver)
