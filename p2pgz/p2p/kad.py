"""The DHT node: answers Kademlia's requests, and walks the DHT to find peers and providers (design, "Peers").

Speaks libp2p's kad-dht 1.0.0 under a protocol id of its own over any `KadNetwork`: libp2p streams (`p2p.host`) or a
simulation. What to announce, and when, is `p2p.announce`'s business. All decisions are in `core` (keyspace, kbuckets,
lookup, providers, pointers); here they meet tasks and deadlines. A peer can make a walk longer or an answer useless, never
make it hang or grow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog
import trio

from p2pgz.core.digest import SHA256_BYTES, SHA256_MULTIHASH_PREFIX
from p2pgz.core.kbuckets import RoutingTable
from p2pgz.core.keyspace import Contact, kad_key, shared_bits
from p2pgz.core.lookup import WIDTH, Lookup
from p2pgz.core.pointers import PointerStore
from p2pgz.core.providers import ProviderStore
from p2pgz.errors import P2pgzError, PeerFault
from p2pgz.p2p.kadmsg import KadMessage, Kind, decode, encode

log = structlog.get_logger(component="dht")

PROTOCOL = "/p2pgz/kad/1.0.0"  # never the public network's /ipfs/kad/1.0.0
QUERY_SECONDS = 5.0  # dial, handshake and answer
SLOW_AFTER_SECONDS = 0.5  # then a walk asks another peer as well
WALK_SECONDS = 30.0
PROVIDERS_PER_ANSWER = 20  # go-libp2p asks for as many; more make answers large
POINTED_TOCS = 3  # looked into for one chunk
RESOLVE_SECONDS = 1.5  # for a pointer, while the asker waits: go-libp2p gives an answer 10 s
RESOLVE_TASKS = 8  # at once; more are answered from records alone
RESOLVED_FOR_SECONDS = 60.0  # how long the providers of a TOC are remembered for its chunks
RESOLVED_TOCS = 1024
DEEPEST_REFRESH_BITS = 10  # a name for a bucket is found by trying: 2 000 hashes at this depth, a millisecond


class KadNetwork(Protocol):
    """How a DHT node reaches others. Failures are SourceUnavailable; safe to cancel; deadlines are the caller's."""

    def own(self) -> Contact:
        """Our peer id, and the addresses at which others reach us now."""
        ...

    async def ask(self, contact: Contact, protocol: str, message: bytes) -> bytes:
        """Send a request and wait for its answer."""
        ...

    async def tell(self, contact: Contact, protocol: str, messages: Sequence[bytes]) -> None:
        """Send messages that have no answer."""
        ...


class Holdings(Protocol):
    """What can be offered to anyone who is admitted. Both must answer at once, and leave out what is not shared with all."""

    def holds(self, digest: bytes) -> bool:
        """Whether this host has the chunk, TOC, manifest or config, complete."""
        ...

    def holders(self, digest: bytes) -> list[Contact]:
        """Connected peers whose bitmaps show it."""
        ...


class NoHoldings:
    """Of a node that has nothing (a bootstrap node, or tests)."""

    def holds(self, digest: bytes) -> bool:
        return False

    def holders(self, digest: bytes) -> list[Contact]:
        return []


