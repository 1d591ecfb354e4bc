"""A simulated node: the product's own decisions (`core.leases`, `core.order`, `core.membership`) on a simulated network.

What is simulated is what they are surrounded by: links, processors, a registry that sends at a rate, connections that
have to be made. Chunks are numbers; a chunk that arrives counts as verified. Used by `testing.sim` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Final, Protocol

from p2pgz.core.crowdmsg import CrowdFrame, Gossip, Heartbeat, Range, Ranges
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Direct, Fetch, Forget, Send, Serve
from p2pgz.core.leases import Leases
from p2pgz.core.order import Order, shuffled
from p2pgz.core.schedule import Priority
from p2pgz.testing.sim_network import Downlink, Processor, SimClock, Uplink

# A frame costs each end this much of its loop: half of a call's 0.3 ms (frames, wake-ups, TLS records)
CALL_SECONDS: Final = 0.00015
# A TLS handshake takes 1.8 ms of both ends together, and one and a half round trips
HANDSHAKE_SECONDS: Final = 0.0009
HANDSHAKE_ROUND_TRIPS: Final = 1.5
# Hashing takes 0.6 ms for a MiB, the exchange 2.2 ms (450 MB/s) at each end
SEND_SECONDS_PER_BYTE: Final = 2.2e-3 / (1 << 20)
RECEIVE_SECONDS_PER_BYTE: Final = 2.8e-3 / (1 << 20)
# Only readers have a deadline
DEADLINE_SECONDS: Final = {Priority.BLOCKED_READ: 60.0, Priority.START_UP: 3600.0}
SWARM: Final = bytes(range(32))


class World(Protocol):
    """What a node sees of the simulation."""

    clock: SimClock
    chunk_bytes: int
    extent_chunks: int

    def node(self, peer: bytes) -> SimNode:
        """The node with that id."""
        ...

    def delay(self, one: SimNode, other: SimNode) -> float:
        """One way, in seconds."""
        ...

    def reachable(self, one: SimNode, other: SimNode) -> bool:
        """No partition is between them."""
        ...

    def fetch(
        self, node: SimNode, size: int, arrived: Callable[[], None], *, first: bool, priority: int
    ) -> None:
        """A chunk from the registry; `first` of a request."""
        ...

    def crossed(self, one: SimNode, other: SimNode, size: int) -> None:
        """Bytes go from one node to another."""
        ...

    def finished(self, node: SimNode) -> None:
        """The node has all it wanted."""
        ...


class SimNode:
    """One node. `wanted` are the extents of the start-up list; the first `in_order` of them are read one after the other."""

    def __init__(
        self,
        world: World,
        peer: bytes,
        zone: str,
        electorate: Electorate,
        rng: Random,
        *,
        up: float,
        down: float,
    ) -> None:
        self.world = world
        self.peer = peer
        self.zone = zone
        self.rng = rng
        self.cpu = Processor(world.clock)
        self.up = Uplink(world.clock, up)
        self.down = Downlink(down)
        self.alive = True
        self.silent = False  # stopped rather than killed: nobody is told
        self.can_fetch = True
        self.serves = True
        self.present: set[int] = set()
        self.started_at = self.urgent_at = self.finished_at = 0.0
        self.received_twice = 0
        self.direct = 0
        self.connected: set[bytes] = set()
        self.leases = Leases(
            peer, zone, electorate, rng, has=lambda _, n: n in self.present, complete=self._complete
        )
        self.order: Order[int] = Order()
        self.on_member_frame: Callable[[bytes, CrowdFrame], None] | None = None
        self.on_member_lost: Callable[[bytes], None] | None = None
        self.held: list[Callable[[], None]] | None = None
        self._left: dict[int, int] = {}  # extent -> chunks missing
        self._urgent = 0
        self._ticking = False

    @property
    def done(self) -> bool:
        """Whether it has all that it wanted."""
        return self.finished_at > 0

    def start(self, wanted: Sequence[int], in_order: int) -> None:
        """Want these extents."""
        if not self.alive:
            return
        self.started_at = self.world.clock.now
        self._left = dict.fromkeys(wanted, self.world.extent_chunks)
        self._urgent = in_order
        self.order.add(wanted[:in_order], Priority.BLOCKED_READ)
        self.order.add(shuffled(wanted[in_order:], self.rng), Priority.START_UP)
        self.pump()

    def release(self) -> None:
        """The node has met others, or has waited for them long enough."""
        held, self.held = self.held, None
        for ask in held or []:
            ask()

    def pump(self) -> None:
        """Ask for what there is room for."""
        if self.held is not None:
            self.held.append(self.pump)
            return
        now = self.world.clock.now
        for extent, priority in self.order.take():
            chunks = [n for n in self._chunks(extent) if n not in self.present]
            self.leases.want(
                SWARM, extent, chunks, priority=priority, deadline=now + DEADLINE_SECONDS[priority], now=now
            )
        self.act()

    def act(self) -> None:
        """Do what the leases say."""
        if not self.alive:
            return
        for action in self.leases.actions():
            match action:
                case Send(peer, frame):
                    self.send(peer, frame)
                case Forget(peer, request):
                    other = self.world.node(peer)
                    self.world.clock.at(
                        self.world.clock.now + self.world.delay(self, other),
                        partial(other.leases.forgotten, self.peer, request),
                    )
                case Serve(peer, request, _, extent, chunks, priority):
                    if not self.serves:
                        continue  # and says PENDING for ever
                    self._serve(peer, request, extent, chunks, priority)
                case Fetch(_, extent, chunks, priority):
                    self._fetch(extent, chunks, priority)
                case Direct(_, extent, chunks):
                    self.direct += len(chunks)
                    self._fetch(extent, chunks, Priority.BLOCKED_READ)
        if not self._ticking and self.leases.next_at() is not None:
            self._ticking = True
            self.world.clock.at(self.leases.next_at() or 0.0, self._tick)

    def send(self, peer: bytes, frame: CrowdFrame) -> None:
        """A frame to another node; over a new connection if there is none."""
        other = self.world.node(peer)
        delay = self.world.delay(self, other)
        at = self.cpu.after(CALL_SECONDS)
        if peer not in self.connected:
            at = self.cpu.after(HANDSHAKE_SECONDS) + HANDSHAKE_ROUND_TRIPS * 2 * delay
            if other.alive and self.world.reachable(self, other):
                other.cpu.after(HANDSHAKE_SECONDS)
                self.connected.add(peer)
                other.connected.add(self.peer)
        self.world.clock.at(at + delay, lambda: other.arrived(self, frame))

    def arrived(self, sender: SimNode, frame: CrowdFrame) -> None:
        """A frame is here; it waits for the processor."""
        if not self.world.reachable(sender, self):
            return
        if not self.alive:
            if not self.silent:
                self.world.clock.at(
                    self.world.clock.now + self.world.delay(self, sender), lambda: sender.lost(self.peer)
                )
            return
        idle = self.cpu.free_at <= self.world.clock.now
        at = self.cpu.after(CALL_SECONDS)
        if idle:
            self._receive(sender.peer, frame)
        else:
            self.world.clock.at(at, lambda: self._receive(sender.peer, frame))

    def lost(self, peer: bytes, *, dead: bool = False) -> None:
        """The connection is closed, or cannot be made."""
        self.connected.discard(peer)
        if self.alive:
            if self.on_member_lost is not None and not dead:
                self.on_member_lost(peer)
            self.leases.lost(peer, self.world.clock.now, dead=dead)
            self.act()

    def die(self, *, silent: bool) -> None:
        """End at once. `silent`: as if the machine were gone, so that nobody is told."""
        self.alive, self.silent = False, silent
        for peer in [] if silent else sorted(self.connected):
            other = self.world.node(peer)
            self.world.clock.at(
                self.world.clock.now + self.world.delay(self, other),
                partial(other.lost, self.peer),
            )

    def landed(self, extent: int, n: int, source: bytes | None) -> None:
        """A chunk is here, from a peer or from the registry."""
        if not self.alive:
            return
        more = False
        if n in self.present:
            self.received_twice += 1
        else:
            self.present.add(n)
            if extent in self._left:
                self._left[extent] -= 1
                if not self._left[extent]:
                    self._extent_done(extent)
                    more = True
        self.leases.landed(SWARM, extent, (n,), self.world.clock.now, source=source)
        if more:
            self.pump()
        else:
            self.act()

    def _extent_done(self, extent: int) -> None:
        del self._left[extent]
        self.order.done(extent, good=True)
        now = self.world.clock.now
        if extent < self._urgent and not any(other < self._urgent for other in self._left):
            self.urgent_at = now
        if not self._left:
            self.finished_at = now
            self.world.finished(self)

    def _receive(self, peer: bytes, frame: CrowdFrame) -> None:
        if not self.alive:
            return
        if isinstance(frame, Heartbeat | Gossip | Ranges | Range):
            assert self.on_member_frame is not None
            self.on_member_frame(peer, frame)
            return
        self.leases.receive(peer, frame, self.world.clock.now)
        self.act()

    def _serve(self, peer: bytes, request: int, extent: int, chunks: Sequence[int], priority: int) -> None:
        other = self.world.node(peer)
        size = self.world.chunk_bytes
        delay = self.world.delay(self, other)
        for n in chunks:
            self.cpu.after(size * SEND_SECONDS_PER_BYTE)
            self.world.crossed(self, other, size)

            def arrived(n: int = n) -> None:
                self.leases.sent(peer, request, (n,))
                if self.alive and other.alive and self.world.reachable(self, other):
                    other.leases.heard(self.peer, self.world.clock.now)
                    at = other.cpu.after(size * RECEIVE_SECONDS_PER_BYTE)
                    self.world.clock.at(at, lambda: other.landed(extent, n, self.peer))

            self.up.send(size, priority, delay, other.down, arrived)

    def _fetch(self, extent: int, chunks: Sequence[int], priority: int) -> None:
        if not self.can_fetch:
            now = self.world.clock.now
            self.leases.failed(SWARM, extent, now, refused=True)
            self.world.clock.at(now, self.act)
            return
        size = self.world.chunk_bytes
        for i, n in enumerate(chunks):

            def arrived(n: int = n) -> None:
                self.leases.fetched(size)
                at = self.cpu.after(size * RECEIVE_SECONDS_PER_BYTE)
                self.world.clock.at(at, lambda: self.landed(extent, n, None))

            self.world.fetch(self, size, arrived, first=i == 0, priority=priority)

    def _tick(self) -> None:
        self._ticking = False
        if self.alive:
            self.leases.tick(self.world.clock.now)
            self.act()

    def _chunks(self, extent: int) -> range:
        count = self.world.extent_chunks
        return range(extent * count, (extent + 1) * count)

    def _complete(self, _: bytes, extent: int) -> bool:
        return all(n in self.present for n in self._chunks(extent))
