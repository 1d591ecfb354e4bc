"""Who has a swarm's chunks: asks the DHT for providers and connects to them, and tells the DHT what this host provides.

Beside the race, never in the way of a read: what is found here shows as more holders the next time somebody misses a
chunk. It is also what the DHT answers others from (`Holdings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import structlog
import trio

from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX, Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import P2pgzError
from p2pgz.fetch.shares import Shares
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.indirect import Indirect
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.segment import SHARED_DOMAIN

if TYPE_CHECKING:
    from p2pgz.p2p.dht import Dht

log = structlog.get_logger(component="peers")

# Providers looked up again for a swarm that is still read and incomplete
AGAIN_SECONDS: Final = 30.0
# after a first look-up that found nobody: the others may only just have announced themselves
SOON_SECONDS: Final = 3.0
SWARMS_AT_ONCE: Final = 4
PROVIDERS_WANTED: Final = 8
# how often what the pool has is compared with what is announced
ANNOUNCE_SECONDS: Final = 5.0
LOOKUP_SECONDS: Final = 10.0
REACHED_MAX: Final = 64


class Discovery:
    """Joins exchange, pool and DHT. `run` and `use` do the work; the other methods return at once."""

    def __init__(self, exchange: Exchange, pool: Pool, shares: Shares) -> None:
        self._exchange = exchange
        self._pool = pool
        self._shares = shares
        self._dht: Dht | None = None
        self._indirect: Indirect | None = None
        self._wanted: dict[bytes, float] = {}  # swarm -> when to look again
        self._wake = trio.Event()
        self._provided: dict[Digest, bool] = {}  # segment -> whether all of it
        self._documents: set[Digest] = set()
        self._reached: dict[bytes, bytes] = {}

    # --- what the race and the bootstrap say

    def learned(self, peer: PeerId, address: PeerAddress) -> None:
        """A peer was reached at an address."""
        self._reached[peer.raw] = address.without_peer().to_bytes()
        if len(self._reached) > REACHED_MAX:
            del self._reached[next(iter(self._reached))]

    def interested(self, swarm: bytes) -> None:
        """Somebody reads this swarm."""
        if swarm not in self._wanted:
            self._wanted[swarm] = trio.current_time()
            self._wake.set()

    def uninterested(self, swarm: bytes) -> None:
        """Nobody does any more."""
        self._wanted.pop(swarm, None)

    def provide_documents(self, digests: Iterable[Digest]) -> None:
        """A manifest and a config that this host gives to whoever asks."""
        self._documents.update(digests)

    # --- what the DHT asks (Holdings)

    def holds(self, digest: bytes) -> bool:
        """Whether this host has a chunk, TOC, manifest or config that is shared with everyone."""
        if self._shares.is_open_document(digest):
            return True
        place = self._pool.find(SHARED_DOMAIN, digest)
        if place is not None:
            return self._shares.is_open_segment(place[0].id.raw)
        segment = self._pool.segment(Digest(digest)) if self._shares.is_open_segment(digest) else None
        return segment is not None and segment.presence.present_count() > 0

    def holders(self, digest: bytes) -> list[Contact]:
        """Connected peers whose bitmaps show it."""
        return []

    def connected(self) -> list[Contact]:
        """Connected peers, and where they were reached."""
        peers = {connection.peer.raw for connection in self._exchange.connections()}
        return [Contact(peer, (address,)) for peer, address in self._reached.items() if peer in peers]

    # --- the work

    async def run(self) -> None:
        """For ever: look for providers of what is read."""
        limit = trio.CapacityLimiter(SWARMS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                for swarm, due in list(self._wanted.items()):
                    if due <= now and self._dht is not None:
                        self._wanted[swarm] = now + AGAIN_SECONDS
                        nursery.start_soon(self._look_up, swarm, limit)
                self._wake = trio.Event()
                with trio.move_on_at(min(self._wanted.values(), default=now + AGAIN_SECONDS)):
                    await self._wake.wait()
                if self._dht is None:
                    await trio.sleep(0.2)

    async def _look_up(self, swarm: bytes, limit: trio.CapacityLimiter) -> None:
        segment = self._pool.segment(Digest(swarm))
        if segment is not None and segment.presence.present_count() == segment.table.chunk_count:
            return
        async with limit:
            dht = self._dht
            if dht is None:
                return
            found = 0
            try:
                with trio.move_on_after(LOOKUP_SECONDS):
                    async with dht.kad.providers(
                        SHA256_MULTIHASH_PREFIX + swarm, wanted=PROVIDERS_WANTED
                    ) as providers:
                        async for contact in providers:
                            found += await self.reach(contact)
            except P2pgzError as error:
                log.debug("discovery.failed", reason=error.what)
        if not found and swarm in self._wanted:
            self._wanted[swarm] = min(self._wanted[swarm], trio.current_time() + SOON_SECONDS)
            self._wake.set()

    async def reach(self, contact: Contact) -> int:
        """Be connected to a peer: by its addresses, or on a stream of its own connection. Whether it is (0 or 1)."""
        peer = PeerId(contact.peer)
        if peer == self._exchange.own_id:
            return 0
        if self._exchange.connection(peer) is not None:
            return 1
        if (
            self._indirect is not None
            and self._indirect.is_preferred(peer)
            and await self._connect_indirectly(peer)
        ):
            return 1
        for raw in contact.addresses:
            try:
                address = PeerAddress.from_bytes(raw)
                await self._exchange.connect(address.host, address.port, expected=peer)
            except (ValueError, P2pgzError) as error:
                log.debug("discovery.dial_failed", peer=str(peer), reason=str(error))
                continue
            return 1
        return await self._connect_indirectly(peer)

    async def _connect_indirectly(self, peer: PeerId) -> int:
        if self._indirect is None:
            return 0
        try:
            await self._indirect.connect(peer)
        except P2pgzError as error:
            log.debug("discovery.indirect_failed", peer=str(peer), reason=error.what)
            return 0
        return 1

    async def use(self, dht: Dht) -> None:
        """Announce what the pool has to the DHT, for as long as it is open."""
        self._dht = dht
        self._indirect = Indirect(dht.host.open_stream, self._exchange.dialler.through)
        self._wake.set()
        try:
            while True:
                self._announce(dht)
                await trio.sleep(ANNOUNCE_SECONDS)
        finally:
            self._dht = self._indirect = None

    def _announce(self, dht: Dht) -> None:
        announcer = dht.announcer
        current: dict[Digest, bool] = {}
        for segment in self._pool.segments():
            if segment.domain != SHARED_DOMAIN or not self._shares.is_open_segment(segment.id.raw):
                continue
            present = segment.presence.present_count()
            if present:
                current[segment.id] = present == segment.table.chunk_count
        for digest, complete in current.items():
            if self._provided.get(digest) == complete:
                continue
            held = self._pool.segment(digest)
            assert held is not None
            announcer.provide(SHA256_MULTIHASH_PREFIX + digest.raw)
            announcer.hold(digest.raw, _digests_of(held), complete=complete)
        for digest in self._provided.keys() - current.keys():
            announcer.withdraw(SHA256_MULTIHASH_PREFIX + digest.raw)
            announcer.drop(digest.raw)
        self._provided = current
        for digest in {*self._documents, *self._shares.open_documents()}:
            if SHA256_MULTIHASH_PREFIX + digest.raw not in dht.kad.announced:
                announcer.provide(SHA256_MULTIHASH_PREFIX + digest.raw)


class DiscoveringPeers:
    """The exchange as the fetcher's `PeerSource`, with a look for further peers whenever a swarm is followed."""

    def __init__(self, exchange: Exchange, discovery: Discovery) -> None:
        self._exchange = exchange
        self._discovery = discovery
        self.holders = exchange.holders
        self.swarm_holders = exchange.swarm_holders
        self.fetch = exchange.fetch
        self.document = exchange.document
        self.index_claims = exchange.index_claims
        self.blame = exchange.blame

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        """See PeerSource."""
        self._exchange.follow(swarm, secret)
        if not secret:  # what only provers may have is not looked for in the DHT
            self._discovery.interested(swarm)

    def unfollow(self, swarm: bytes) -> None:
        """See PeerSource."""
        self._exchange.unfollow(swarm)
        self._discovery.uninterested(swarm)


def _digests_of(segment: Segment) -> Callable[[], Sequence[bytes]]:
    def digests() -> list[bytes]:
        table = segment.table
        return [table.digest(n) for n in range(table.chunk_count) if segment.presence.has(n)]

    return digests
