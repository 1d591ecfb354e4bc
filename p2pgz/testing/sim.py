"""A flash crowd in simulation: N nodes start the same image; how many copies leave the registry, and when is everybody done?

`make sim N=1000` runs it and ends with one line of JSON. The nodes decide with the product's own code (`testing.sim_node`);
the same seed gives the same run. docs/explanation/scale.md says what is modelled and what is not.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

from p2pgz.core.crowdmsg import Member, MemberFlag
from p2pgz.core.homes import ELDER_SECONDS, Electorate
from p2pgz.core.peerid import PeerId
from p2pgz.testing.sim_members import SimMember
from p2pgz.testing.sim_network import MBIT, SimClock, Uplink
from p2pgz.testing.sim_node import SimNode

# A member that dies is known to be gone by then (heartbeats: 6 s, two reports, a flood)
DETECTION_SECONDS: Final = 8.0
NOW: Final = 1_000_000.0  # what the members' clocks say at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What is simulated. The default is the shape of a rack of machines and a registry next to it."""

    nodes: int = 100
    seed: int = 1
    start_within_seconds: float = 1.0
    mib: int = 32
    chunk_kib: int = 256
    in_order_share: float = 0.125
    zones: int = 1
    up_mbit: float = 1000.0
    down_mbit: float = 1000.0
    registry_mbit: float = 10_000.0
    registry_seconds: float = 0.03
    rtt_seconds: float = 0.0005
    zone_rtt_seconds: float = 0.0015
    elders: int | None = None
    """None: all nodes have been up for a while; 1: a cold start beside one seed"""
    dead_share: float = 0.0
    dead_within_seconds: float = 1.0
    membership: bool = False
    """simulated as well, rather than known to everybody DETECTION_SECONDS after a death"""
    without_credentials_share: float = 0.0
    never_serving_share: float = 0.0
    """these take parents' places and send nothing but promises"""
    partition_seconds: float = 0.0
    """for this long after the start, the first third of the nodes and the rest cannot reach each other"""
    until_seconds: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out. Times are from each node's own start."""

    nodes: int
    finished: int
    alive: int
    copies: float
    p50_s: float
    p99_s: float
    in_order_p99_s: float
    busiest_ratio: float
    zone_copies: float
    direct_chunks: int
    received_twice: int
    events: int
    wall_seconds: float


