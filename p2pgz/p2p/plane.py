"""The chunk plane as one thing: identity, admission and pool in, an exchange on a port out.

Called by whoever composes a node. Connections that are accepted belong to the exchange; the listener only tells the two
protocols of the port apart, and gives libp2p's connections to `on_multistream`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.listener import Handler, PeerListener, listen
from p2pgz.p2p.offers import Offers
from p2pgz.p2p.uploads import Uploads


@dataclass(frozen=True, slots=True)
class ChunkPlane:
    """A running exchange and where it listens."""

    exchange: Exchange
    listener: PeerListener
    addresses: tuple[tuple[str, int], ...]
    """host and port of each listening socket"""

    @property
    def port(self) -> int:
        """The port of the first one."""
        return self.addresses[0][1]


@asynccontextmanager
async def open_plane(
    credentials: Credentials,
    offers: Offers,
    uploads: Uploads,
    *,
    host: str = "",
    port: int = 0,
    on_multistream: Handler | None = None,
) -> AsyncIterator[ChunkPlane]:
    """Listen and exchange until the context ends; raises StateError when the port cannot be had."""
    listeners = await listen(host, port)
    async with Exchange.open(credentials, offers, uploads) as exchange:
        listener = PeerListener(exchange.accept, on_multistream)
        addresses = tuple(tuple(item.socket.getsockname()[:2]) for item in listeners)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.serve, listeners)
            try:
                yield ChunkPlane(exchange, listener, addresses)
            except Exception as error:  # noqa: BLE001  # goes on below, not wrapped in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
