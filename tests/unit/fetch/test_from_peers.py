"""Chunks from several peers at once: each from one that has it, and what fails at one comes from another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.core.schedule import Priority
from p2pgz.core.standing import Fault
from p2pgz.errors import PoolFull
from p2pgz.fetch.from_peers import take_from_peers
from p2pgz.testing.conformance_pool import check_content
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
    return await take_from_peers(taker.exchange, taker.pool, taker.segment, chunks, Priority.FILL)


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
