"""Who has a swarm's chunks: asks the DHT for providers and connects to them, and tells the DHT what this host provides.

Beside the race, never in the way of a read: what is found here shows as more holders the next time somebody misses a
chunk. What is told is `fetch.announcing`'s business, what others are answered `fetch.holdings`'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder
from p2pgz.errors import P2pgzError
from p2pgz.fetch.announcing import ANNOUNCED_EVERY_SECONDS, Announcing, is_complete
from p2pgz.fetch.holdings import PoolHoldings
from p2pgz.fetch.shares import Shares
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.hearing import hear
from p2pgz.p2p.indirect import Indirect
from p2pgz.pool.pool import Pool
from p2pgz.telemetry.histogram import Histogram

if TYPE_CHECKING:
    from p2pgz.p2p.dht import Dht

log = structlog.get_logger(component="peers")

# Providers looked up again for a swarm that is read and incomplete
AGAIN_SECONDS: Final = 30.0
# after a first look-up that found nobody: the others may only just have announced themselves
SOON_SECONDS: Final = 3.0
# Each time the pause is twice as long while nobody misses a chunk: a walk is twenty requests, and mounts lie idle for days
PAUSE_MAX_SECONDS: Final = 1800.0
SWARMS_AT_ONCE: Final = 4
PROVIDERS_WANTED: Final = 8
LOOKUP_SECONDS: Final = 10.0
REACHED_MAX: Final = 64


class _Search:
    """The look-ups for one swarm."""

    __slots__ = ("due", "found", "looked_at", "pause_seconds", "soon_seconds")

    def __init__(self, now: float) -> None:
        self.due = now
        self.looked_at = now
        self.pause_seconds = AGAIN_SECONDS
        self.soon_seconds = SOON_SECONDS
        self.found = False

    def begin(self, now: float) -> None:
        """One begins."""
        self.looked_at = now
        self.due = now + self.pause_seconds
        self.pause_seconds = min(2 * self.pause_seconds, PAUSE_MAX_SECONDS)

    def soon(self, now: float) -> None:
        """It found nobody, and none before did."""
        self.due = min(self.due, now + self.soon_seconds)
        self.soon_seconds *= 2


class Discovery:
    """Joins exchange, pool and DHT. `run` and `use` do the work; the other methods return at once."""

    def __init__(
        self, exchange: Exchange, pool: Pool, shares: Shares, announcing: Announcing | None = None
    ) -> None:
        self._exchange = exchange
        self._pool = pool
        self.holdings = PoolHoldings(exchange, pool, shares, self.addresses_of)
        """what the DHT answers others from"""
        self._announcing = announcing or Announcing(pool, shares)
        self.dht: Dht | None = None
        """while it is open"""
        self._indirect: Indirect | None = None
        self._wanted: dict[bytes, _Search] = {}
        self._wake = trio.Event()
        self._reached: dict[bytes, bytes] = {}
        self.lookup_seconds = Histogram()
        """how long looks for providers in the DHT took"""

    # --- what the race and the bootstrap say

    def learned(self, peer: PeerId, address: PeerAddress) -> None:
        """A peer was reached at an address."""
        self._reached[peer.raw] = address.without_peer().to_bytes()
        if len(self._reached) > REACHED_MAX:
            del self._reached[next(iter(self._reached))]

    def interested(self, swarm: bytes) -> None:
        """Somebody reads this swarm."""
        self.holdings.followed(swarm)
        if swarm not in self._wanted:
            self._wanted[swarm] = _Search(trio.current_time())
            self._wake.set()

    def missed(self, swarm: bytes) -> None:
        """Somebody misses chunks of a swarm: a long pause ends."""
        search = self._wanted.get(swarm)
        now = trio.current_time()
        if search is not None and search.due > now and now >= search.looked_at + AGAIN_SECONDS:
            search.due, search.pause_seconds = now, AGAIN_SECONDS
            self._wake.set()

    def uninterested(self, swarm: bytes) -> None:
        """Nobody does any more."""
        self.holdings.unfollowed(swarm)
        self._wanted.pop(swarm, None)

    # --- who is there

    def addresses_of(self, peer: bytes) -> tuple[bytes, ...]:
        """Where a connected peer listens: where we reached it, else what it has told the DHT."""
        reached = self._reached.get(peer)
        if reached is not None:
            return (reached,)
        contact = self.dht.contact(peer) if self.dht is not None else None
        return contact.addresses if contact is not None else ()

    def connected(self) -> list[Contact]:
        """Connected peers, and where they were reached."""
        peers = {connection.peer.raw for connection in self._exchange.connections()}
        return [Contact(peer, (address,)) for peer, address in self._reached.items() if peer in peers]

    # --- the work

    async def run(self) -> None:
        """For ever: look for providers of what is read."""
        limit = trio.CapacityLimiter(SWARMS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.holdings.run)
            while True:
                now = trio.current_time()
                for swarm, search in self._wanted.items():
                    if search.due <= now and self.dht is not None:
                        search.begin(now)
                        nursery.start_soon(self._look_up, swarm, search, limit)
                self._wake = trio.Event()
                with trio.move_on_at(
                    min((search.due for search in self._wanted.values()), default=now + AGAIN_SECONDS)
                ):
                    await self._wake.wait()
                if self.dht is None:
                    await trio.sleep(0.2)

    async def _look_up(self, swarm: bytes, search: _Search, limit: trio.CapacityLimiter) -> None:
        segment = self._pool.segment(Digest(swarm))
        if segment is not None and is_complete(segment):
            return
        async with limit:
            found = 0
            with trio.move_on_after(LOOKUP_SECONDS):
                found = await self.find(Digest(swarm))
        if not found and not search.found:
            search.soon(trio.current_time())
            self._wake.set()
        search.found |= found > 0

    async def reach(self, contact: Contact) -> bool:
        """Be connected to a peer: by its addresses, or on a stream of its own connection. Whether it is."""
        peer = PeerId(contact.peer)
        if peer == self._exchange.own_id:
            return False
        if self._exchange.connection(peer) is not None:
            return True
        if (
            self._indirect is not None
            and self._indirect.is_preferred(peer)
            and await self._connect_indirectly(peer)
        ):
            return True
        for number, raw in enumerate(contact.addresses):
            try:
                address = PeerAddress.from_bytes(raw)
                # what the first address cost the peer must not keep us from its second
                await self._exchange.connect(address.host, address.port, expected=peer, insist=number > 0)
            except (ValueError, P2pgzError) as error:
                log.debug("discovery.dial_failed", peer=str(peer), reason=str(error))
                continue
            self.learned(peer, address)
            return True
        return await self._connect_indirectly(peer)

    async def _connect_indirectly(self, peer: PeerId) -> bool:
        if self._indirect is None:
            return False
        try:
            await self._indirect.connect(peer)
        except P2pgzError as error:
            log.debug("discovery.indirect_failed", peer=str(peer), reason=error.what)
            return False
        return True

    async def use(self, dht: Dht) -> None:
        """Announce what the pool has to the DHT, for as long as it is open."""
        self.dht = dht
        self._indirect = Indirect(dht.host.open_stream, self._exchange.dialler.through)
        self._wake.set()
        self._announcing.begin()
        try:
            while True:
                await self._announcing.compare(dht)
                await trio.sleep(ANNOUNCED_EVERY_SECONDS)
        finally:
            self.dht = self._indirect = None

    async def find(self, name: Digest, *, wanted: int = PROVIDERS_WANTED) -> int:
        """Connect to providers of a TOC, layer or document, as the DHT names them; returns how many there are now.

        Time-outs are the caller's; with no DHT there are none.
        """
        dht = self.dht
        if dht is None:
            await trio.lowlevel.checkpoint()
            return 0
        reached: set[bytes] = set()
        began = trio.current_time()

        async def dial(contact: Contact) -> None:
            if await self.reach(contact):
                reached.add(contact.peer)

        async with trio.open_nursery() as nursery:
            try:
                async with dht.kad.providers(name.multihash, wanted=wanted) as providers:
                    async for contact in providers:
                        nursery.start_soon(dial, contact)  # one that is gone holds up no other
                self.lookup_seconds.observe(trio.current_time() - began)
            except P2pgzError as error:
                log.debug("discovery.failed", reason=error.what)
        return len(reached)


class DiscoveringPeers:
    """The exchange as the fetcher's `PeerSource`, with a look for further peers whenever a swarm is followed."""

    def __init__(self, exchange: Exchange, discovery: Discovery) -> None:
        self._exchange = exchange
        self._discovery = discovery
        self.holders = exchange.holders
        self.fetch = exchange.fetch
        self.document = exchange.document
        self.blame = exchange.blame

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        """See PeerSource."""
        self._exchange.follow(swarm, secret)
        if not secret:  # what only provers may have is not looked for in the DHT
            self._discovery.interested(swarm)

    def swarm_holders(self, swarm: bytes) -> Sequence[Holder]:
        """See PeerSource; who asks misses something."""
        self._discovery.missed(swarm)
        return self._exchange.swarm_holders(swarm)

    async def search(self, digest: bytes) -> bool:
        """See PeerSource."""
        return await self._discovery.find(Digest(digest)) > 0

    async def named(
        self,
        name: bytes,
        told: Callable[[PeerId, bytes], None],
        *,
        limit_bytes: int,
        secret: bytes,
        asked: set[PeerId],
        peers_max: int,
    ) -> None:
        """See NamingPeers: only those that are connected, since nobody waits for the answer."""
        await hear(
            self._exchange.connections(),
            name,
            told,
            limit_bytes=limit_bytes,
            secret=secret,
            asked=asked,
            peers_max=peers_max,
        )

    async def index_claims(self, diff_id: bytes, told: Callable[[PeerId, bytes], None]) -> None:
        """See IndexPeers: those that are connected, and only if none of them knows the layer those whom the DHT names."""
        known = False

        def note(peer: PeerId, data: bytes) -> None:
            nonlocal known
            known = True
            told(peer, data)

        await self._exchange.index_claims(diff_id, note)
        if not known and await self.search(diff_id):
            await self._exchange.index_claims(diff_id, told)

    def unfollow(self, swarm: bytes) -> None:
        """See PeerSource."""
        self._exchange.unfollow(swarm)
        self._discovery.uninterested(swarm)