class Simulation:
    """One run."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.rng = Random(crowd.seed)
        self.clock = SimClock()
        self.clock.now = NOW
        self.chunk_bytes = crowd.chunk_kib << 10
        self.extent_chunks = max(1, (1 << 20) // self.chunk_bytes)
        self.registry = Uplink(self.clock, crowd.registry_mbit * MBIT)
        self.registry_chunks = 0
        self.crossed_bytes = 0
        self.waiting = 0
        self._peers: dict[bytes, SimNode] = {}
        self._parted: set[bytes] = set()
        self.members = {member.peer: member for member in map(self._member, range(crowd.nodes))}
        self.electorate = Electorate(self.members, NOW)
        self.nodes = [self._node(member) for member in self.members.values()]
        self.known = [self._knows(node) for node in self.nodes] if crowd.membership else []
        self._plan()

    def _member(self, i: int) -> Member:
        crowd = self.crowd
        elder = crowd.elders is None or i < crowd.elders
        since = int(NOW) - (10 * ELDER_SECONDS if elder else 0)
        flags = MemberFlag.SEED if i == 0 else MemberFlag.NONE
        peer = PeerId.of_ed25519(self.rng.randbytes(32)).raw
        return Member(peer, int(NOW) * 1000, since, flags, f"z{i % crowd.zones}", "", b"")

    def _node(self, member: Member) -> SimNode:
        crowd = self.crowd
        node = SimNode(
            self, member.peer, member.zone, self.electorate, Random(self.rng.random()),
            up=crowd.up_mbit * MBIT, down=crowd.down_mbit * MBIT,
        )  # fmt: skip
        self._peers[member.peer] = node
        return node

    def _knows(self, node: SimNode) -> SimMember:
        """At a cold start a node knows the seed, and nobody has told the seed of it."""
        seed, own = self.nodes[0].peer, self.members[node.peer]
        known = self.members if self.crowd.elders is None else {p: self.members[p] for p in {seed, own.peer}}
        return SimMember(self, node, own, known, Random(self.rng.random()))

    def _plan(self) -> None:
        crowd, rng = self.crowd, self.rng
        extents = list(range(crowd.mib))
        in_order = max(1, int(crowd.mib * crowd.in_order_share))
        for node in self.nodes:
            at = NOW + rng.random() * crowd.start_within_seconds
            self.waiting += 1
            self.clock.at(at, partial(node.start, extents, in_order))
        for node in rng.sample(self.nodes, int(crowd.without_credentials_share * crowd.nodes)):
            node.can_fetch = False
        for node in rng.sample(self.nodes, int(crowd.never_serving_share * crowd.nodes)):
            node.serves = False
        for node in rng.sample(self.nodes[1:], int(crowd.dead_share * crowd.nodes)):
            at, silent = NOW + rng.random() * crowd.dead_within_seconds, rng.random() < 0.5
            self.clock.at(at, partial(self._die, node, silent=silent))
        if crowd.partition_seconds:
            self._parted = {node.peer for node in self.nodes[: crowd.nodes // 3]}
            self.clock.at(NOW + crowd.partition_seconds, self._parted.clear)

    def _die(self, node: SimNode, *, silent: bool) -> None:
        if node.done:
            return
        self.waiting -= 1
        node.die(silent=silent)
        if not self.crowd.membership:
            self.clock.at(self.clock.now + DETECTION_SECONDS, lambda: self._known_dead(node))

    def _known_dead(self, dead: SimNode) -> None:
        self.members = {peer: member for peer, member in self.members.items() if peer != dead.peer}
        self.electorate = Electorate(self.members, self.clock.now)
        for node in self.nodes:
            if node.alive:
                node.leases.elect(self.electorate, len(self.members), self.clock.now)
                node.lost(dead.peer, dead=True)

    # --- what the nodes see

    def node(self, peer: bytes) -> SimNode:
        """The node with that id."""
        return self._peers[peer]

    def delay(self, one: SimNode, other: SimNode) -> float:
        """One way, in seconds."""
        crowd = self.crowd
        return (crowd.rtt_seconds if one.zone == other.zone else crowd.zone_rtt_seconds) / 2

    def reachable(self, one: SimNode, other: SimNode) -> bool:
        """No partition is between them."""
        return not self._parted or (one.peer in self._parted) == (other.peer in self._parted)

    def fetch(
        self, node: SimNode, size: int, arrived: Callable[[], None], *, first: bool, priority: int
    ) -> None:
        """A chunk from the registry; `first` of a request."""
        self.registry_chunks += 1
        wait = self.crowd.registry_seconds
        self.clock.at(
            self.clock.now + wait, lambda: self.registry.send(size, priority, 0.0, node.down, arrived)
        )

    def crossed(self, one: SimNode, other: SimNode, size: int) -> None:
        """Bytes go from one node to another."""
        self.crossed_bytes += size if one.zone != other.zone else 0

    def finished(self, node: SimNode) -> None:
        """A node has all it wanted."""
        self.waiting -= 1

    # --- the whole

    def run(self) -> Result:
        """Until every living node has everything, or the end."""
        begun = time.perf_counter()
        self.clock.run(NOW + self.crowd.until_seconds, lambda: self.waiting <= 0)
        alive = [node for node in self.nodes if node.alive]
        done = sorted(node.finished_at - node.started_at for node in alive if node.done)
        urgent = sorted(node.urgent_at - node.started_at for node in alive if node.done)
        uploads = [node.up.sent_bytes for node in self.nodes]
        unique = self.crowd.mib * self.extent_chunks
        return Result(
            nodes=len(self.nodes),
            finished=len(done),
            alive=len(alive),
            copies=round(self.registry_chunks / unique, 4),
            p50_s=_quantile(done, 0.5),
            p99_s=_quantile(done, 0.99),
            in_order_p99_s=_quantile(urgent, 0.99),
            busiest_ratio=round(max(uploads) / max(1.0, sum(uploads) / len(uploads)), 2),
            zone_copies=round(self.crossed_bytes / (unique * self.chunk_bytes), 2),
            direct_chunks=sum(node.direct for node in self.nodes),
            received_twice=sum(node.received_twice for node in self.nodes),
            events=self.clock.events,
            wall_seconds=round(time.perf_counter() - begun, 1),
        )


def _quantile(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else float("inf")


def main(arguments: list[str] | None = None) -> int:
    """Run one crowd and print what came out."""
    parser = argparse.ArgumentParser(prog="sim", description="simulate nodes that start the same image")
    for name, field in Crowd.__dataclass_fields__.items():
        kind = {"int": int, "float": float, "int | None": int, "bool": int}[str(field.type)]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default)
    crowd = Crowd(**vars(parser.parse_args(arguments)))
    gc.disable()  # millions of objects and hardly a cycle: looking for them takes half of the time
    result = Simulation(crowd).run()
    gc.enable()
    print(json.dumps({name: getattr(result, name) for name in Result.__dataclass_fields__}))
    return 0 if result.finished == result.alive else 1


if __name__ == "__main__":
    sys.exit(main())
