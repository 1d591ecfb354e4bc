"""Many lease machines with random delays, deaths and differing views: no cycle, no wait beyond a deadline, few copies."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.crowdframes import encode, parse_body
from p2pgz.core.crowdmsg import EXTENT_DOCUMENT, CrowdFrame, Member
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Direct, Fetch, Forget, Send, Serve
from p2pgz.core.leases import Leases
from p2pgz.core.peerid import PeerId
from p2pgz.core.wire import HEADER

EXTENTS = (0, 1, EXTENT_DOCUMENT)
CHUNKS = {0: (0, 1), 1: (2, 3, 4), EXTENT_DOCUMENT: (0,)}
SWARM = {0: b"l" * 32, 1: b"l" * 32, EXTENT_DOCUMENT: b"d" * 32}
DEADLINE_SECONDS = 12.0
TICK_SECONDS = 0.25


class Node:
    def __init__(self, lab: Lab, member: Member, electorate: Electorate) -> None:
        self.lab = lab
        self.peer = member.peer
        self.alive = True
        self.silent = False
        self.can_fetch = lab.rng.random() >= lab.refused_share
        self.present: set[tuple[bytes, int]] = set()
        self.due: dict[tuple[int, int], float] = {}
        self.direct: set[tuple[int, int]] = set()
        self.leases = Leases(
            member.peer,
            member.zone,
            electorate,
            Random(lab.rng.random()),
            has=lambda swarm, n: (swarm, n) in self.present,
            complete=lambda swarm, extent: all((swarm, n) in self.present for n in CHUNKS[extent]),
        )

    def want(self, extent: int) -> None:
        if self.alive:
            now = self.lab.now
            chunks = [n for n in CHUNKS[extent] if (SWARM[extent], n) not in self.present]
            for n in chunks:
                self.due[extent, n] = now + DEADLINE_SECONDS
            priority = self.lab.rng.randrange(4)
            self.leases.want(
                SWARM[extent], extent, chunks, priority=priority, deadline=now + DEADLINE_SECONDS, now=now
            )
            self.act()

    def act(self) -> None:
        lab = self.lab
        for action in self.leases.actions():
            match action:
                case Send(peer, frame):
                    lab.send(self, peer, frame)
                case Forget(peer, request):
                    lab.nodes[peer].leases.forgotten(self.peer, request)
                case Serve(peer, request, swarm, extent, chunks, _):
                    for n in chunks:
                        lab.data(self, peer, request, swarm, extent, n)
                case Fetch(_, extent, chunks, _):
                    lab.fetches += len(chunks)
                    delay = lab.rng.uniform(0.01, lab.fetch_seconds)
                    if self.can_fetch:
                        lab.after(delay, lambda e=extent, c=chunks: self.landed(e, c))
                    else:
                        lab.after(delay, lambda e=extent: self.failed(e))
                case Direct(_, extent, chunks):
                    for n in chunks:
                        assert lab.now <= self.due[extent, n] + TICK_SECONDS + 1e-6, "told too late"
                        self.direct.add((extent, n))

    def landed(self, extent: int, chunks: tuple[int, ...]) -> None:
        if self.alive:
            self.present.update((SWARM[extent], n) for n in chunks)
            self.leases.landed(SWARM[extent], extent, chunks, self.lab.now)
            self.act()

    def failed(self, extent: int) -> None:
        if self.alive:
            self.leases.failed(SWARM[extent], extent, self.lab.now, refused=True)
            self.act()

    def tick(self) -> None:
        if self.alive:
            self.leases.tick(self.lab.now)
            self.act()
            self.lab.after(TICK_SECONDS, self.tick)


class Lab:
    def __init__(
        self, seed: int, *, nodes: int, zones: int, views_differ: bool, faults: bool, refused_share: float
    ) -> None:
        self.rng = rng = Random(seed)
        self.now = 1000.0
        self.fetches = 0
        self.fetch_seconds = rng.choice([0.05, 1.5])
        self.refused_share = refused_share
        self.slowest = rng.choice([0.01, 0.3])
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._last: dict[tuple[bytes, bytes], float] = {}
        members = [
            Member(PeerId.of_ed25519(rng.randbytes(32)).raw, 1, 0, 0, f"z{i % zones}", "", b"")
            for i in range(nodes)
        ]
        self.nodes: dict[bytes, Node] = {}
        for own in members:
            view = {m.peer: m for m in members if m is own or not views_differ or rng.random() < 0.8}
            self.nodes[own.peer] = Node(self, own, Electorate(view, self.now))
        for node in self.nodes.values():
            self.after(rng.random() * TICK_SECONDS, node.tick)
            for extent in EXTENTS:
                self.after(rng.random() * 2, lambda node=node, extent=extent: node.want(extent))
        if faults:
            for node in rng.sample(list(self.nodes.values()), nodes // 3):
                self.after(rng.random() * 3, lambda node=node: self.die(node, members))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._count), action))

    def _arrive(self, one: bytes, other: bytes, action: Callable[[], None]) -> None:
        """In order between two nodes, as on a connection."""
        at = max(self._last.get((one, other), 0.0), self.now + self.rng.uniform(0.001, self.slowest))
        self._last[one, other] = at
        self.after(at - self.now, action)

    def send(self, sender: Node, peer: bytes, frame: CrowdFrame) -> None:
        data = encode(frame)
        _, kind = HEADER.unpack_from(data)
        again = parse_body(kind, memoryview(data)[HEADER.size :])
        assert again == frame
        other = self.nodes[peer]

        def arrived() -> None:
            if other.alive:
                other.leases.receive(sender.peer, again, self.now)
                other.act()
            elif not other.silent:
                self.closed(sender, peer)

        self._arrive(sender.peer, peer, arrived)

    def closed(self, node: Node, peer: bytes) -> None:
        if node.alive:
            node.leases.lost(peer, self.now)
            node.act()

    def data(self, sender: Node, peer: bytes, request: int, swarm: bytes, extent: int, n: int) -> None:
        assert (swarm, n) in sender.present, "what is served is here"
        other = self.nodes[peer]

        def arrived() -> None:
            sender.leases.sent(peer, request, (n,))
            if other.alive and sender.alive:
                other.landed(extent, (n,))

        self._arrive(sender.peer, peer, arrived)

    def die(self, node: Node, members: list[Member]) -> None:
        if self.rng.random() < 0.3:
            node.leases.leave(self.now)
            node.act()
        node.alive = False
        node.silent = self.rng.random() < 0.5
        gone = {node.peer for node in self.nodes.values() if not node.alive}
        view = {m.peer: m for m in members if m.peer not in gone}
        for other in self.nodes.values():
            if not node.silent:
                self.after(self.rng.random() * 0.1, lambda other=other: self.closed(other, node.peer))
            self.after(self.rng.uniform(1, 4), lambda other=other: self.learns(other, node.peer, view))

    def learns(self, node: Node, dead: bytes, view: dict[bytes, Member]) -> None:
        if node.alive:
            own = node.leases.own
            assert own in view or own in self.nodes
            node.leases.elect(Electorate(view, self.now), 7, self.now)
            node.leases.lost(dead, self.now, dead=True)
            node.act()

    def check_no_cycle(self) -> None:
        for extent in EXTENTS:
            for node in self.nodes.values():
                seen = {node.peer}
                at = node
                while at.alive and (waits := at.leases.waits_for(SWARM[extent], extent)) is not None:
                    parent = self.nodes[waits[0]]
                    if not parent.alive or at.peer not in parent.leases.followers(SWARM[extent], extent):
                        break
                    assert parent.peer not in seen, "a cycle"
                    seen.add(parent.peer)
                    at = parent

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self.check_no_cycle()

    def check_everyone_was_served(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                missing = {
                    (extent, n)
                    for extent, n in node.due
                    if (SWARM[extent], n) not in node.present and (extent, n) not in node.direct
                }
                assert not missing


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    nodes=st.integers(1, 9),
    zones=st.integers(1, 3),
    views_differ=st.booleans(),
    faults=st.booleans(),
    refused_share=st.sampled_from([0.0, 0.0, 0.4]),
)
def test_nobody_waits_in_a_circle_or_beyond_the_deadline(
    seed: int, nodes: int, zones: int, views_differ: bool, faults: bool, refused_share: float
) -> None:
    lab = Lab(
        seed,
        nodes=nodes,
        zones=zones,
        views_differ=views_differ,
        faults=faults,
        refused_share=refused_share,
    )
    lab.run(2 + DEADLINE_SECONDS + 1)
    lab.check_everyone_was_served()
    unique = sum(map(len, CHUNKS.values()))
    direct = sum(len(node.direct) for node in lab.nodes.values())
    if not views_differ and refused_share == 0:
        assert direct == 0, "deaths alone send nobody to the registry"
        assert faults or lab.fetches == unique
    assert lab.fetches <= unique * nodes * 2
