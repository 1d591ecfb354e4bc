"""The race on real exchanges and pools: each chunk from a peer that has it, and what fails at one comes from another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.core.media import Descriptor
from p2pgz.core.schedule import Priority
from p2pgz.core.standing import Fault
from p2pgz.errors import PoolFull
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.race import Race
from p2pgz.fetch.trace import Trace
from p2pgz.testing.conformance_pool import check_content
from p2pgz.testing.memory_source import MemorySource
from p2pgz.testing.peers import Peer, open_peer, peer_layer

LAYER = peer_layer(11)
COUNT = len(LAYER.chunks)
ALL = range(COUNT)
pytestmark = pytest.mark.trio


@asynccontextmanager
async def swarm(tmp_path: Path, *stocks: range) -> AsyncIterator[tuple[Peer, list[Peer]]]:
    """A taker that follows the swarm and knows the bitmaps of givers with these chunks."""
    async with AsyncExitStack() as stack:
        givers = [
            await stack.enter_async_context(open_peer(tmp_path / f"giver{i}", LAYER, chunks=stock))
            for i, stock in enumerate(stocks)
        ]
        taker = await stack.enter_async_context(open_peer(tmp_path / "taker", LAYER, chunks=()))
        taker.exchange.follow(taker.swarm)
        for giver, stock in zip(givers, stocks, strict=True):
            connection = await taker.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
            with trio.fail_after(5):
                while connection.bitmaps.count(taker.swarm) != len(stock):
                    await trio.sleep(0.01)
        yield taker, givers


async def take(taker: Peer, chunks: range = ALL) -> list[int]:
    """Race for chunks without a source; those that would be its own, or the error of the first that failed."""
    left: list[int] = []

    def to_source(origin: Origin, given: Sequence[int]) -> None:
        for n in given:
            origin.flights[n].at_source = True
        left.extend(given)

    async with trio.open_nursery() as nursery:
        descriptor = Descriptor(media_type="", digest=taker.segment.id, size=1)
        origin = Origin(segment=taker.segment, source=MemorySource(), descriptor=descriptor)
        race = Race(taker.exchange, taker.pool, nursery, Counters(), Trace(), to_source)
        race.start(origin, chunks, Priority.FILL, trio.current_time() + 10)
        flights = dict(origin.flights)
        left += [n for n in chunks if n not in flights]
        with trio.fail_after(10):
            while not all(flight.done or n in left for n, flight in flights.items()):
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    for flight in flights.values():
        if flight.error is not None:
            raise flight.error
    return sorted(left)


async def test_each_chunk_comes_from_a_peer_that_has_it(tmp_path: Path) -> None:
    async with swarm(tmp_path, range(20), range(10, COUNT)) as (taker, givers):
        assert await take(taker) == []
        assert check_content(taker.segment, LAYER) == COUNT
        assert sum(giver.exchange.uploads.chunks for giver in givers) == COUNT


async def test_what_no_peer_has_is_left_over(tmp_path: Path) -> None:
    async with swarm(tmp_path, range(5), range(3, 8)) as (taker, _):
        assert await take(taker) == list(range(8, COUNT))
        assert check_content(taker.segment, LAYER) == 8


async def test_without_peers_everything_is_left_over_at_once(tmp_path: Path) -> None:
    async with swarm(tmp_path) as (taker, _):
        assert await take(taker) == list(ALL)


async def test_corrupt_peer_is_dropped_and_another_one_answers(tmp_path: Path) -> None:
    async with swarm(tmp_path, ALL, ALL) as (taker, givers):
        bad = next(g for g in givers if g.id == taker.exchange.holders(taker.swarm, 0)[0])
        offer = bad.exchange._offers.swarm(taker.swarm)
        assert offer is not None

        def damaged(n: int, offset: int, into: memoryview) -> bool:
            into[:] = bytes(len(into))
            return True

        offer.read_cached = damaged  # type: ignore[method-assign]
        assert await take(taker) == []
        assert check_content(taker.segment, LAYER) == COUNT
        assert taker.exchange.standing.counts == {Fault.CORRUPT: 1}
        assert taker.exchange.connection(bad.id) is None


async def test_full_disk_is_our_own_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path, ALL) as (taker, givers):

        async def full(*arguments: object) -> None:
            raise PoolFull("no room")

        monkeypatch.setattr(taker.pool, "add_many", full)
        with pytest.raises(PoolFull):
            await take(taker)
        assert not taker.exchange.standing.counts
        assert taker.exchange.connection(givers[0].id) is not None
