"""Announced and observed addresses, over real libp2p connections."""

from __future__ import annotations

import pytest
import trio

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.p2p.addresses import OwnAddresses
from p2pgz.p2p.dht import Dht
from p2pgz.testing.dht import contact_of, listening_dht


async def met(one: Dht, other: Dht) -> None:
    with trio.fail_after(20):
        while other.host.peer not in one.host.protocols:
            await trio.sleep(0.01)


@pytest.mark.trio
async def test_peers_say_from_where_they_see_us() -> None:
    """Identify brings it; loopback, which is all there is here, is not announced for it."""
    seen: list[tuple[bytes, PeerAddress]] = []
    own = OwnAddresses([("0.0.0.0", 4801)], route=lambda _ip: "10.0.0.5")

    def observed(peer: bytes, address: bytes) -> None:
        seen.append((peer, PeerAddress.from_bytes(address)))
        own.observed(peer, address)

    async with listening_dht() as one, listening_dht() as other:
        other.host.on_observed(observed)
        await other.host.connect(contact_of(one))
        await met(other, one)
    assert {peer for peer, _ in seen} == {one.host.peer}
    assert all((address.host, address.port > 0) == ("127.0.0.1", True) for _, address in seen)
    assert [str(address) for address in own.current] == ["/ip4/10.0.0.5/tcp/4801"]


@pytest.mark.trio
async def test_changed_address_is_what_the_next_peer_hears() -> None:
    async with listening_dht() as one, listening_dht() as other, listening_dht() as third:
        await other.host.connect(contact_of(one))
        await met(other, one)
        before = contact_of(one)
        one.host.announce(["/ip4/198.51.100.7/tcp/4801"])
        await third.host.connect(before)
        with trio.fail_after(20):
            while not (found := third.kad.table.get(one.host.peer)):
                await trio.sleep(0.01)
        assert [str(PeerAddress.from_bytes(raw)) for raw in found.addresses] == ["/ip4/198.51.100.7/tcp/4801"]
        assert PeerId(found.peer) == PeerId(one.host.peer)
