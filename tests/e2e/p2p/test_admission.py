"""Who may take part in the DHT, over real libp2p connections: keys that are wrong, and keys that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.errors import P2pgzError
from p2pgz.p2p.dht import Dht
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.kadmsg import KadMessage, Kind, decode, encode
from p2pgz.testing.dht import contact_of, listening_dht

OLD, NEW = b"o" * 32, b"n" * 32
KEY = b"\x12\x20" + bytes(32)

pytestmark = pytest.mark.trio


async def talks(one: Dht, other: Dht) -> bool:
    """Whether one gets an answer of the other's DHT."""
    question = encode(KadMessage(Kind.FIND_NODE, KEY))
    try:
        with trio.fail_after(10):
            answer = await one.kad.network.ask(contact_of(other), one.kad.protocol, question)
    except P2pgzError:
        return False
    return decode(answer).kind is Kind.FIND_NODE


async def test_who_waits_for_a_greeting_of_another_is_not_let_through_by_it() -> None:
    async with (
        listening_dht(admission=Admission(cluster_keys=[OLD])) as one,
        listening_dht(admission=Admission(cluster_keys=[NEW])) as other,
    ):
        told: list[bool] = []

        async def ask() -> None:
            told.append(await talks(one, other))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert told == [False] * 3


async def test_everybody_shows_what_he_knows_again_when_keys_change() -> None:
    held = [Admission(cluster_keys=[OLD]) for _ in range(2)]
    async with listening_dht(admission=held[0]) as one, listening_dht(admission=held[1]) as other:
        assert await talks(one, other)
        assert await talks(other, one)
        held[0].adopt(Admission(cluster_keys=[NEW]))
        await one.readmit()
        assert not await talks(one, other)
        assert not await talks(other, one)
        held[1].adopt(Admission(cluster_keys=[NEW, OLD]))
        await other.readmit()
        assert await talks(one, other)
        assert await talks(other, one)


async def test_who_is_on_the_list_needs_no_key() -> None:
    listed = Identity.new()
    held = Admission(cluster_keys=[NEW], allowed=[listed.peer_id])
    async with (
        listening_dht(admission=held) as one,
        listening_dht(identity=listed) as guest,
        listening_dht() as stranger,
    ):
        assert await talks(guest, one)
        assert await talks(one, guest)
        assert not await talks(stranger, one)
        assert not await talks(one, stranger)


async def test_a_third_host_notices_that_two_have_one_identity() -> None:
    """They never meet each other; each greets the third when it connects."""
    copied = Identity.new()
    async with (
        listening_dht() as third,
        listening_dht(identity=copied) as one,
        listening_dht(identity=copied) as twin,
    ):

        async def come_and_go(dht: Dht) -> None:
            await dht.greet(contact_of(third))
            await dht.host.disconnect(third.host.peer)
            await settled(lambda: third.host.peer not in dht.host.connected())
            await settled(lambda: copied.peer_id.raw not in third.host.connected())

        await come_and_go(one)
        await come_and_go(twin)
        assert third.twins.found == set()
        await one.greet(contact_of(third))
        await settled(lambda: third.twins.found == {copied.peer_id.raw})


async def settled(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)
