"""DHT nodes on real sockets of this machine, for tests. Importing this imports libp2p."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from p2pgz.core.admission import Admission
from p2pgz.core.keyspace import Contact
from p2pgz.core.peerid import PeerId
from p2pgz.p2p.dht import Dht, open_dht
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.kad import PROTOCOL, Holdings
from p2pgz.p2p.listener import PeerListener, listen


@asynccontextmanager
async def listening_dht(
    *bootstrap: Dht,
    identity: Identity | None = None,
    holdings: Holdings | None = None,
    admission: Admission | None = None,
    contacts: Sequence[Contact] = (),
    protocol: str = PROTOCOL,
    now: Callable[[], float] = trio.current_time,
) -> AsyncIterator[Dht]:
    """A node behind the one-port listener on 127.0.0.1, told of some other nodes."""
    known = [*(contact_of(dht) for dht in bootstrap), *contacts]
    listeners = await listen("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]

    async def refuse_tls(stream: trio.SocketStream) -> None:
        await stream.aclose()

    async with (
        open_dht(
            identity or Identity.new(),
            announce=[f"/ip4/127.0.0.1/tcp/{port}"],
            admission=admission,
            holdings=holdings,
            bootstrap=lambda: known,
            protocol=protocol,
            now=now,
        ) as dht,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(PeerListener(refuse_tls, dht.accept).serve, listeners)
        try:
            yield dht
        finally:
            nursery.cancel_scope.cancel()


def contact_of(dht: Dht) -> Contact:
    """Where a node is reached."""
    return Contact(dht.host.peer, dht.host.addresses)


def multiaddr_of(dht: Dht) -> str:
    """The same as text that other implementations take."""
    port = int.from_bytes(dht.host.addresses[0][-2:], "big")
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{PeerId(dht.host.peer)}"
