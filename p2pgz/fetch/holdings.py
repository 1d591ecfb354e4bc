"""What the DHT answers others from: what is here and for everyone, and what connected peers have told of.

`p2p.kad.Holdings` on pool, shares and exchange. Every answer takes well below a millisecond, whatever is asked, since peers
ask for what they like: a digest is looked up in the index and in `fetch.names`, never by going through segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.fetch.names import ChunkNames
from p2pgz.fetch.shares import Shares
from p2pgz.p2p.exchange import Exchange
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN

# an answer of the DHT names 20 providers
HOLDERS_MAX: Final = 20
# a swarm may be followed before its segment is made
TEND_SECONDS: Final = 5.0


class PoolHoldings:
    """`addresses` says where a connected peer listens, as far as that is known."""

    def __init__(
        self,
        exchange: Exchange,
        pool: Pool,
        shares: Shares,
        addresses: Callable[[bytes], tuple[bytes, ...]],
    ) -> None:
        self._exchange = exchange
        self._pool = pool
        self._shares = shares
        self._addresses = addresses
        self._followed: set[bytes] = set()
        self._names = ChunkNames()
        self._changed = trio.Event()

    def followed(self, swarm: bytes) -> None:
        """Peers tell what they have of an open swarm from now on."""
        if swarm not in self._followed:
            self._followed.add(swarm)
            self._changed.set()

    def unfollowed(self, swarm: bytes) -> None:
        """They do not any more."""
        self._followed.discard(swarm)
        self._names.remove(Digest(swarm))

    def holds(self, digest: bytes) -> bool:
        """Whether this host has a chunk, TOC, manifest or config that is shared with everyone."""
        if self._shares.is_open_document(digest):
            return True
        place = self._pool.find(SHARED_DOMAIN, digest)
        if place is not None:  # what has to be checked first is not given away yet
            return place[0].presence.has(place[1]) and self._shares.is_open_segment(place[0].id.raw)
        segment = self._pool.segment(Digest(digest)) if self._shares.is_open_segment(digest) else None
        return segment is not None and segment.presence.present_count() > 0

    def holders(self, digest: bytes) -> list[Contact]:
        """Connected peers whose bitmaps show the chunk, or anything of the TOC."""
        places = self._names.find(digest)
        is_swarm = digest in self._followed
        found: dict[bytes, Contact] = {}
        if not places and not is_swarm:
            return []
        now = trio.current_time()
        for connection in self._exchange.connections():
            peer = connection.peer
            if peer.raw in found or self._exchange.standing.out_until(peer, now):
                continue
            bitmaps = connection.bitmaps
            if (is_swarm and bitmaps.count(digest)) or any(
                bitmaps.has(place.segment.raw, place.n) for place in places
            ):
                found[peer.raw] = Contact(peer.raw, self._addresses(peer.raw))
                if len(found) >= HOLDERS_MAX:
                    break
        return list(found.values())

    async def run(self) -> None:
        """For ever: know the chunks of what is followed."""
        while True:
            self._changed = trio.Event()
            await self.tend()
            with trio.move_on_after(TEND_SECONDS):
                await self._changed.wait()

    async def tend(self) -> None:
        """Take in the segments that have come to be followed, letting others run in between."""
        if self._names.wants_rebuilding:
            for _ in self._names.rebuild():
                await trio.lowlevel.checkpoint()
            for known in self._names:
                if known.raw not in self._followed:  # left meanwhile
                    self._names.remove(known)
        for swarm in list(self._followed):
            name = Digest(swarm)
            segment = self._pool.segment(name) if name not in self._names else None
            if segment is not None:
                for _ in self._names.add(segment.table):
                    await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
