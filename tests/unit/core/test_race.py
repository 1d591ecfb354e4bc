"""Whom to ask for a chunk, when to ask a second one, and how much that may cost."""

from __future__ import annotations

import pytest

from p2pgz.core.race import (
    BUSY_PEERS_MAX,
    HEDGE_ALLOWANCE_BYTES,
    HEDGE_MIN_SECONDS,
    HEDGE_SHARE,
    HEDGE_UNKNOWN_SECONDS,
    SAMPLES,
    BusyPeers,
    HedgeBudget,
    Latencies,
    assign,
)


def test_a_peer_is_slow_when_it_takes_longer_than_nine_in_ten_of_its_answers_did() -> None:
    latencies = Latencies()
    assert latencies.hedge_after_seconds() == HEDGE_UNKNOWN_SECONDS
    for n in range(10):
        latencies.sample(0.1 * (n + 1))
    assert latencies.hedge_after_seconds() == pytest.approx(1.0)
    for _ in range(SAMPLES):
        latencies.sample(0.001)
    assert latencies.hedge_after_seconds() == HEDGE_MIN_SECONDS


def test_bytes_asked_for_twice_are_a_small_share_of_all() -> None:
    budget = HedgeBudget()
    assert budget.hedge(HEDGE_ALLOWANCE_BYTES)
    assert not budget.hedge(1)
    budget.ask(1_000_000)
    assert budget.hedge(int(HEDGE_SHARE * 1_000_000))
    assert not budget.hedge(1)
    assert budget.hedged_bytes == HEDGE_ALLOWANCE_BYTES + int(HEDGE_SHARE * 1_000_000)


def test_chunks_go_to_the_holder_that_would_finish_them_first() -> None:
    sizes = [10_000_000] * 6
    plan = assign(
        {0: ["near", "far"], 1: ["near", "far"], 2: ["far"], 3: [], 4: ["near", "far"], 5: ["near", "far"]},
        sizes,
        {"near": 0.001, "far": 0.15},
        {"near": 100e6},
    )
    # the near one first, until what it was given takes longer than the far one's delay
    assert plan["near"][:2] == [0, 1]
    assert 2 in plan["far"]
    assert sorted(plan["near"] + plan["far"]) == [0, 1, 2, 4, 5]
    assert assign({}, sizes, {}, {}) == {}


def test_peer_is_busy_for_the_class_that_it_refused_and_for_lesser_ones() -> None:
    peers: BusyPeers[str] = BusyPeers()
    peers.note("a", 2, 10.0)
    assert [peers.until("a", priority) for priority in range(4)] == [0, 0, 10, 10]
    peers.note("a", 1, 5.0)
    assert [peers.until("a", priority) for priority in range(4)] == [0, 5, 10, 10]
    assert peers.until("b", 3) == 0


def test_busy_peers_do_not_grow_without_end() -> None:
    peers: BusyPeers[int] = BusyPeers()
    for peer in range(BUSY_PEERS_MAX + 1):
        peers.note(peer, 0, 1.0)
    assert peers.until(0, 0) == 0
    assert peers.until(1, 0) == peers.until(BUSY_PEERS_MAX, 0) == 1.0
