"""Who is asked when: every rule of the race, with peers that do as they are told, on a mock clock."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pgz.core import race as rules
from p2pgz.core.ports import PeerAnswer
from p2pgz.core.schedule import Priority
from p2pgz.errors import P2pgzError, PeerFault, PoolFull, SourceUnavailable
from p2pgz.fetch import chase as chase_module
from p2pgz.fetch.chase import BUSY_ASKS_MAX, Chase
from p2pgz.fetch.race import CHASE_BYTES_MAX, LATE_PEERS_SECONDS
from tests.unit.fetch.racing import (
    Fate,
    Give,
    busy,
    drips,
    fails,
    gives,
    hangs,
    lacks,
    racing,
)

GONE = SourceUnavailable("gone")
LIED = PeerFault("a frame nobody asked for")


@pytest.mark.trio
async def test_quickest_holder_is_asked_and_nobody_else(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"near": gives(0.01), "far": gives(0.01)}
        assert await b.read([0, 1, 2]) == 0.01
        assert [asked.peer for asked in b.peers.asked] == ["near"]
        assert not b.lane.given
        assert (b.counters.peer_chunks, b.counters.peer_bytes) == (3, 300)
        assert (
            b.race.swarm_is_followed(b.origin) if hasattr(b.race, "swarm_is_followed") else b.peers.followed
        )


@pytest.mark.trio
async def test_work_is_shared_among_holders(autojump_clock: MockClock) -> None:
    async with racing(chunks=6, chunk_bytes=CHASE_BYTES_MAX // 2) as b:
        b.peers.fates = {"one": gives(0.01), "two": gives(0.01)}
        await b.read(range(6))
        assert {asked.peer for asked in b.peers.asked} == {"one", "two"}
        assert all(len(asked.chunks) <= 2 for asked in b.peers.asked)  # a chase has its limit


@pytest.mark.trio
async def test_second_holder_is_asked_when_the_first_is_slower_than_it_uses_to_be(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": hangs, "other": gives(0.01)}
        for _ in range(20):
            b.race.latencies(b.peers.id("slow")).sample(0.03)
        assert await b.read([0, 1]) == 0.04
        assert b.peers.times("other") == [0.03]
        await trio.testing.wait_all_tasks_blocked()
        assert b.peers.cancelled == ["slow"]
        assert not b.lane.given


@pytest.mark.trio
async def test_peer_without_history_is_given_a_guess(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": hangs, "other": gives()}
        assert await b.read([0]) == rules.HEDGE_UNKNOWN_SECONDS


@pytest.mark.trio
async def test_background_is_not_hedged(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": gives(0.5), "other": gives()}
        assert await b.read([0], Priority.FILL) == 0.5
        assert not b.peers.times("other")


@pytest.mark.trio
async def test_who_has_begun_to_answer_is_not_hedged(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"steady": drips(0.08), "other": gives()}
        assert await b.read([0, 1, 2]) == 0.24
        assert not b.peers.times("other")


@pytest.mark.trio
async def test_hedges_keep_to_their_share(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "HEDGE_ALLOWANCE_BYTES", 0)
    async with racing(chunks=60) as b:
        b.peers.fates = {"slow": gives(0.5), "other": gives()}
        b.peers.has = {"slow": set(range(60))}
        for n in range(60):
            await b.read([n])
        asked, hedged = b.race.budget.asked_bytes, b.race.budget.hedged_bytes
        assert 0 < hedged <= rules.HEDGE_SHARE * asked
        assert len(b.peers.times("other")) * 100 == hedged


@pytest.mark.trio
async def test_hedge_that_nobody_could_take_costs_nothing(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": gives(0.5)}
        await b.read([0])
        assert b.race.budget.hedged_bytes == 0


@pytest.mark.trio
async def test_source_is_asked_after_a_second_without_progress_and_peers_go_on(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": gives(1.5)}
        assert await b.read([0, 1]) == 1.5
        assert b.given() == {0: 1.0, 1: 1.0}
        assert b.counters.peer_chunks == 2


@pytest.mark.trio
async def test_source_wins_and_the_peer_is_forgotten(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.lane.seconds = 0.3
        b.peers.fates = {"slow": hangs}
        assert await b.read([0, 1]) == 1.3
        await trio.sleep(1)
        assert b.peers.cancelled == ["slow"]


@pytest.mark.trio
async def test_progress_puts_the_source_off(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"steady": drips(0.9)}
        assert await b.read(range(5)) == 4.5
        assert not b.lane.given


@pytest.mark.trio
async def test_left_overs_go_to_another_holder_at_once_then_to_the_source(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.lane.seconds = 0.01
        b.peers.fates = {"first": lacks({1, 2}), "second": lacks({2})}
        assert await b.read([0, 1, 2]) == 0.01
        assert [(asked.peer, asked.chunks) for asked in b.peers.asked] == [
            ("first", [0, 1, 2]),
            ("second", [1, 2]),
        ]
        assert b.given() == {2: 0.0}


@pytest.mark.trio
async def test_what_no_peer_has_does_not_wait_for_the_rest(autojump_clock: MockClock) -> None:
    """One peer owes us a chunk for a long time; what only the source has is asked there meanwhile."""
    async with racing() as b:
        b.lane.seconds = 0.01
        b.peers.fates = {"slow": gives(0.9), "lacking": lacks({1})}
        b.peers.has = {"slow": {0}, "lacking": {1}}
        await b.read([0, 1])
        assert b.given() == {1: 0.0}


@pytest.mark.trio
@pytest.mark.parametrize("error", [GONE, LIED])
async def test_failing_peers_are_replaced_one_after_the_other(
    autojump_clock: MockClock, error: P2pgzError
) -> None:
    async with racing() as b:
        b.peers.fates = {"a": fails(error), "b": fails(error, 0.01), "c": gives()}
        assert await b.read([0]) == 0.01
        assert [asked.peer for asked in b.peers.asked] == ["a", "b", "c"]
        assert b.counters.peer_failures == 2


@pytest.mark.trio
async def test_peers_that_come_later_are_offered_what_readers_still_wait_for(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b, trio.open_nursery() as nursery:
        nursery.start_soon(b.race.watch, lambda: [b.origin])

        async def come() -> None:
            await trio.sleep(2)
            b.peers.fates["late"] = gives()

        nursery.start_soon(come)
        seconds = await b.read([0, 1])
        assert 2 <= seconds <= 2 + 2 * LATE_PEERS_SECONDS
        assert b.counters.peer_chunks == 2
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_source_that_fails_does_not_end_what_a_peer_still_brings(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.lane.seconds, b.lane.error = 0.1, GONE
        b.peers.fates = {"slow": gives(3.5)}
        assert await b.read([0]) == 3.5
        assert [seconds for seconds, _ in b.lane.given] == [1.0, 2.0, 3.0]  # and it is asked again meanwhile


@pytest.mark.trio
async def test_peer_that_stops_in_the_middle_is_replaced_though_the_source_fails(
    autojump_clock: MockClock,
) -> None:
    async def stops(chunks: Sequence[int], give: Give) -> None:
        await give(chunks[:1])
        await trio.sleep_forever()

    async with racing() as b:
        b.lane.seconds, b.lane.error = 0.1, GONE
        b.peers.fates = {"stops": stops, "other": stops, "third": gives()}
        assert await b.read([0, 1, 2]) == 2.0
        assert b.peers.times("other") == [1.0]
        assert b.peers.times("third") == [2.0]
        assert b.race.budget.hedged_bytes == 0


@pytest.mark.trio
async def test_nobody_has_it_is_told_by_the_source(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.lane.seconds, b.lane.error = 0.1, GONE
        b.peers.fates = {"a": fails(GONE), "b": lacks({0})}
        with pytest.raises(SourceUnavailable):
            await b.read([0])


@pytest.mark.trio
async def test_reader_is_told_at_its_deadline_though_peers_have_not_given_up(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b:
        b.lane.seconds, b.lane.error = 0.1, GONE
        b.peers.fates = {"silent": hangs, "busy": busy(1e9, 0.3)}
        (flight,) = b.start([0], deadline_seconds=5)
        with pytest.raises(SourceUnavailable), trio.fail_after(5.2):
            await flight.wait()
        assert trio.current_time() == pytest.approx(5.1)


@pytest.mark.trio
async def test_our_own_full_disk_ends_the_flight_and_blames_nobody(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.pool.error = PoolFull("no room")
        b.peers.fates = {"good": gives(), "other": gives()}
        with pytest.raises(PoolFull):
            await b.read([0])
        assert [asked.peer for asked in b.peers.asked] == ["good"]
        assert b.counters.peer_failures == 0


@pytest.mark.trio
async def test_bytes_of_losers_are_counted(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"slow": gives(0.15), "other": drips(0.1)}
        await b.read([0, 1])  # at 0.1 `other` is asked, at 0.15 `slow` gives both
        assert b.counters.wasted_bytes == 0
        await trio.testing.wait_all_tasks_blocked()
        assert b.peers.cancelled == ["other"]

        async def both(chunks: Sequence[int], give: Give) -> None:
            await trio.sleep(0.2)
            await give(chunks)

        b.peers.fates = {"one": both, "two": both}
        b.start([2, 3])
        await trio.sleep(0.1)
        b.origin.segment.presence.set(2)  # somebody else was quicker
        await trio.sleep(1)
        assert b.counters.wasted_bytes == 100


# --- busy peers


@pytest.mark.trio
async def test_busy_peer_is_asked_again_when_it_said(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"busy": busy(2, 0.3)}
        assert await b.read([0, 1]) == 0.6
        assert b.peers.times("busy") == [0.0, 0.3, 0.6]
        assert not b.lane.given


@pytest.mark.trio
async def test_better_source_than_a_busy_peer_is_asked_at_once(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"busy": busy(1, 0.3), "idle": gives(0.01)}
        assert await b.read([0]) == 0.01
        assert b.peers.times("busy") == [0.0]


@pytest.mark.trio
async def test_peer_that_a_busy_one_names_is_asked_as_soon_as_it_is_there(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"busy": busy(100, 4.0)}

        async def come() -> None:
            await trio.sleep(0.5)
            b.peers.fates["named"] = gives()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            assert await b.read([0]) <= 0.5 + chase_module.LOOK_SECONDS
        assert b.peers.times("busy") == [0.0]


@pytest.mark.trio
async def test_all_chases_leave_a_busy_peer_alone(autojump_clock: MockClock) -> None:
    async with racing() as b, trio.open_nursery() as nursery:
        b.peers.fates = {"busy": busy(1, 0.3)}
        nursery.start_soon(b.read, [0])
        await trio.sleep(0.1)
        nursery.start_soon(b.read, [1])
        await trio.sleep(0.1)
        assert b.peers.times("busy") == [0.0]


@pytest.mark.trio
async def test_peer_without_room_for_the_background_is_asked_for_a_blocked_read(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b:
        b.peers.fates = {"busy": busy(1, 3.0)}
        (flight,) = b.start([0], Priority.FILL)
        await trio.sleep(0.1)
        assert await b.read([1]) == 0.0
        assert not flight.done
        # a reader has come for the other one, too; the lane would say so
        flight.priority = Priority.BLOCKED_READ
        await trio.sleep(2 * chase_module.LOOK_SECONDS)
        assert flight.done
        assert not b.lane.given


@pytest.mark.trio
async def test_busy_peer_does_not_keep_the_source_out(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.lane.seconds = 0.2
        b.peers.fates = {"busy": busy(1e9, 0.1)}
        assert await b.read([0]) == 1.2
        await trio.sleep(1)
        asked = len(b.peers.asked)
        await trio.sleep(10)
        assert len(b.peers.asked) == asked <= 14  # and it is not asked for what is here


@pytest.mark.trio
async def test_peer_that_is_always_busy_is_given_up(autojump_clock: MockClock) -> None:
    async with racing() as b:
        b.peers.fates = {"busy": busy(1e9, 0.0)}
        (flight,) = b.start([0], Priority.FILL)
        await trio.sleep(30)
        assert len(b.peers.asked) == BUSY_ASKS_MAX
        assert not flight.chased
        assert flight.at_source


# --- what must always hold


@pytest.mark.trio
async def test_waiting_is_not_spinning(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = Chase._step

    def counted(chase: Chase, nursery: trio.Nursery) -> float:
        nonlocal steps
        steps += 1
        return step(chase, nursery)

    monkeypatch.setattr(Chase, "_step", counted)
    async with racing() as b:
        b.peers.fates = {"silent": hangs}
        b.start([0, 1])
        await trio.sleep(10)
        assert steps <= 10 / chase_module.LOOK_SECONDS + 5


@pytest.mark.trio
async def test_bug_in_a_peer_costs_it_its_turn_and_not_the_reader_the_chunk(
    autojump_clock: MockClock,
) -> None:
    async with racing() as b:
        b.lane.seconds = 0.1
        b.peers.fates = {"broken": _raises}
        assert await b.read([0]) == 0.1


async def _raises(chunks: Sequence[int], give: Give) -> None:
    await trio.lowlevel.checkpoint()
    raise RuntimeError("a bug")


def _any_fate(rng: random.Random) -> Fate:
    """A peer that does something else each time."""

    async def fate(chunks: Sequence[int], give: Give) -> PeerAnswer:
        left = list(chunks)
        while left:
            await trio.sleep(rng.choice([0, 0.01, 0.05, 0.3, 1.5]))
            if rng.random() < 0.2:
                if rng.random() < 0.3:
                    await trio.sleep_forever()
                if rng.random() < 0.5:
                    raise rng.choice([GONE, LIED])
                some = sorted(rng.sample(left, rng.randint(0, len(left))))
                rest = [n for n in left if n not in some]
                return PeerAnswer(missing=some, busy=rest, retry_seconds=rng.choice([0, 0.1, 7]))
            some = sorted(rng.sample(left, rng.randint(1, len(left))))
            await give(some)
            left = [n for n in left if n not in some]
        return PeerAnswer()

    return fate


async def _live(seed: int) -> None:
    rng = random.Random(seed)
    async with racing(chunks=20) as b, trio.open_nursery() as nursery:
        names = ["a", "b", "c", "d"][: rng.randint(1, 4)]
        b.peers.fates = {name: _any_fate(rng) for name in names}
        b.peers.has = {name: set(rng.sample(range(20), rng.randint(1, 20))) for name in names}
        b.lane.seconds = rng.choice([0.05, 0.5, 5.0])
        b.lane.error = GONE if rng.random() < 0.3 else None
        nursery.start_soon(b.race.watch, lambda: [b.origin])
        flights = {}
        for _ in range(rng.randint(1, 5)):
            wanted = [n for n in rng.sample(range(20), rng.randint(1, 8)) if n not in flights]
            flights |= {
                flight.n: flight
                for flight in b.start(sorted(wanted), Priority(rng.randrange(4)), deadline_seconds=20)
            }
            if rng.random() < 0.3 and len(b.peers.fates) > 1:
                b.peers.has[rng.choice(names)] = set()
            await trio.sleep(rng.choice([0, 0.1, 1]))
        with trio.move_on_after(20 + 1 + b.lane.seconds):
            for flight in flights.values():
                with trio.move_on_after(1e6):
                    await _ended(flight)
        await trio.sleep(0.5)
        waited = [f for f in flights.values() if f.priority <= Priority.READ_AHEAD]
        assert all(flight.done for flight in waited), [f.n for f in waited if not f.done]
        ends = [n for n, flight in flights.items() if flight.done]
        assert all(n not in b.origin.flights for n in ends)
        for n in ends:
            if flights[n].error is None:
                assert b.origin.segment.presence.has(n)
        if b.lane.error is None:
            assert all(flight.done and flight.error is None for flight in flights.values())
        per_chunk = b.counters.peer_bytes // 100
        assert per_chunk <= len(flights)  # what a loser brings is not counted twice
        assert b.counters.wasted_bytes % 100 == 0
        nursery.cancel_scope.cancel()


async def _ended(flight: object) -> None:
    try:
        await flight.wait()  # type: ignore[attr-defined]
    except P2pgzError:
        return


@settings(max_examples=60, deadline=None)
@example(2076)  # two peers brought the same chunk at the same moment
@example(66697)  # offered to peers at the very moment at which the source failed, beyond the deadline
@given(st.integers(0, 2**32))
def test_every_flight_ends_whatever_peers_and_source_do(seed: int) -> None:
    trio.run(_live, seed, clock=MockClock(autojump_threshold=0))
