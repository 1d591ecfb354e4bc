"""The DHT on libp2p: puts host, node and announcements together, and lets in only who is admitted.

Opened by the node when peers are enabled; nothing else imports it, since it imports libp2p. On every connection the dialling
side greets first: both sides learn whether the other has restarted, and see the proofs of the cluster key.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from p2pgz.core import records
from p2pgz.core.admission import Admission
from p2pgz.core.keyspace import Contact
from p2pgz.core.peerid import PeerId
from p2pgz.core.records import Greeting, Reply
from p2pgz.core.twins import Twins
from p2pgz.errors import P2pgzError, PeerFault, SourceUnavailable
from p2pgz.p2p.announce import Announcer
from p2pgz.p2p.host import PeerHost, open_host
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.kad import PROTOCOL, Holdings, KadNode

log = structlog.get_logger(component="dht")

ADMITTED_MAX = 20_000  # remembered; who falls out greets again
GREETING_SECONDS = 5.0


class Dht:
    """An open DHT: `kad` finds, `announcer` announces, `host` holds the connections."""

    def __init__(
        self,
        host: PeerHost,
        identity: Identity,
        *,
        admission: Admission,
        holdings: Holdings | None,
        bootstrap: Callable[[], Iterable[Contact]],
        nursery: trio.Nursery,
        protocol: str,
        now: Callable[[], float],
    ) -> None:
        self.host = host
        self.kad = KadNode(_HostNetwork(self), holdings=holdings, protocol=protocol, now=now)
        self.announcer = Announcer(
            self.kad, random=random.SystemRandom().random, bootstrap=bootstrap, now=now
        )
        self._admission = admission
        self._identity = identity
        self._nursery = nursery
        self._admitted: OrderedDict[bytes, None] = OrderedDict()
        self._greeted: dict[bytes, trio.Event] = {}
        self._epochs: dict[bytes, bytes] = {}
        self.twins = Twins()
        host.on_peer = self._identified
        host.serve(protocol, self._answer_kad)
        host.serve(records.PROTOCOL, self._answer_records)

    @property
    def _proofs(self) -> tuple[bytes, ...]:
        return self._admission.proofs(self._identity.peer_id)

    def admits(self, peer: bytes) -> bool:
        """Whether a peer has shown that it may take part, or needs not show anything."""
        if peer in self._admitted:
            return True
        try:
            return self._admission.admits(PeerId(peer), ())
        except ValueError:
            return False

    def contact(self, peer: bytes) -> Contact | None:
        """Where a peer listens, if it has told us."""
        return self.host.contacts.get(peer) or self.kad.table.get(peer)

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve an inbound connection that begins with multistream (for `PeerListener`)."""
        await self.host.accept(stream)

    # -- answering

    async def _answer_kad(self, sender: Contact, data: bytes) -> bytes | None:
        if not self.admits(sender.peer):
            raise PeerFault("a peer that is not admitted asks the DHT")
        return await self.kad.answer(sender, data)

    async def _answer_records(self, sender: Contact, data: bytes) -> bytes | None:
        request = records.decode_request(data)
        if isinstance(request, Greeting):
            if not self._admit(sender.peer, request.proofs):
                raise PeerFault("a peer without proof of the cluster key")
            self._greeting(sender, request.epoch)
            await trio.lowlevel.checkpoint()
            return records.encode_reply(Reply(self.announcer.epoch, proofs=self._proofs))
        if not self.admits(sender.peer):
            raise PeerFault("a peer that is not admitted sends records")
        return self.announcer.answer(sender, data)

    def _admit(self, peer: bytes, proofs: Sequence[bytes]) -> bool:
        try:
            admitted = self._admission.admits(PeerId(peer), proofs)
        except ValueError:
            return False
        if admitted and not self._admission.open:
            self._admitted[peer] = None
            self._admitted.move_to_end(peer)
            if len(self._admitted) > ADMITTED_MAX:
                self._admitted.popitem(last=False)
        return admitted

    # -- who is there

    def _identified(self, contact: Contact, dialled: bool) -> None:
        """Identify has run on a connection: the peer's protocols and addresses are known."""
        protocols = self.host.protocols.get(contact.peer, frozenset())
        if self.kad.protocol not in protocols:
            return
        if records.PROTOCOL not in protocols:
            if self.admits(contact.peer):
                self.announcer.joined(contact, None)
        elif contact.peer in self._epochs:
            self._learn_epoch(contact, self._epochs.pop(contact.peer))
        elif dialled:
            self._nursery.start_soon(self._greet_guarded, contact)

    def _greeting(self, contact: Contact, epoch: bytes) -> None:
        if self.twins.note(contact.peer, epoch):
            log.error(
                "peer.twice",
                peer=str(PeerId(contact.peer)),
                effect="two hosts have this identity: others take the two for one, and neither is found reliably",
                hint="identities must not be copied: stop one of them, remove its identity.key and start it again",
            )
        self._learn_epoch(contact, epoch)

    def _learn_epoch(self, contact: Contact, epoch: bytes) -> None:
        """The greeting and identify come in any order; only both together make a member that can be told of."""
        if contact.addresses:
            self.announcer.joined(contact, epoch)
        else:
            self._epochs[contact.peer] = epoch
            if len(self._epochs) > ADMITTED_MAX:
                del self._epochs[next(iter(self._epochs))]

    async def greet(self, contact: Contact) -> None:
        """Greet a peer once per connection; raises SourceUnavailable when it is not one of us."""
        if contact.peer not in self.host.connected():
            self._greeted.pop(contact.peer, None)
            await self.host.connect(contact)
        running = self._greeted.get(contact.peer)
        if running is not None:
            await running.wait()
            self._check_admitted(contact.peer)  # who waited for another's greeting learns how it went
            return
        self._greeted[contact.peer] = done = trio.Event()
        try:
            with trio.fail_after(GREETING_SECONDS):
                request = records.encode_request(Greeting(self.announcer.epoch, self._proofs))
                reply = records.decode_reply(await self.host.ask(contact, records.PROTOCOL, request))
            if not self._admit(contact.peer, reply.proofs):
                raise PeerFault("the peer shows no proof of the cluster key")
            self._greeting(contact, reply.epoch)
        except (P2pgzError, trio.TooSlowError) as error:
            self._greeted.pop(contact.peer, None)
            self._check_admitted(contact.peer, error)
        finally:
            if not self.admits(contact.peer):  # cancelled: the next one greets anew
                self._greeted.pop(contact.peer, None)
            done.set()
        if len(self._greeted) > ADMITTED_MAX:
            del self._greeted[next(iter(self._greeted))]

    def _check_admitted(self, peer: bytes, cause: Exception | None = None) -> None:
        if not self.admits(peer):
            self.kad.table.discard(peer)
            raise SourceUnavailable(f"peer {PeerId(peer)} is not admitted") from cause

    async def readmit(self) -> None:
        """Our keys or our list have changed: everybody has to show again that he may take part."""
        self._admitted.clear()
        self._greeted.clear()
        async with trio.open_nursery() as nursery:
            for peer in self.host.connected():
                nursery.start_soon(self.host.disconnect, peer)

    async def _greet_guarded(self, contact: Contact) -> None:
        try:
            await self.greet(contact)
        except SourceUnavailable as error:
            log.debug("peer.refused", reason=str(error))

    @property
    def admission_open(self) -> bool:
        """Whether anyone may take part: then nobody waits for a greeting."""
        return self._admission.open