class KadNode:
    """One member of the DHT."""

    def __init__(
        self,
        network: KadNetwork,
        *,
        holdings: Holdings | None = None,
        protocol: str = PROTOCOL,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self.network = network
        self.protocol = protocol
        self.table = RoutingTable(network.own().peer)
        self.records = ProviderStore()
        self.pointers = PointerStore()
        self.announced: set[bytes] = set()
        """keys that we provide ourselves; `p2p.announce` keeps it"""
        self.queries = 0
        self.requests = 0
        self._holdings: Holdings = holdings or NoHoldings()
        self._now = now
        self._own = network.own().peer
        self._resolved: dict[bytes, tuple[float, list[Contact]]] = {}
        self._resolving = trio.CapacityLimiter(RESOLVE_TASKS)

    # -- answering

    async def answer(self, sender: Contact, data: bytes) -> bytes | None:
        """The answer to one message; None where there is none. Raises PeerFault when the stream deserves a reset."""
        request = decode(data)
        self.requests += 1
        if not request.key and request.kind is not Kind.PING:
            raise PeerFault("a DHT request without a key")
        if request.kind is Kind.ADD_PROVIDER:
            self._record(sender, request)
            return None
        if request.kind is Kind.PING:
            return encode(KadMessage(Kind.PING))
        closer = [contact for contact in self.closest_known(request.key) if contact.peer != sender.peer]
        if request.kind is Kind.FIND_NODE:
            if request.key == self._own:
                closer.insert(0, self.network.own())
            return encode(KadMessage(Kind.FIND_NODE, request.key, tuple(closer)))
        providers = await self._answer_providers(request, sender)
        return encode(KadMessage(Kind.GET_PROVIDERS, request.key, tuple(closer), tuple(providers)))

    def closest_known(self, name: bytes, count: int = WIDTH) -> list[Contact]:
        """The closest peers to a name that we know, without asking anybody."""
        return self.table.closest(kad_key(name), count)

    def _record(self, sender: Contact, request: KadMessage) -> None:
        """A peer speaks for itself only (kad-dht spec, ADD_PROVIDER)."""
        for provider in request.providers:
            if provider.peer == sender.peer and provider.addresses:
                self.records.add(request.key, provider, self._now())

    def _local_providers(self, key: bytes) -> list[Contact]:
        """Who has it, by what this host knows: ourselves, connected peers, records."""
        digest = _digest(key)
        found: dict[bytes, Contact] = {}
        if key in self.announced or (digest and self._holdings.holds(digest)):
            found[self._own] = self.network.own()
        for contact in self._holdings.holders(digest) if digest else ():
            found.setdefault(contact.peer, contact)
        for contact in self.records.providers(key, self._now()):
            found.setdefault(contact.peer, contact)
        return list(found.values())

    async def _answer_providers(self, request: KadMessage, sender: Contact) -> list[Contact]:
        found = {contact.peer: contact for contact in self._local_providers(request.key)}
        digest = _digest(request.key)
        if digest and not request.records_alone and len(found) < PROVIDERS_PER_ANSWER:
            for contact in await self._pointed(digest):
                found.setdefault(contact.peer, contact)
        return [contact for contact in found.values() if contact.addresses][:PROVIDERS_PER_ANSWER]

    async def _pointed(self, digest: bytes) -> list[Contact]:
        """The providers of the TOCs that are said to have a chunk, complete holders first."""
        found: list[Contact] = []
        for toc in self.pointed_tocs(digest):
            senders = self.pointers.senders(toc, self._now())
            providers = await self.providers_of_toc(toc)
            found += sorted(providers, key=lambda contact: contact.peer not in senders)
        return found

    def pointed_tocs(self, digest: bytes) -> list[bytes]:
        """The TOCs that our pointers lead to from a chunk, no more than a walk looks into."""
        return self.pointers.tocs(digest, self._now())[:POINTED_TOCS]

    async def providers_of_toc(self, toc: bytes) -> list[Contact]:
        """Who has a TOC's chunks; asks others unless it did within the last minute."""
        cached = self._resolved.get(toc)
        if cached is not None and cached[0] > self._now():
            return cached[1]
        key = SHA256_MULTIHASH_PREFIX + toc
        found = {contact.peer: contact for contact in self._local_providers(key)}
        try:
            self._resolving.acquire_on_behalf_of_nowait(token := object())
        except trio.WouldBlock:
            return list(found.values())
        try:
            with trio.move_on_after(RESOLVE_SECONDS):
                async with self.providers(key, wanted=PROVIDERS_PER_ANSWER, records_alone=True) as walk:
                    async for contact in walk:
                        found[contact.peer] = contact
        finally:
            self._resolving.release_on_behalf_of(token)
        if len(self._resolved) >= RESOLVED_TOCS:
            del self._resolved[next(iter(self._resolved))]
        self._resolved[toc] = (self._now() + RESOLVED_FOR_SECONDS, list(found.values()))
        return list(found.values())

    # -- walking

    def met(self, contact: Contact) -> bool:
        """A DHT server was heard from; true if it is new in the table."""
        return self.table.seen(contact, self._now())

    async def find_closest(self, name: bytes) -> list[Contact]:
        """The closest servers to a name, as a walk finds them; never ourselves."""
        lookup = self.lookup(name)
        with trio.move_on_after(WALK_SECONDS):
            await self._walk(lookup, KadMessage(Kind.FIND_NODE, name), lambda _new: None)
        return lookup.closest()

    @asynccontextmanager
    async def providers(
        self, key: bytes, *, wanted: int = 0, records_alone: bool = False
    ) -> AsyncIterator[AsyncIterator[Contact]]:
        """Stream the providers of a key as they are found, what this host knows first; ends when the walk does.

        `wanted` ends the walk at so many (0: everyone that the closest servers know of). Leave the context to stop it.
        """
        digest = _digest(key)
        send, receive = trio.open_memory_channel[Contact](math.inf)  # bounded by the answers of one walk
        lookup = self.lookup(key, wanted=wanted)

        def publish(new: Iterable[Contact]) -> None:
            for contact in new:
                if contact.peer != self._own:
                    send.send_nowait(contact)

        async def resolve() -> None:
            publish(lookup.learned(await self._pointed(digest)))

        async def walk() -> None:
            with send:
                async with trio.open_nursery() as both:
                    if digest and not records_alone:
                        both.start_soon(resolve)
                    request = KadMessage(Kind.GET_PROVIDERS, key, records_alone=records_alone)
                    with trio.move_on_after(WALK_SECONDS):
                        await self._walk(lookup, request, publish)

        publish(lookup.learned(self._local_providers(key)))
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(walk)
            try:
                with receive:
                    yield receive
            except Exception as error:  # noqa: BLE001  # the caller's: raised below, outside the nursery's group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def find_providers(self, key: bytes, *, wanted: int = 0) -> list[Contact]:
        """All of `providers` at once."""
        async with self.providers(key, wanted=wanted) as found:
            return list({contact.peer: contact async for contact in found}.values())

    async def ping(self, contact: Contact) -> bool:
        """Whether a peer answers; it then has its place in the table."""
        try:
            with trio.fail_after(QUERY_SECONDS):
                answer = decode(await self.network.ask(contact, self.protocol, encode(KadMessage(Kind.PING))))
        except (P2pgzError, trio.TooSlowError):
            self.table.failed(contact.peer, self._now())
            return False
        self.met(contact)
        return answer.kind is Kind.PING

    async def join(self, bootstrap: Iterable[Contact], random: Callable[[], float]) -> int:
        """Get into the DHT by way of some peers; returns how many servers are known afterwards.

        A walk to ourselves meets our own neighbourhood only. When everybody has joined at the same moment and done no
        more, each half of the key space knows nothing of the other: hence a walk into every other part.
        """
        async with trio.open_nursery() as nursery:
            for contact in bootstrap:
                if contact.peer != self._own:
                    nursery.start_soon(self.ping, contact)
        await self.find_closest(self._own)
        for bits in self.table.thin_buckets(DEEPEST_REFRESH_BITS):
            await self.find_closest(_name_in_bucket(self._own, bits, random))
        return len(self.table)

    async def refresh(self, random: Callable[[], float]) -> None:
        """Look around: walk to ourselves, and into one part of the key space of which we know few peers."""
        await self.find_closest(self._own)
        thin = self.table.thin_buckets(DEEPEST_REFRESH_BITS)
        if thin:
            await self.find_closest(_name_in_bucket(self._own, thin[int(random() * len(thin))], random))

    def lookup(self, name: bytes, *, wanted: int = 0) -> Lookup:
        """A walk that begins at the servers that we know."""
        return Lookup(name, own=self._own, start=self.closest_known(name, 2 * WIDTH), wanted=wanted)

    async def _walk(
        self, lookup: Lookup, request: KadMessage, publish: Callable[[list[Contact]], None]
    ) -> None:
        message = encode(request)
        await self.walk(
            lookup,
            lambda contact: self._query(contact, message, request.kind),
            lambda _, new: publish(new),
        )

    async def walk(
        self,
        lookup: Lookup,
        ask: Callable[[Contact], Awaitable[KadMessage | None]],
        told: Callable[[Contact, list[Contact]], None],
    ) -> None:
        """Ask whom the lookup names until it is finished; `told` gets each server and the providers that are new."""
        asked: deque[tuple[float, bytes]] = deque()
        wake = trio.Event()

        async def query(contact: Contact) -> None:
            answer = await ask(contact)
            if answer is None:
                lookup.failed(contact.peer)
            else:
                told(contact, lookup.answered(contact.peer, answer.closer, answer.providers))
            wake.set()

        async with trio.open_nursery() as nursery:
            while True:
                for contact in lookup.next():
                    asked.append((trio.current_time() + SLOW_AFTER_SECONDS, contact.peer))
                    nursery.start_soon(query, contact)
                if lookup.finished:
                    break
                with trio.move_on_at(asked[0][0] if asked else math.inf):
                    await wake.wait()
                wake = trio.Event()
                while asked and asked[0][0] <= trio.current_time():
                    lookup.slow(asked.popleft()[1])
            nursery.cancel_scope.cancel()

    async def query(self, contact: Contact, request: KadMessage) -> KadMessage | None:
        """Ask one server; None when it does not answer, which the routing table notes."""
        return await self._query(contact, encode(request), request.kind)

    async def _query(self, contact: Contact, message: bytes, kind: Kind) -> KadMessage | None:
        self.queries += 1
        try:
            with trio.fail_after(QUERY_SECONDS):
                answer = decode(await self.network.ask(contact, self.protocol, message))
        except (P2pgzError, trio.TooSlowError):
            self.table.failed(contact.peer, self._now())
            return None
        if answer.kind is not kind:
            self.table.failed(contact.peer, self._now())
            return None
        self.met(contact)
        return answer


def _name_in_bucket(own: bytes, bits: int, random: Callable[[], float]) -> bytes:
    """A multihash whose place shares exactly `bits` bits with ours."""
    own_key = kad_key(own)
    number = int(random() * (1 << 62))
    while True:
        name = SHA256_MULTIHASH_PREFIX + number.to_bytes(SHA256_BYTES, "big")
        if shared_bits(kad_key(name), own_key) == bits:
            return name
        number += 1


def _digest(key: bytes) -> bytes:
    """The sha256 digest that a key names; empty when it names something else."""
    if len(key) == len(SHA256_MULTIHASH_PREFIX) + SHA256_BYTES and key.startswith(SHA256_MULTIHASH_PREFIX):
        return key[len(SHA256_MULTIHASH_PREFIX) :]
    return b""
