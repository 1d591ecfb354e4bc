"""`p2pgz find` in a simulated DHT: each provider with the way that led to it."""

from __future__ import annotations

import hashlib

import pytest
import trio
from trio.testing import MockClock

from p2pgz.core.digest import Digest
from p2pgz.core.pointers import Share
from p2pgz.p2p.finding import Found, How, finding
from p2pgz.testing.kad_network import SimulatedNetwork, SimulatedNode, contact_of

TOC = Digest(hashlib.sha256(b"toc").digest())
CHUNK = Digest(hashlib.sha256(b"chunk").digest())
OTHER = Digest(hashlib.sha256(b"another chunk").digest())


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def grown(nursery: trio.Nursery, size: int) -> tuple[SimulatedNetwork, list[SimulatedNode]]:
    network = SimulatedNetwork(nursery)
    nodes = [network.start(number, bootstrap=lambda: [contact_of(0)]) for number in range(size)]
    await trio.sleep(60)
    return network, nodes


async def found_by(node: SimulatedNode, digest: Digest) -> list[Found]:
    async with finding(node.kad, digest) as found:
        return [each async for each in found]


@pytest.mark.trio
async def test_a_holder_that_is_asked_speaks_for_itself(clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        _, nodes = await grown(nursery, 6)
        nodes[3].things.own.add(CHUNK.raw)
        (found,) = await found_by(nodes[1], CHUNK)
        assert found == Found(nodes[3].contact, How.ITSELF, nodes[3].contact.peer)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_record_is_told_from_a_pointer(clock: MockClock) -> None:
    """The provider of the TOC has lost its chunks, so that it does not speak for itself."""
    async with trio.open_nursery() as nursery:
        _, nodes = await grown(nursery, 30)
        provider = nodes[2]
        provider.announcer.provide(TOC.multihash)
        await trio.sleep(5)
        by_record = await found_by(nodes[1], TOC)
        assert {each.contact for each in by_record} == {provider.contact}
        assert by_record[0].how in (How.RECORD, How.ITSELF)
        for node in nodes[10:20]:
            share = Share.of(TOC.raw, [CHUNK.raw], complete=True)
            node.kad.pointers.put(provider.contact.peer, share, trio.current_time())
        (by_pointer,) = await found_by(nodes[1], CHUNK)
        assert (by_pointer.contact, by_pointer.how, by_pointer.toc) == (provider.contact, How.POINTER, None)
        assert by_pointer.server in {node.contact.peer for node in nodes[10:20]}
        share = Share.of(TOC.raw, [OTHER.raw], complete=True)
        nodes[12].kad.pointers.put(provider.contact.peer, share, trio.current_time())
        (by_own,) = await found_by(nodes[12], OTHER)
        assert (by_own.how, by_own.toc, by_own.server) == (How.POINTER, TOC, nodes[12].contact.peer)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_the_first_provider_comes_before_the_walk_has_ended(clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        network, nodes = await grown(nursery, 30)
        nodes[3].things.own.add(CHUNK.raw)
        network.silent.update(node.contact.peer for node in nodes[10:20])
        begin = trio.current_time()
        async with finding(nodes[25].kad, CHUNK) as found:
            assert (await anext(found)).contact == nodes[3].contact
            assert trio.current_time() - begin < 2
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_an_error_in_the_body_comes_out_as_it_is(clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        _, nodes = await grown(nursery, 3)
        with pytest.raises(KeyError):
            async with finding(nodes[0].kad, CHUNK):
                raise KeyError("mine")
        nursery.cancel_scope.cancel()
