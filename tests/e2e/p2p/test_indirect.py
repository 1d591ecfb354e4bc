"""A peer that cannot be dialled gives its chunks over the libp2p connection that it made itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pgz.core.admission import Admission
from p2pgz.core.hello import FEATURES
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.errors import SourceUnavailable
from p2pgz.fetch.discovery import Discovery
from p2pgz.fetch.shares import Shares
from p2pgz.p2p import indirect
from p2pgz.p2p.dht import Dht
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.testing.conformance_pool import check_content
from p2pgz.testing.dht import contact_of, listening_dht
from p2pgz.testing.peers import Peer, open_peer, peer_layer

pytestmark = [pytest.mark.trio, pytest.mark.slow]

LAYER = peer_layer(11)
COUNT = len(LAYER.chunks)
KEY = b"a cluster key of more than sixteen bytes"


class End:
    """A peer with its DHT."""

    def __init__(self, peer: Peer, dht: Dht) -> None:
        self.peer = peer
        self.dht = dht
        self.discovery = Discovery(peer.exchange, peer.pool, Shares())


@asynccontextmanager
async def end(
    directory: Path, *others: Dht, chunks: list[int] | None = None, key: bytes = KEY
) -> AsyncIterator[End]:
    identity, admission = Identity.new(), Admission(cluster_keys=[key])
    credentials = Credentials.make(identity, admission, FEATURES)
    async with (
        open_peer(directory, LAYER, chunks=chunks, credentials=credentials) as peer,
        listening_dht(*others, identity=identity) as dht,
        trio.open_nursery() as nursery,
    ):
        dht.host.serve_streams(indirect.PROTOCOL, peer.exchange.accept)
        this = End(peer, dht)
        nursery.start_soon(this.discovery.use, dht)
        await trio.testing.wait_all_tasks_blocked()
        yield this
        nursery.cancel_scope.cancel()


def unreachable(of: End) -> Contact:
    """How the DHT names a peer whose port nobody can reach."""
    return Contact(of.peer.id.raw, (PeerAddress.of_ip("127.0.0.1", 1).to_bytes(),))


async def take(taker: End, giver: End) -> None:
    answer = await taker.peer.exchange.fetch(
        giver.peer.id,
        taker.peer.swarm,
        taker.peer.segment.table,
        taker.peer.missing(),
        priority=0,
        landed=taker.peer.landed,
    )
    assert (answer.missing, answer.busy) == ([], [])


async def test_chunks_come_over_the_peers_own_libp2p_connection(tmp_path: Path) -> None:
    async with end(tmp_path / "taker", chunks=[]) as taker, end(tmp_path / "giver", taker.dht) as giver:
        await giver.dht.host.connect(contact_of(taker.dht))
        assert await taker.discovery.reach(unreachable(giver))
        with trio.fail_after(10):
            await take(taker, giver)
        assert check_content(taker.peer.segment, LAYER) == COUNT
        # both directions: the exchange knows no difference
        assert [connection.peer for connection in giver.peer.exchange.connections()] == [taker.peer.id]


async def test_stream_that_breaks_ends_the_connection_and_the_next_one_works(tmp_path: Path) -> None:
    async with end(tmp_path / "taker", chunks=[]) as taker, end(tmp_path / "giver", taker.dht) as giver:
        await giver.dht.host.connect(contact_of(taker.dht))
        assert await taker.discovery.reach(unreachable(giver))
        await giver.dht.host.disconnect(taker.peer.id.raw)
        with trio.fail_after(10):
            while taker.peer.exchange.connections():
                await trio.sleep(0.01)
            assert not await taker.discovery.reach(unreachable(giver))  # there is no way at all now
            await giver.dht.host.connect(contact_of(taker.dht))
            assert await taker.discovery.reach(unreachable(giver))
            await take(taker, giver)


async def test_wrong_cluster_key_is_refused_on_a_stream_too(tmp_path: Path) -> None:
    other = b"the key of some other cluster, as long"
    async with (
        end(tmp_path / "taker", chunks=[]) as taker,
        end(tmp_path / "giver", taker.dht, key=other) as giver,
    ):
        await giver.dht.host.connect(contact_of(taker.dht))
        assert not await taker.discovery.reach(unreachable(giver))
        with pytest.raises(SourceUnavailable):
            await take(taker, giver)
        assert giver.peer.exchange.connections() == []
