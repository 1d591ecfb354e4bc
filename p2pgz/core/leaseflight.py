"""One extent that this node is getting through a lease: its place in the tree, who waits for what. State and rules only.

Owned by `core.leases`. The rule that makes cycles impossible is `takes`: whoever waits for this node stands deeper in the
same lease, and this node, when it moves, lets go of everyone for whom that is not true any more. A holder of the
cluster's lease waits for nobody, and so may have anyone wait for it.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from p2pgz.core.crowdmsg import DEPTH_MAX, DEPTH_NONE, EXCLUDED_MAX, EXTENT_DOCUMENT, Level

STALL_SECONDS: Final = 6.0
STALL_DEPTH_SECONDS: Final = 1.0


class State(Enum):
    """What is being waited for."""

    IDLE = auto()
    """nothing asked yet"""
    ASKING = auto()
    """a home's answer"""
    CHILD = auto()
    """a parent's chunks"""
    HOLDER = auto()
    """the registry: this node holds the cluster's lease"""
    PAUSED = auto()
    """no home answers: asked again later"""


class Waiting:
    """A FOLLOW of somebody: chunks it waits for, and those that are being sent to it."""

    __slots__ = ("chunks", "depth", "lease", "level", "priority", "sending")

    def __init__(self, level: Level, lease: int, depth: int, priority: int) -> None:
        self.level = level
        self.lease = lease
        self.depth = depth
        self.priority = priority
        self.chunks: set[int] = set()
        self.sending: set[int] = set()


class LeaseFlight:
    """See the module. `children` are keyed by (peer, request); `wanted` is chunk -> (priority, deadline)."""

    __slots__ = (
        "asked_at", "bad_homes", "children", "depth", "excluded", "extent", "failures", "fetching", "followed",
        "heard_at", "home", "lease", "level", "parent", "parked", "registered", "renew_at", "request", "state", "swarm",
        "touched", "tried", "wanted", "zone_lease",
    )  # fmt: skip

    def __init__(self, swarm: bytes, extent: int, level: Level, now: float) -> None:
        self.swarm = swarm
        self.extent = extent
        self.level = level
        self.state = State.IDLE
        self.lease = 0
        self.depth = DEPTH_NONE
        self.zone_lease: int | None = None
        self.home: bytes | None = None
        self.request = 0
        self.parent: bytes | None = None
        self.wanted: dict[int, tuple[int, float]] = {}
        self.children: dict[tuple[bytes, int], Waiting] = {}
        self.fetching: set[int] = set()
        self.followed: dict[int, set[int]] = {}
        self.tried: set[bytes] = set()
        self.bad_homes: set[bytes] = set()
        self.excluded: list[bytes] = []
        self.failures = 0
        self.registered: tuple[bytes, ...] = ()
        self.parked = False
        self.asked_at = self.heard_at = self.touched = now
        self.renew_at = 0.0

    def needed(self) -> dict[int, int]:
        """The chunks that are waited for here or below, each with the most urgent class."""
        found = {n: priority for n, (priority, _) in self.wanted.items()}
        for child in self.children.values():
            for n in child.chunks:
                found[n] = min(found.get(n, child.priority), child.priority)
        return found

    def stall_seconds(self) -> float:
        """How long a parent may promise and bring nothing at all. Deeper ones wait longer: whoever stands right below one
        that only promises should leave it first. Leaving one that is only slow costs a place in its queue, and no copy.
        """
        return STALL_SECONDS + self.depth * STALL_DEPTH_SECONDS

    def takes(self, level: Level, lease: int, depth: int) -> bool:
        """Whether somebody at that place may wait for this node."""
        if self.state is State.HOLDER:
            return True
        if level is Level.ZONE and self.zone_lease is not None:
            # it brings the extent into the zone, and waits on the other level
            return lease == self.zone_lease
        if level is not self.level or self.state is State.IDLE:
            return False
        if self.state is not State.CHILD and not self.lease:
            return True  # the home's answer is on its way, nobody is waited for meanwhile, and `strangers` tells then
        return lease == self.lease and self.depth < depth

    def move(self, lease: int, depth: int) -> None:
        """Take a place on the current level; `strangers` are to be let go then."""
        self.lease, self.depth = lease, depth
        if self.level is Level.ZONE:
            self.zone_lease = None

    def to_cluster(self) -> None:
        """No home of the zone answers: ask those of the cluster, for this node only."""
        self.level = Level.CLUSTER
        self.lease, self.depth = 0, DEPTH_NONE

    def strangers(self) -> list[tuple[bytes, int]]:
        """Who must not wait for this node any more."""
        return [
            key
            for key, child in self.children.items()
            if not self.takes(child.level, child.lease, child.depth)
        ]

    def held(self) -> list[tuple[Level, int]]:
        """The leases that this node holds."""
        held = [(Level.ZONE, self.zone_lease)] if self.zone_lease is not None else []
        return [*held, (Level.CLUSTER, self.lease)] if self.state is State.HOLDER else held

    def under_way(self) -> set[int]:
        """The chunks that the parent was asked for."""
        return set().union(*self.followed.values())

    @property
    def is_document(self) -> bool:
        """Whether this is a manifest, config or TOC rather than chunks of a layer."""
        return self.extent == EXTENT_DOCUMENT

    def exclude(self, peer: bytes) -> None:
        """It was followed in vain; the last few are told to the home."""
        if peer in self.excluded:
            self.excluded.remove(peer)
        self.excluded.append(peer)
        del self.excluded[:-EXCLUDED_MAX]

    def place(self) -> tuple[int, int]:
        """Lease and depth to ask with: where it stood, so that those below it can stay."""
        return (self.lease, self.depth) if self.lease and self.depth <= DEPTH_MAX else (0, DEPTH_NONE)
