"""A peer with several addresses is reached at whichever answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.fetch.discovery import Discovery
from p2pgz.fetch.shares import Shares
from p2pgz.testing.peers import open_peer, peer_layer

LAYER = peer_layer(6)


@pytest.mark.trio
async def test_dead_address_does_not_keep_us_from_the_next_one(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        with trio.socket.socket() as closed:
            await closed.bind(("127.0.0.1", 0))
            ports = (closed.getsockname()[1], a.port)
            addresses = tuple(PeerAddress.of_ip("127.0.0.1", port).to_bytes() for port in ports)
            discovery = Discovery(b.exchange, b.pool, Shares())
            assert await discovery.reach(Contact(a.id.raw, addresses))
        assert b.exchange.connection(a.id) is not None
