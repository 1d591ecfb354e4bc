"""Whom to dial when: without a clock, a network or a thread."""

from __future__ import annotations

import itertools
import random

import pytest

from p2pgz.core.joining import (
    ADDRESSES_PER_NAME_MAX,
    DIALS_MAX,
    OFFERS_MAX,
    PROBE_SECONDS,
    REFRESH_SECONDS,
    RETRY_MAX_SECONDS,
    Joining,
    Steps,
    Target,
)
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId

SEED = 7


def peer(n: int) -> PeerId:
    return PeerId.of_ed25519(n.to_bytes(32, "big"))


OWN = peer(0)


def address(n: int, expected: PeerId | None = None) -> PeerAddress:
    return PeerAddress("ip4", f"192.0.2.{n}", 4001, expected)


def joining(*entries: PeerAddress, **options: int) -> Joining:
    return Joining(entries, own=OWN, random=random.Random(SEED).random, **options)


def hosts(steps: Steps) -> set[int]:
    return {number(target) for target in steps.dials}


def number(target: Target) -> int:
    return int(target.endpoint.host.rpartition(".")[2])


def test_at_most_as_many_are_dialled_as_are_missing() -> None:
    state = joining(*map(address, range(1, 10)))
    first = state.decide(0.0, [])
    assert len(first.dials) == DIALS_MAX
    assert state.decide(0.0, []).dials == []
    for target in first.dials:
        state.dialled(target, peer(number(target)), 0.1)
    connected = {peer(number(target)) for target in first.dials}
    assert state.decide(0.2, connected).dials == []
    connected.pop()
    assert len(state.decide(3.0, connected).dials) == 1


def test_all_there_are_is_enough() -> None:
    state = joining(address(1), address(2))
    for target in state.decide(0.0, []).dials:
        state.dialled(target, peer(number(target)), 0.1)
    for second in range(1, 100):
        assert state.decide(float(second), {peer(1), peer(2)}).dials == []


def test_failures_back_off_and_stay_below_half_a_minute() -> None:
    state = joining(address(1))
    now, times = 0.0, []
    while now < 300.0:
        steps = state.decide(now, [])
        for target in steps.dials:
            times.append(now)
            state.dial_failed(target, "refused", now)
        now += 0.05
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[0] <= 0.3
    assert gaps == sorted(gaps[:6]) + gaps[6:]
    assert max(gaps) <= RETRY_MAX_SECONDS + 0.1
    assert 15 <= len(times) <= 35


def test_entries_and_offers_take_turns() -> None:
    state = joining(address(1), address(2), address(3))
    for n in range(10, 40):
        state.offer(peer(n), [address(n)])
    dialled = hosts(state.decide(0.0, []))
    assert len(dialled & {1, 2, 3}) == 2
    assert len(dialled) == 4


def test_entry_counts_once_however_often_it_is_named() -> None:
    state = joining(address(1), address(1, peer(1)), address(1))
    state.offer(peer(9), [address(1)])
    (target,) = state.decide(0.0, []).dials
    assert target.expected == peer(1)


def test_configured_address_wins_over_a_remembered_peer_there() -> None:
    state = joining(address(1))
    state.offer(peer(9), [address(1)])
    (target,) = state.decide(0.0, []).dials
    assert target.expected is None


def test_peer_with_two_addresses_is_dialled_once_at_a_time() -> None:
    state = joining()
    state.offer(peer(1), [address(1), address(2)])
    (target,) = state.decide(0.0, []).dials
    assert state.decide(0.0, []).dials == []
    state.dial_failed(target, "refused", 0.0)
    (other,) = state.decide(0.0, []).dials
    assert other.endpoint != target.endpoint
    state.dialled(other, peer(1), 0.0)
    assert state.decide(60.0, {peer(1)}).dials == []


def test_ourselves_are_never_dialled_again() -> None:
    state = joining(address(1), address(2, OWN), address(3))
    state.offer(OWN, [address(4)])
    steps = state.decide(0.0, [], is_own=lambda endpoint: endpoint.host == "192.0.2.3")
    assert hosts(steps) == {1}
    state.dialled(steps.dials[0], OWN, 0.1)
    assert all(state.decide(float(second), []).dials == [] for second in range(100))
    assert {row["state"] for row in state.status(1.0, [])} == {"own", "waiting"}


