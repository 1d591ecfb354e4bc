"""Leases, the member's side: how this node gets an extent of an image that many start at the same time.

Called by `fetch` when no connected peer has a chunk, and by the exchange with the frames of others; both do what
`actions()` says. No clock, no socket: time is passed in, and `next_at` says when `tick` has something to do. The node is
asker, parent and home at the same time; what it says to itself does not leave it. docs/reference/wire.md, "Leases".

What `want` asks for ends in one of two ways: the chunks land (the caller says so by `landed`, wherever they came from), or
`Direct` tells the caller to go to the registry without a lease: at the deadline, or from a small budget when no home
answers. Nothing else is promised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from p2pgz.core.crowdmsg import DEPTH_NONE, PENDING_MAX, CrowdFrame, Giveup, GiveupReason, Level, Pending
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Action
from p2pgz.core.leaseflight import LeaseFlight, State
from p2pgz.core.leasehome import PENDING_SECONDS, RECORD_SECONDS, ref_of
from p2pgz.core.leasesteps import LeaseSteps

# Who could not fetch does not ask for the lease of that swarm again for this long
NO_GRANT_SECONDS: Final = 30.0


class Leases(LeaseSteps):
    """`has(swarm, n)`: whether a chunk is here, verified (of a document: n is 0); `complete(swarm, extent)`: all of it.

    `zone` and `electorate` are this node's view of the members, itself among them.
    """

    _tick_at = 0.0

    # --- what the caller says

    def actions(self) -> list[Action]:
        """What is to be done; to be asked for after each call of the others, and done in order."""
        done, self._actions = self._actions, []
        return done

    def next_at(self) -> float | None:
        """When to call `tick`; None while nothing is under way."""
        return self._tick_at if self._flights or self._sending or len(self.desk) else None

    def elect(self, electorate: Electorate, view: int, now: float) -> None:
        """The members have changed."""
        self.view = view
        if electorate.same_electors(self._electorate):
            return
        self._electorate = electorate
        self._part = electorate.part(self.zone, self.own)
        for flight in list(self._flights.values()):
            flight.tried.clear()
            self._register(flight, now, only_new=True)
            if flight.state is State.PAUSED:
                flight.state = State.IDLE
                self._step(flight, now)
        self._settle(now)

    def want(
        self, swarm: bytes, extent: int, chunks: Iterable[int], *, priority: int, deadline: float, now: float
    ) -> None:
        """Get these chunks, which are not here. A document is chunk 0 of EXTENT_DOCUMENT."""
        flight = self._flight(swarm, extent, now)
        for n in chunks:
            before = flight.wanted.get(n)
            if before is None:
                self._asked_chunks += 1
                flight.wanted[n] = (priority, deadline)
            else:
                flight.wanted[n] = (min(priority, before[0]), min(deadline, before[1]))
        self._step(flight, now)
        self._settle(now)

    def unwant(self, swarm: bytes, extent: int, chunks: Iterable[int]) -> None:
        """Nobody here waits for them any more."""
        flight = self._flights.get((swarm, extent))
        if flight is not None:
            for n in chunks:
                flight.wanted.pop(n, None)

    def landed(
        self, swarm: bytes, extent: int, chunks: Collection[int], now: float, *, source: bytes | None = None
    ) -> None:
        """These are here, verified: from a peer, or (None) from the registry, the pool or wherever."""
        if source is not None:
            self._gave[source] = now
        flight = self._flights.get((swarm, extent))
        if flight is None:
            return
        flight.touched = flight.heard_at = now
        flight.failures = 0
        flight.fetching.difference_update(chunks)
        for n in chunks:
            flight.wanted.pop(n, None)
        for key, child in list(flight.children.items()):
            if ready := child.chunks.intersection(chunks):
                child.chunks -= ready
                self._serve(key, child, swarm, extent, ready)
                if not child.chunks:
                    del flight.children[key]
        for request, waiting in list(flight.followed.items()):
            waiting.difference_update(chunks)
            if not waiting:
                self._close(flight, request)
        self._step(flight, now)
        self._settle(now)

    def fetched(self, count: int) -> None:
        """Bytes of any Fetch have come from the registry: this node is not stuck, however slow it is."""
        self._fetched_bytes += count

    def failed(self, swarm: bytes, extent: int, now: float, *, refused: bool = False) -> None:
        """A Fetch has failed for good: somebody else shall try. `refused`: the registry does not let this node have it."""
        flight = self._flights.get((swarm, extent))
        if flight is None or flight.state is not State.HOLDER:
            return
        reason = GiveupReason.REFUSED if refused else GiveupReason.FAILED
        self._no_grant[swarm] = now + NO_GRANT_SECONDS
        self._tell_homes(flight, Giveup(ref_of((swarm, extent, Level.CLUSTER), flight.lease), reason))
        flight.fetching.clear()
        flight.state = State.IDLE
        flight.depth = DEPTH_NONE
        self._step(flight, now)
        self._settle(now)

    def sent(self, peer: bytes, request: int, chunks: Iterable[int]) -> None:
        """Chunks of a Serve are in the hands of the connection, or will not be sent."""
        child = self._sending.get((peer, request))
        if child is not None:
            child.sending.difference_update(chunks)
            if not child.sending:
                del self._sending[peer, request]

    def forgotten(self, peer: bytes, request: int) -> None:
        """A peer does not wait for its FOLLOW any more."""
        self._sending.pop((peer, request), None)
        for flight in self._flights.values():
            flight.children.pop((peer, request), None)

    def heard(self, peer: bytes, now: float) -> None:
        """Bytes have come from that peer: it is not silent."""
        self._heard[peer] = now

    def lost(self, peer: bytes, now: float, *, dead: bool = False) -> None:
        """The connection has ended, or there is none to be had; `dead`: the members say that it is gone."""
        self._heard.pop(peer, None)
        self._gave.pop(peer, None)
        for key in [key for key in self._sending if key[0] == peer]:
            del self._sending[key]
        for flight in list(self._flights.values()):
            for key in [key for key in flight.children if key[0] == peer]:
                del flight.children[key]
            if flight.parent == peer and flight.state is State.CHILD:
                self._parent_failed(flight, now)
            elif flight.home == peer and flight.state is State.ASKING:
                self._home_failed(flight, now)
        self._send_all(self.desk.lost(peer, now, dead=dead))
        self._settle(now)

    def leave(self, now: float) -> None:
        """This node stops: its leases go to others, its children to other parents."""
        for flight in self._flights.values():
            for level, lease in flight.held():
                ref = ref_of((flight.swarm, flight.extent, level), lease)
                self._tell_homes(flight, Giveup(ref, GiveupReason.LEAVING))
            self._let_go(flight, list(flight.children))
        self._flights.clear()
        self._to_self.clear()

    def receive(self, peer: bytes, frame: CrowdFrame, now: float) -> None:
        """A frame about leases has come."""
        self._heard[peer] = now
        self._receive(peer, frame, now)
        self._settle(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if now < self._tick_at:
            return
        self._tick_at = now + PENDING_SECONDS
        self._say_pending()
        self._send_all(self.desk.tick(now))
        for key, flight in list(self._flights.items()):
            overdue = [n for n, (_, end) in flight.wanted.items() if end <= now and n not in flight.fetching]
            if overdue:
                self._go_direct(flight, overdue)
            match flight.state:
                case State.ASKING:
                    if max(flight.asked_at, flight.heard_at) + self._patience(flight) <= now:
                        self._home_failed(flight, now)
                case State.CHILD:
                    self._watch_parent(flight, now)
                case State.PAUSED:
                    if flight.renew_at <= now:
                        flight.tried.clear()
                        flight.state = State.IDLE
                        self._step(flight, now)
            if not flight.parked and flight.renew_at <= now and flight.held():
                self._register(flight, now)
            if not flight.wanted and not flight.children and flight.touched + RECORD_SECONDS <= now:
                self._drop(key)
        self._settle(now)

    def waits_for(self, swarm: bytes, extent: int) -> tuple[bytes, frozenset[int]] | None:
        """Whom this node follows for an extent, and for which chunks."""
        flight = self._flights.get((swarm, extent))
        if flight is None or flight.state is not State.CHILD or flight.parent is None or not flight.followed:
            return None
        return flight.parent, frozenset().union(*flight.followed.values())

    def followers(self, swarm: bytes, extent: int) -> frozenset[bytes]:
        """Who waits for this node to get something of an extent."""
        flight = self._flights.get((swarm, extent))
        return frozenset(peer for peer, _ in flight.children) if flight is not None else frozenset()

    def _tell_homes(self, flight: LeaseFlight, frame: Giveup) -> None:
        for home in self._electorate.homes(flight.swarm, flight.extent, frame.ref.level, self._part):
            self._send(home, frame)

    def _say_pending(self) -> None:
        waiting: dict[bytes, set[int]] = {}
        for flight in self._flights.values():
            for peer, request in flight.children:
                waiting.setdefault(peer, set()).add(request)
        for peer, request in self._sending:
            waiting.setdefault(peer, set()).add(request)
        for peer, requests in waiting.items():
            self._send(peer, Pending(tuple(sorted(requests))[:PENDING_MAX]))
