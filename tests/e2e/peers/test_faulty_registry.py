"""Every way in which a registry can fail, with a peer that has the chunks and without: right bytes, or EIO in time."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.peers.faulty import DEADLINE_SECONDS, FILE_CHUNKS, World, world
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

QUICK_SECONDS = DEADLINE_SECONDS / 2
SLACK_SECONDS = 3.0
FAULTS: dict[str, dict[str, Any]] = {
    "errors": {"status": 500},
    "has enough of us": {"status": 429, "headers": {"Retry-After": "30"}},
    "is slow": {"piece_bytes": 1024, "pause_seconds": 0.5},
    "says nothing": {"silent": True},
    "hangs up": {"drop_after": -1},
    "sends too little": {"short_by": 100},
}
NEVER = "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with state_folder() as folder, world(folder) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS)
def test_peers_have_it(shared: World, fault: str) -> None:
    with shared.bad_peer("good"):
        before = shared.node.sources()
        with shared.registry_does(**FAULTS[fault]):
            for name in shared.fresh(2):
                assert shared.read(name) < QUICK_SECONDS
        after = shared.node.sources()
    assert after["peer"]["chunks"] - before["peer"]["chunks"] == 2 * FILE_CHUNKS
    assert after["registry"]["chunks"] == before["registry"]["chunks"]


def test_passing_trouble_is_waited_out(shared: World) -> None:
    faults = (
        Fault(on="/blobs/", times=2, status=503),
        Fault(on="/blobs/", times=1, drop_after=1000),
        Fault(on="/blobs/", times=1, short_by=10),
    )
    for fault in faults:
        shared.registry.spoil(fault)
        assert shared.read(shared.fresh()[0]) < DEADLINE_SECONDS
        assert fault.times == 0


def test_registry_that_asks_for_a_pause_gets_it(shared: World) -> None:
    shared.registry.spoil(Fault(on="/blobs/", times=1, status=429, headers={"Retry-After": "1"}))
    seconds = shared.read(shared.fresh()[0])
    assert 1 <= seconds < DEADLINE_SECONDS


def test_slow_registry_is_waited_for_while_it_sends(shared: World) -> None:
    with shared.registry_does(piece_bytes=8192, pause_seconds=0.1):
        assert shared.read(shared.fresh()[0]) < DEADLINE_SECONDS


def test_pause_without_end_is_an_error_in_time(shared: World) -> None:
    """The clock of the registry, or of this host, may be wrong by any time."""
    (name,) = shared.fresh()
    with shared.registry_does(status=429, headers={"Retry-After": NEVER}):
        assert seconds_to_error(shared, name) < DEADLINE_SECONDS + SLACK_SECONDS
    shared.read_at_last(name)


def test_registry_that_never_answers_is_an_error_in_time(shared: World) -> None:
    (name,) = shared.fresh()
    with shared.registry_does(silent=True):
        seconds = seconds_to_error(shared, name)
        assert DEADLINE_SECONDS - 1 < seconds < DEADLINE_SECONDS + SLACK_SECONDS
        before = time.monotonic()
        assert shared.node.status()["mounts"]
        shared.read(max(shared.contents))  # what is here is served meanwhile
        assert time.monotonic() - before < 1
    shared.read_at_last(name)


def test_peer_that_comes_while_the_registry_says_nothing_ends_the_wait(shared: World) -> None:
    (name,) = shared.fresh()
    took: list[float] = []
    reader = threading.Thread(target=lambda: took.append(shared.read(name)))
    with shared.registry_does(silent=True):
        reader.start()
        shared.wait_for_registry_request()
        with shared.bad_peer("good"):
            reader.join(DEADLINE_SECONDS + SLACK_SECONDS)
    assert took[0] < DEADLINE_SECONDS


def seconds_to_error(world: World, name: str) -> float:
    before = time.monotonic()
    with pytest.raises(OSError, match="error") as caught:
        world.read(name)
    assert caught.value.errno == errno.EIO
    return time.monotonic() - before
