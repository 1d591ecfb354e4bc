"""When providers are looked up again: soon while there are none, ever more seldom while nobody misses anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Standing
from p2pgz.errors import SourceUnavailable
from p2pgz.fetch import discovery as module
from p2pgz.fetch.discovery import Discovery
from p2pgz.fetch.shares import Shares
from p2pgz.pool.memory import MemoryPool

pytestmark = pytest.mark.trio
SWARM = Digest.of(b"toc").raw
ADDRESS = PeerAddress.of_ip("127.0.0.1", 4801).to_bytes()


def contact(number: int) -> Contact:
    return Contact(PeerId.of_ed25519(bytes([number]) * 32).raw, (ADDRESS,))


class FakeExchange:
    """Peers answer at once, or (`dead`) after three seconds not at all."""

    own_id = PeerId(contact(0).peer)

    def __init__(self) -> None:
        self.standing = Standing()
        self.dead: set[PeerId] = set()
        self.met: list[PeerId] = []

    def connections(self) -> list[Any]:
        return []

    def connection(self, peer: PeerId) -> Any:
        return peer if peer in self.met else None

    async def connect(self, host: str, port: int, *, expected: PeerId, **_: Any) -> None:
        if expected in self.dead:
            await trio.sleep(3)
            raise SourceUnavailable("nobody there")
        await trio.lowlevel.checkpoint()
        self.met.append(expected)


class FakeDht:
    """Names `known` as providers of everything, and notes when it was asked."""

    def __init__(self) -> None:
        self.known: list[Contact] = []
        self.asked: list[float] = []
        self.kad = SimpleNamespace(providers=self.providers)

    @asynccontextmanager
    async def providers(self, key: bytes, *, wanted: int) -> AsyncIterator[AsyncIterator[Contact]]:
        self.asked.append(trio.current_time())

        async def found() -> AsyncIterator[Contact]:
            for each in self.known:
                await trio.lowlevel.checkpoint()
                yield each

        yield found()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Discovery, FakeExchange, FakeDht]]:
    exchange, dht = FakeExchange(), FakeDht()
    pool: Any = MemoryPool()
    peers: Any = exchange
    discovery = Discovery(peers, pool, Shares())
    discovery.dht = dht  # type: ignore[assignment]  # the fake
    async with trio.open_nursery() as nursery:
        nursery.start_soon(discovery.run)
        yield discovery, exchange, dht
        nursery.cancel_scope.cancel()


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_idle_mounts_cost_ever_less(clock: MockClock) -> None:
    async with running() as (discovery, exchange, dht):
        dht.known = [contact(1)]
        discovery.interested(SWARM)
        await trio.sleep(1)
        assert exchange.met == [PeerId(contact(1).peer)]
        await trio.sleep(24 * 3600)
        assert len(dht.asked) < 60
        before = len(dht.asked)
        discovery.missed(SWARM)
        await trio.sleep(1)
        assert len(dht.asked) == before + 1
        for _ in range(20):  # a reader that misses chunk after chunk
            discovery.missed(SWARM)
            await trio.sleep(1)
        assert len(dht.asked) == before + 1
        discovery.uninterested(SWARM)
        await trio.sleep(24 * 3600)
        assert len(dht.asked) == before + 1


async def test_while_there_is_nobody_it_looks_again_soon(clock: MockClock) -> None:
    async with running() as (discovery, exchange, dht):
        discovery.interested(SWARM)
        await trio.sleep(2 * module.SOON_SECONDS)
        assert len(dht.asked) == 2
        await trio.sleep(3600)
        assert len(dht.asked) < 20
        dht.known = [contact(2)]
        discovery.missed(SWARM)
        await trio.sleep(1)
        assert exchange.met == [PeerId(contact(2).peer)]


async def test_a_provider_that_is_gone_holds_up_no_other(clock: MockClock) -> None:
    async with running() as (discovery, exchange, dht):
        dht.known = [contact(number) for number in range(1, 6)]
        exchange.dead = {PeerId(contact(number).peer) for number in range(1, 5)}
        discovery.interested(SWARM)
        await trio.sleep(0.5)
        assert exchange.met == [PeerId(contact(5).peer)]


async def test_without_a_dht_nobody_is_found(clock: MockClock) -> None:
    async with running() as (discovery, _, dht):
        discovery.dht = None
        assert await discovery.find(Digest(SWARM)) == 0
        discovery.interested(SWARM)
        await trio.sleep(10)
        assert dht.asked == []
