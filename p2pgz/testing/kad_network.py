"""A network of DHT nodes inside one process, for tests: no sockets, a fixed delay, deaths and restarts at will.

Messages are the real bytes, so that a node here runs all of its code but `p2p.host`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from p2pgz.core import records
from p2pgz.core.keyspace import Contact
from p2pgz.core.peerid import PeerId
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.announce import Announcer
from p2pgz.p2p.kad import PROTOCOL, KadNode


class Things:
    """What one simulated host has (`own`), and what its partners' bitmaps show (`seen`)."""

    def __init__(self) -> None:
        self.own: set[bytes] = set()
        self.seen: dict[bytes, list[Contact]] = {}

    def holds(self, digest: bytes) -> bool:
        return digest in self.own

    def holders(self, digest: bytes) -> list[Contact]:
        return self.seen.get(digest, [])


@dataclass
class SimulatedNode:
    """A running node; `stop` ends it without a word."""

    contact: Contact
    things: Things
    kad: KadNode
    announcer: Announcer
    scope: trio.CancelScope
    met: set[bytes] = field(default_factory=set)

    def stop(self) -> None:
        self.scope.cancel()


class _Link:
    """A node's `KadNetwork`."""

    def __init__(self, network: SimulatedNetwork, contact: Contact) -> None:
        self._network = network
        self._contact = contact

    def own(self) -> Contact:
        return self._contact

    async def ask(self, contact: Contact, protocol: str, message: bytes) -> bytes:
        answer = await self._network.deliver(self._contact, contact, protocol, message)
        if answer is None:
            raise SourceUnavailable("no answer")
        await trio.sleep(self._network.delay_seconds)
        return answer

    async def tell(self, contact: Contact, protocol: str, messages: Sequence[bytes]) -> None:
        for message in messages:
            await self._network.deliver(self._contact, contact, protocol, message)


class SimulatedNetwork:
    """All nodes, by peer id. Those in `silent` take messages and never answer."""

    def __init__(self, nursery: trio.Nursery, *, delay_seconds: float = 0.001, seed: int = 1) -> None:
        self.nodes: dict[bytes, SimulatedNode] = {}
        self.silent: set[bytes] = set()
        self.delay_seconds = delay_seconds
        self.messages = 0
        self.random = random.Random(seed)
        self._nursery = nursery

    def start(
        self, number: int, *, bootstrap: Callable[[], Sequence[Contact]] = tuple, things: Things | None = None
    ) -> SimulatedNode:
        """Start, or start again, the node of this number; it remembers nothing of its last life but `things`."""
        contact = contact_of(number)
        old = self.nodes.get(contact.peer)
        if old is not None:
            old.stop()
        things = things or Things()
        kad = KadNode(_Link(self, contact), holdings=things)
        announcer = Announcer(
            kad,
            random=self.random.random,
            bootstrap=bootstrap,
            epoch=self.random.randbytes(records.EPOCH_BYTES),
        )
        node = SimulatedNode(contact, things, kad, announcer, trio.CancelScope())
        self.nodes[contact.peer] = node
        for other in self.nodes.values():
            other.met.discard(contact.peer)
        self._nursery.start_soon(self._run, node)
        return node

    async def _run(self, node: SimulatedNode) -> None:
        with node.scope:
            await node.announcer.run()
        if self.nodes.get(node.contact.peer) is node:
            del self.nodes[node.contact.peer]

    async def deliver(self, sender: Contact, to: Contact, protocol: str, message: bytes) -> bytes | None:
        """Carry one message; the answer, or None where the protocol has none. Raises SourceUnavailable."""
        self.messages += 1
        await trio.sleep(self.delay_seconds)
        node, source = self.nodes.get(to.peer), self.nodes.get(sender.peer)
        if node is None or source is None:
            raise SourceUnavailable("connection refused")
        if to.peer in self.silent:
            await trio.sleep_forever()
        if to.peer not in source.met or sender.peer not in node.met:
            source.met.add(to.peer)
            node.met.add(sender.peer)
            source.announcer.joined(node.contact, node.announcer.epoch)
            node.announcer.joined(source.contact, source.announcer.epoch)
        if protocol == PROTOCOL:
            return await node.kad.answer(sender, message)
        if protocol == records.PROTOCOL:
            return node.announcer.answer(sender, message)
        raise SourceUnavailable(f"does not speak {protocol}")


def contact_of(number: int) -> Contact:
    """The contact of the node of this number, the same in every run."""
    peer = PeerId.of_ed25519(hashlib.sha256(b"node %d" % number).digest())
    return Contact(peer.raw, (b"\x04\x7f\x00\x00\x01\x06" + (4001 + number).to_bytes(2, "big"),))
