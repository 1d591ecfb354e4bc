"""The promise: any chunk is found by its digest, a day later, when everybody but its holder has been restarted."""

from __future__ import annotations

import hashlib

import pytest
import trio
from trio.testing import MockClock

from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX
from p2pgz.core.keyspace import KeySet, kad_key
from p2pgz.testing.kad_network import SimulatedNetwork, SimulatedNode, contact_of

SERVERS = 64
CHUNKS = [hashlib.sha256(b"chunk %d" % number).digest() for number in range(400)]
TOC = hashlib.sha256(b"toc").digest()
HOUR = 3600.0


def key(digest: bytes) -> bytes:
    return SHA256_MULTIHASH_PREFIX + digest


def far_chunk(holder: SimulatedNode) -> bytes:
    """A chunk to which the holder is not among the 20 closest servers."""
    servers = KeySet(kad_key(contact_of(number).peer) for number in range(SERVERS))
    own = kad_key(holder.contact.peer)
    return next(chunk for chunk in CHUNKS if own not in servers.closest(kad_key(key(chunk)), 20))


async def start_all(network: SimulatedNetwork, numbers: range) -> None:
    for number in numbers:
        network.start(number, bootstrap=lambda: [contact_of(0)])
    await trio.sleep(120)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.mark.slow
@pytest.mark.trio
@pytest.mark.parametrize(("complete", "hours"), [(True, 25), (False, 2)], ids=["complete", "partial"])
async def test_chunk_is_found_by_digest_after_a_day_and_a_restart_of_all_others(
    clock: MockClock, complete: bool, hours: int
) -> None:
    async with trio.open_nursery() as nursery:
        network = SimulatedNetwork(nursery)
        holder = network.start(0)
        await start_all(network, range(1, SERVERS))
        # filled through bitmaps: the chunks came one by one, and no record was made of any
        holder.things.own.update(CHUNKS)
        holder.announcer.provide(key(TOC))
        holder.announcer.hold(TOC, lambda: CHUNKS, complete=complete)
        chunk = far_chunk(holder)
        await trio.sleep(hours * HOUR)

        client = network.start(SERVERS, bootstrap=lambda: [contact_of(5)])
        await trio.sleep(60)
        assert [holder.contact] == await client.kad.find_providers(key(chunk))

        await start_all(network, range(1, SERVERS))
        await trio.sleep(180)
        client = network.start(SERVERS + 1, bootstrap=lambda: [contact_of(7)])
        await trio.sleep(60)
        missing = [each for each in CHUNKS if not await client.kad.find_providers(key(each), wanted=1)]
        assert missing == []
        assert await client.kad.find_providers(key(hashlib.sha256(b"nobody's").digest())) == []
        nursery.cancel_scope.cancel()
