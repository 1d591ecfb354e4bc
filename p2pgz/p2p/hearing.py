"""What several peers have under one name: things that have no digest, so that each may say something else.

Called by `fetch.discovery` on behalf of `fetch.startup`, which judges what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import trio

from p2pgz.core.peerid import PeerId
from p2pgz.errors import P2pgzError
from p2pgz.p2p.connection import Connection


async def hear(
    connections: Iterable[Connection],
    name: bytes,
    told: Callable[[PeerId, bytes], None],
    *,
    limit_bytes: int,
    secret: bytes,
    asked: set[PeerId],
    peers_max: int,
) -> None:
    """Ask the quickest of these peers; see `core.ports.NamingPeers`. Who fails has said nothing."""
    order = sorted(connections, key=Connection.expected_seconds, reverse=True)
    chosen = list({c.peer: c for c in order if c.peer not in asked}.values())[-peers_max:]
    asked.update(connection.peer for connection in chosen)

    async def ask(connection: Connection) -> None:
        with suppress(P2pgzError):
            data = await connection.document(name, limit_bytes=limit_bytes, secret=secret)
            if data is not None:
                told(connection.peer, data)

    async with trio.open_nursery() as nursery:
        for connection in chosen:
            nursery.start_soon(ask, connection)
