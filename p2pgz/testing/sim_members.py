"""The product's membership (`core.membership`) in the simulation: frames on the simulated network, views to the leases.

Used by `testing.sim` for up to some hundred nodes; with more, every node is told what it would have found out. Signatures
are left out: their cost is small beside everything else, and nobody forges here.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Final

from p2pgz.core.crowdmsg import CrowdFrame, Member
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Send
from p2pgz.core.memberlinks import Link, Unlink
from p2pgz.core.membership import TICK_SECONDS, Action, Membership
from p2pgz.testing.sim_node import SimNode, World

# How often a node looks whether its homes have changed
ELECT_SECONDS: Final = 0.5
# A node that has just started holds its first requests for this long, until it has met somebody
HOLD_SECONDS: Final = 0.2
# A dial to somebody who does not even refuse
DIAL_SECONDS: Final = 3.0


class SimMember:
    """The membership of one simulated node. `known` is what it knows at the start: all others, or itself and a seed."""

    def __init__(
        self, world: World, node: SimNode, own: Member, known: Mapping[bytes, Member], rng: Random
    ) -> None:
        self._world = world
        self._node = node
        self.membership = Membership(
            own,
            sign=lambda _: bytes(64),
            verify=lambda *_: True,
            admits=lambda _: True,
            rng=rng,
            now=world.clock.now,
        )
        for member in known.values():
            if member.peer != own.peer:
                self.membership.table.put(member)
        self._view = 0
        node.on_member_frame = self._receive
        node.on_member_lost = self.lost
        node.held = []
        now = world.clock.now
        world.clock.at(now + HOLD_SECONDS, node.release)
        world.clock.at(now + rng.random() * TICK_SECONDS, self._tick)
        world.clock.at(now + rng.random() * ELECT_SECONDS, self._elect)

    def lost(self, peer: bytes) -> None:
        """A connection has ended."""
        if self._node.alive:
            self._do(self.membership.unlinked(peer, self._world.clock.now))

    def _receive(self, peer: bytes, frame: CrowdFrame) -> None:
        self._do(self.membership.receive(peer, frame, self._world.clock.now))

    def _tick(self) -> None:
        if self._node.alive:
            now = self._world.clock.now
            self._do(self.membership.tick(now))
            self._world.clock.at(now + TICK_SECONDS, self._tick)

    def _elect(self) -> None:
        if self._node.alive:
            self._look()
            self._world.clock.at(self._world.clock.now + ELECT_SECONDS, self._elect)

    def _look(self) -> None:
        """Tell the leases whom this node knows; some who became elders may be new homes."""
        now = self._world.clock.now
        before = self._node.leases.view
        members = self.membership.electable(now)
        view = self.membership.view if len(members) > 1 else 1
        if view != before:
            self._node.leases.elect(Electorate(members, now), view, now)
            self._node.act()

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(peer, frame):
                    self._node.send(peer, frame)
                case Link(member):
                    self._dial(member.peer)
                case Unlink():
                    pass

    def _dial(self, peer: bytes) -> None:
        world, node = self._world, self._node
        other = world.node(peer)
        delay = world.delay(node, other)
        if other.alive and world.reachable(node, other):
            world.clock.at(world.clock.now + 3 * delay, lambda: self._linked(peer))
            return
        wait = DIAL_SECONDS if other.silent or not world.reachable(node, other) else 2 * delay
        world.clock.at(world.clock.now + wait, lambda: self._unreachable(peer))

    def _linked(self, peer: bytes) -> None:
        if self._node.alive:
            self._do(self.membership.linked(peer, self._world.clock.now))
            if self._node.held is not None:
                self._look()
                self._node.release()

    def _unreachable(self, peer: bytes) -> None:
        if self._node.alive:
            self._do(self.membership.unreachable(peer, self._world.clock.now))
