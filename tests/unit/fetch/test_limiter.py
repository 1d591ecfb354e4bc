"""Rates: the background pays for what readers take, and readers wait for nobody."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pgz.core.schedule import Priority
from p2pgz.fetch.limiter import Throttle, always
from p2pgz.fetch.race import CHASE_BYTES_MAX
from tests.unit.fetch.racing import gives, racing
from tests.unit.fetch.test_service import bench

pytestmark = pytest.mark.trio
RATE = 1000
BURST = 250  # bytes: a quarter of a second
# The pool writes in threads; a mock clock that jumps as soon as the loop is idle would count their work as hours
THREADS_SECONDS = 0.01


async def seconds_for(throttle: Throttle, count: int, is_urgent=lambda: False) -> float:
    began = trio.current_time()
    await throttle.take(count, is_urgent)
    return trio.current_time() - began


async def test_background_bytes_keep_to_the_rate(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle(RATE)
    await trio.sleep(10)  # unused so far: a burst may pass
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(throttle.take, 500)
    assert trio.current_time() - began == pytest.approx((5000 - BURST) / RATE)


async def test_a_read_waits_at_most_for_its_own_bytes_and_the_background_pays(
    autojump_clock: trio.testing.MockClock,
) -> None:
    throttle = Throttle(RATE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(throttle.take, 100_000)  # far in debt
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            assert await seconds_for(throttle, 1000, always) <= 1.0 + 1e-9
        # what comes after them in the background waits for all of it
        assert await seconds_for(throttle, 1) == pytest.approx(100.0, abs=4)


async def test_readers_at_the_same_moment_wait_for_their_own_bytes_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    throttle = Throttle(RATE)
    waits = []

    async def read() -> None:
        waits.append(await seconds_for(throttle, 1000, always))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read)
    assert max(waits) <= 1.0 + 1e-9


async def test_bytes_that_somebody_begins_to_wait_for_are_let_go(
    autojump_clock: trio.testing.MockClock,
) -> None:
    throttle = Throttle(RATE)
    wanted = False

    async def want() -> None:
        nonlocal wanted
        await trio.sleep(1)
        wanted = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(want)
        assert await seconds_for(throttle, 100_000, lambda: wanted) == pytest.approx(1.0, abs=0.06)


async def test_no_rate_is_no_limit_and_rates_can_be_changed(autojump_clock: trio.testing.MockClock) -> None:
    throttle = Throttle()
    await trio.sleep(10)
    assert await seconds_for(throttle, 1 << 40) == 0
    throttle.bytes_per_second = RATE
    assert await seconds_for(throttle, 1250) == pytest.approx(1.0)


async def test_chunks_of_a_registry_keep_to_its_rate(tmp_path, autojump_clock) -> None:
    autojump_clock.autojump_threshold = THREADS_SECONDS
    async with bench(tmp_path) as b:
        b.fetcher.rates.registry.bytes_per_second = 20_000
        began = trio.current_time()
        await b.fetcher.ensure_chunks(b.segment, range(b.table.chunk_count), Priority.START_UP)
        payload = sum(end - start for _, start, end in b.source.requests)
        assert trio.current_time() - began == pytest.approx(payload / 20_000, abs=1.0)


async def test_a_blocked_read_overtakes_a_background_that_is_held_back(tmp_path, autojump_clock) -> None:
    autojump_clock.autojump_threshold = THREADS_SECONDS
    async with bench(tmp_path) as b:
        throttle = b.fetcher.rates.registry
        throttle.bytes_per_second = 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                b.fetcher.ensure_chunks, b.segment, range(b.table.chunk_count), Priority.START_UP
            )
            await trio.sleep(1.0)
            last = b.table.chunk_count - 1
            assert not b.segment.presence.has(last)
            began = trio.current_time()
            await b.fetcher.ensure_chunks(b.segment, [last], Priority.BLOCKED_READ)
            # the request in flight has it, or a new one brings it: nobody pays the background's debt of a minute
            rest = sum(end - start for _, start, end in b.source.requests)
            assert trio.current_time() - began < rest / 1000
            nursery.cancel_scope.cancel()


async def test_background_fetch_keeps_to_its_rate_with_peers_as_well(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with racing(chunks=6, chunk_bytes=CHASE_BYTES_MAX // 2) as b:
        b.peers.fates = {"near": gives()}
        await trio.sleep(10)
        b.race.rates.fill.bytes_per_second = CHASE_BYTES_MAX
        assert await b.read(range(6), Priority.FILL) == pytest.approx(3 - 0.25)
        assert await b.read(range(6), Priority.BLOCKED_READ) == 0


async def test_a_read_from_peers_waits_at_most_for_its_own_bytes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with racing(chunks=40, chunk_bytes=1000) as b:
        b.peers.fates = {"near": gives()}
        b.race.rates.peers.bytes_per_second = 1000
        b.start(range(30), Priority.READ_AHEAD)
        await trio.testing.wait_all_tasks_blocked()
        assert await b.read([30]) <= 1.0
        assert await b.read([31]) <= 1.0
        assert not b.origin.segment.presence.has(0)
        # somebody begins to wait for one of those that are held back
        began = trio.current_time()
        flight = b.origin.flights[0]
        flight.priority = Priority.BLOCKED_READ
        await flight.wait()
        assert trio.current_time() - began <= 0.1
        assert not b.lane.given