class _HostNetwork:
    """`KadNetwork` over libp2p streams."""

    def __init__(self, dht: Dht) -> None:
        self._dht = dht

    def own(self) -> Contact:
        return Contact(self._dht.host.peer, self._dht.host.addresses)

    async def ask(self, contact: Contact, protocol: str, message: bytes) -> bytes:
        if not self._dht.admission_open:
            await self._dht.greet(contact)
        return await self._dht.host.ask(contact, protocol, message)

    async def tell(self, contact: Contact, protocol: str, messages: Sequence[bytes]) -> None:
        if not self._dht.admission_open:
            await self._dht.greet(contact)
        await self._dht.host.tell(contact, protocol, messages)


@asynccontextmanager
async def open_dht(
    identity: Identity,
    *,
    announce: Sequence[str],
    admission: Admission | None = None,
    holdings: Holdings | None = None,
    bootstrap: Callable[[], Iterable[Contact]] = tuple,
    protocol: str = PROTOCOL,
    now: Callable[[], float] = trio.current_time,
) -> AsyncIterator[Dht]:
    """A DHT node with our identity. `announce`: multiaddrs of the listener that gives its connections to `Dht.accept`.

    `bootstrap` is asked whenever nobody is known; it may name peers that are not there.
    """
    failure: Exception | None = None
    async with open_host(identity.seed, announce=announce) as host, trio.open_nursery() as nursery:
        dht = Dht(
            host,
            identity,
            admission=admission or Admission(),
            holdings=holdings,
            bootstrap=bootstrap,
            nursery=nursery,
            protocol=protocol,
            now=now,
        )
        await nursery.start(dht.announcer.run)
        try:
            yield dht
        except Exception as error:  # noqa: BLE001  # the caller's: raised below, outside the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