def test_peer_that_sends_us_away_is_dialled_ever_more_seldom() -> None:
    """It does not admit us: each dial succeeds, and the connection is gone a moment later."""
    state = joining(address(1))
    dials, now = [], 0.0
    while now < 300.0:
        for target in state.decide(now, []).dials:
            dials.append(now)
            state.dialled(target, peer(1), now)
            state.decide(now, {peer(1)})
        now += 0.1
    assert 10 < len(dials) < 25
    state.dialled(target, peer(1), now)
    for second in range(7):  # now it lets us stay, and is lost later
        state.decide(now + second, {peer(1)})
    assert state.decide(now + 8, []).dials == [target]


def test_first_connection_after_none_ends_all_waiting() -> None:
    state = joining(*map(address, range(1, 5)))
    now = 0.0
    while now < 200.0:
        for target in state.decide(now, []).dials:
            state.dial_failed(target, "unreachable", now)
        now += 0.5
    assert min(target.due for target in state._all_targets()) > now - 1
    state.decide(now, {peer(99)})
    assert len(state.decide(now + 1.0, {peer(99)}).dials) == 3


@pytest.mark.parametrize(("members", "least", "most"), [(5, 90, 210), (1000, 1, 3)])
def test_content_node_probes_now_and_then_the_more_members_the_more_seldom(
    members: int, least: int, most: int
) -> None:
    state = joining(address(1))
    others = {peer(n) for n in range(2, 7)}
    count = 0
    for second in range(int(100 * PROBE_SECONDS)):
        for target in state.decide(float(second), others, members=members).dials:
            count += 1
            state.dial_failed(target, "unreachable", float(second))
    assert least <= count <= most


def test_two_halves_each_content_with_itself_find_together() -> None:
    """Ten nodes in two halves, no entries: lost peers were offered while they were connected."""
    state = joining()
    for n in range(1, 10):
        state.offer(peer(n), [address(n)])
    half = {peer(n) for n in range(1, 5)}
    for second in range(600):
        for target in state.decide(float(second), half).dials:
            state.dial_failed(target, "unreachable", float(second))
    healed = 600.0
    for second in range(30):
        dials = state.decide(healed + second, half).dials
        if dials:
            assert hosts(Steps(dials, [], 0.0)) <= {5, 6, 7, 8, 9}
            return
    raise AssertionError("no probe within 30 s")


def test_name_is_asked_again_soon_while_peers_are_missing_and_seldom_otherwise() -> None:
    entry = PeerAddress.parse("/dns/seed.example/tcp/4001")
    state = joining(entry)
    asked = []
    for second in range(120):
        for found in state.decide(float(second), []).lookups:
            asked.append(second)
            state.lookup_failed(found, "no such name", float(second))
    assert 5 <= len(asked) <= 15
    assert asked[:2] == [0, 1]
    four = {peer(n) for n in range(1, 5)}
    asked = []
    for second in range(120, 120 + int(4 * REFRESH_SECONDS)):
        for found in state.decide(float(second), four).lookups:
            asked.append(second)
            state.resolved(found, ["192.0.2.1"], float(second))
    assert 3 <= len(asked) <= 8
    assert state.decide(1000.0, []).lookups  # at once when they are lost


def test_addresses_of_a_name_come_and_go() -> None:
    state = joining(PeerAddress.parse("/dns/seed.example/tcp/4001"))
    (entry,) = state.decide(0.0, []).lookups
    assert state.decide(9.0, []).lookups == []
    state.resolved(entry, ["192.0.2.1", "192.0.2.2"], 0.0)
    dials = state.decide(0.0, []).dials
    assert hosts(Steps(dials, [], 0.0)) == {1, 2}
    for target in dials:
        state.dial_failed(target, "refused", 0.0)
    state.resolved(entry, ["192.0.2.2", "192.0.2.3"], 0.0)
    assert hosts(state.decide(0.0, [])) == {3}
    state.resolved(entry, (f"10.0.{n // 250}.{n % 250}" for n in range(2000)), 1.0)
    assert len(entry.targets) == ADDRESSES_PER_NAME_MAX


