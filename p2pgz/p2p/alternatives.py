"""Whom a busy node names to those that it cannot serve: connected peers that have, or are getting, the same swarm.

Set as `Uploads.alternatives` by whoever composes a node. Only peers that may be told of the swarm count, and only to a peer
that may be served of it is anybody named; so nobody learns from it who has an image that he does not know.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Final

import trio

from p2pgz.core.messages import Alternative
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.p2p.connection import Connection
from p2pgz.p2p.exchange import Exchange

NAMED_MAX: Final = 4
# A crowd asks thousands of times a second, and who has what does not change so fast
KEPT_SECONDS: Final = 0.5
SWARMS_KEPT: Final = 64

Addresses = Callable[[bytes], Iterable[bytes]]
"""where a peer listens, as far as that is known, as binary multiaddrs"""


class Alternatives:
    """`alternatives(swarm)`: some other peers. `choose` picks some of many, so that a crowd is spread."""

    def __init__(
        self,
        exchange: Exchange,
        addresses: Addresses,
        choose: Callable[[list[Alternative], int], list[Alternative]] = random.sample,
    ) -> None:
        self._exchange = exchange
        self._addresses = addresses
        self._choose = choose
        self._kept: dict[bytes, tuple[float, list[Alternative]]] = {}

    def __call__(self, swarm: bytes) -> tuple[Alternative, ...]:
        now = trio.current_time()
        until, found = self._kept.get(swarm, (0.0, []))
        if until <= now:
            found = self._find(swarm, now)
            self._kept.pop(swarm, None)
            self._kept[swarm] = (now + KEPT_SECONDS, found)
            if len(self._kept) > SWARMS_KEPT:
                del self._kept[next(iter(self._kept))]
        return tuple(self._choose(found, min(NAMED_MAX, len(found))))

    def _find(self, swarm: bytes, now: float) -> list[Alternative]:
        standing = self._exchange.standing
        having: dict[bytes, Connection] = {}
        getting: dict[bytes, Connection] = {}
        for connection in self._exchange.connections():
            if standing.out_until(connection.peer, now):
                continue
            if connection.bitmaps.count(swarm):
                having[connection.peer.raw] = connection
            elif connection.serving.serves(swarm):
                getting[connection.peer.raw] = connection
        found = []
        for peer in having if len(having) >= NAMED_MAX else {**having, **getting}:
            address = self._address(peer)
            if address:
                found.append(Alternative(peer, address))
        return found

    def _address(self, peer: bytes) -> str:
        for raw in self._addresses(peer):
            try:
                address = PeerAddress.from_bytes(raw)
            except ValueError:
                continue
            if not address.is_name:
                return str(address.without_peer())
        return ""