def test_dead_name_keeps_the_addresses_known_before() -> None:
    state = joining(PeerAddress.parse("/dns/seed.example/tcp/4001"))
    (entry,) = state.decide(0.0, []).lookups
    state.resolved(entry, ["192.0.2.1"], 0.0)
    (entry,) = state.decide(5.0, []).lookups
    state.lookup_failed(entry, "no answer", 5.0)
    assert state.ips() == ["192.0.2.1"]
    assert state.status(6.0, [])[0]["error"] == "no answer"


def test_many_dead_remembered_peers_do_not_become_a_scan() -> None:
    state = joining()
    for n in range(1, 3 * OFFERS_MAX):
        state.offer(peer(n), [address(n)])
    assert len(list(state._all_targets())) == OFFERS_MAX
    count = 0
    for step in range(6000):
        for target in state.decide(600 + step / 10, []).dials:
            count += step > 3000
            state.dial_failed(target, "unreachable", 600 + step / 10)
    assert count < 300  # in 300 s


def test_status_says_what_is_wrong_and_since_when() -> None:
    state = joining(address(1), address(2, peer(2)), address(3), PeerAddress.parse("/dns/seed/tcp/1"))
    steps = state.decide(10.0, [])
    outcome = {number(target): target for target in steps.dials}
    state.dialled(outcome[1], peer(1), 11.0)
    state.dial_failed(outcome[2], "refused", 11.0)
    state.lookup_failed(steps.lookups[0], "no such name", 11.0)
    rows = {row["entry"]: row for row in state.status(15.0, {peer(1)})}
    assert [row["state"] for row in rows.values()] == ["connected", "failing", "waiting", "failing"]
    assert rows["/ip4/192.0.2.1/tcp/4001"]["peer_id"] == str(peer(1))
    failing = rows[str(address(2, peer(2)))]
    assert (failing["error"], failing["since_seconds"]) == ("refused", 4.0)
    assert rows["/dns/seed/tcp/1"]["error"] == "no such name"
    (again,) = [t for t in state.decide(12.0, {peer(1)}).dials if number(t) == 2]
    state.dial_failed(again, "unreachable", 12.0)
    assert state.status(15.0, [])[0]["state"] == "reached"
    assert state.status(15.0, [])[1]["since_seconds"] == 4.0  # still the same failure: since the first


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_entry_is_tried_within_half_a_minute(seed: int) -> None:
    rng = random.Random(seed)
    state = Joining(map(address, range(1, 6)), own=OWN, random=rng.random)
    for n in range(100, 160):
        state.offer(peer(n), [PeerAddress("ip4", f"198.51.100.{n}", 4001)])
    last = dict.fromkeys(range(1, 6), 0.0)
    flying: list[tuple[float, Target]] = []
    now = 0.0
    while now < 400.0:
        for done, target in [item for item in flying if item[0] <= now]:
            flying.remove((done, target))
            state.dial_failed(target, "no answer", now)
        for target in state.decide(now, []).dials:
            if target.literal:
                last[number(target)] = now
            flying.append((now + rng.choice([0.01, 0.1, 3.0]), target))
        assert all(now - then < 30.0 for then in last.values()), (now, last)
        now += 0.1


def test_offers_without_an_address_to_dial_are_no_offers() -> None:
    state = joining()
    state.offer(peer(1), [PeerAddress("dns", "seed.example.org", 4001), PeerAddress("ip4", "192.0.2.1", 0)])
    state.offer(peer(2), [address(n) for n in range(10, 60)])
    assert hosts(state.decide(0.0, [])) <= set(range(10, 60))


def test_peer_that_was_reached_before_is_still_the_same() -> None:
    state = joining(address(1))
    (target,) = state.decide(0.0, []).dials
    state.dialled(target, peer(1), 1.0)
    state.dialled(target, peer(1), 9.0)
    assert target.since == 1.0


def test_other_entries_keep_what_is_known_of_those_that_stay() -> None:
    state = joining(address(1), address(2))
    for target in state.decide(0.0, []).dials:
        state.dial_failed(target, "refused", 0.0)
    state.configure([address(2), address(3), address(3)])
    assert [str(entry.address) for entry in state.entries] == [str(address(2)), str(address(3))]
    assert hosts(state.decide(0.01, [])) == {3}
    assert hosts(state.decide(60.0, [])) == {2}
