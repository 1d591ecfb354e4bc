"""How a lease flight goes on: asks, grants, parents, chunks for those who follow. The inner half of `core.leases`.

Every method changes state and puts what follows into `_actions`, or, to this node itself, into `_to_self`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Final

from p2pgz.core.crowdmsg import (
    DEPTH_MAX,
    DEPTH_NONE,
    EXCLUDED_MAX,
    Ask,
    AskFlag,
    CrowdFrame,
    Done,
    Follow,
    Giveup,
    Gone,
    Grant,
    Have,
    Level,
    NotHome,
    Parent,
    Pending,
    Renew,
)
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Action, Direct, Fetch, Forget, Send, Serve
from p2pgz.core.leaseflight import LeaseFlight, State, Waiting
from p2pgz.core.leasehome import LEASE_SECONDS, HomeDesk, ref_of
from p2pgz.core.messages import chunks_of, runs_of

# A parent or home that has said nothing for this long is lost: four PENDINGs. Being slow is no reason.
SILENCE_SECONDS: Final = 1.0
# A peer that sends other things may have forgotten this one
FORGOTTEN_SECONDS: Final = 4.0
# The last home that is left is waited for longer: at a cold start it may be the only one for everybody
LAST_HOME_SECONDS: Final = 4.0
# One that promised and brought nothing is not followed for other extents either
AVOID_SECONDS: Final = 60.0
PAUSE_SECONDS: Final = 1.0
# Parents in vain before another home is asked; two such extents, or two silences, and it comes last for 10 minutes
FAILURES_MAX: Final = 2
HOME_FAULTS_MAX: Final = 2
HOME_IGNORED_SECONDS: Final = 600.0
EMERGENCY_SHARE: Final = 0.02  # of the chunks that were wanted, over all members
FLIGHTS_MAX: Final = 8192
CHILDREN_MAX: Final = 64  # FOLLOWs of one extent; a home gives a parent two
FOLLOW_CHUNKS: Final = 512  # of one FOLLOW, so that they are never more runs than fit
# Requests of leases and of WANT share a connection: these have the highest bit
REQUEST_BIT: Final = 1 << 31


class LeaseSteps:
    """See `core.leases.Leases`, which is the whole."""

    def __init__(
        self,
        own: bytes,
        zone: str,
        electorate: Electorate,
        rng: Random,
        *,
        has: Callable[[bytes, int], bool],
        complete: Callable[[bytes, int], bool],
    ) -> None:
        self.own = own
        self.zone = zone
        self.view = 0
        self.desk = HomeDesk(rng, self._is_home, lambda peer: self._electorate.zone_of(peer))
        self.direct_chunks = 0
        self._electorate = electorate
        self._part = electorate.part(zone, own)
        self._rng = rng
        self._has = has
        self._complete = complete
        self._flights: dict[tuple[bytes, int], LeaseFlight] = {}
        self._asks: dict[int, LeaseFlight] = {}
        self._sending: dict[tuple[bytes, int], Waiting] = {}
        self._requests = 0
        self._heard: dict[bytes, float] = {}
        self._gave: dict[bytes, float] = {}
        self._avoided: dict[bytes, float] = {}
        self._fetched_bytes = 0
        self._home_faults: dict[bytes, tuple[int, float]] = {}
        self._no_grant: dict[bytes, float] = {}
        self._asked_chunks = 0
        self._emergencies = 0
        self._actions: list[Action] = []
        self._to_self: list[CrowdFrame] = []

    # --- frames

    def _receive(self, peer: bytes, frame: CrowdFrame, now: float) -> None:
        match frame:
            case Ask():
                self._send_all(self.desk.ask(peer, frame, self.view, now))
            case Renew() | Done():
                self._send_all(self.desk.renewed(peer, frame, now))
            case Giveup():
                self._send_all(self.desk.given_up(peer, frame, now))
            case Follow():
                self._follow_of(peer, frame, now)
            case Pending(requests):
                for request in requests:
                    flight = self._asks.get(request)
                    if flight is not None and peer in (flight.home, flight.parent):
                        flight.heard_at = now
            case Gone(request):
                flight = self._asks.get(request)
                if flight is not None and flight.parent == peer and flight.state is State.CHILD:
                    self._parent_failed(flight, now)
            case Grant() | Parent() | Have() | NotHome():
                flight = self._asks.get(frame.request)
                if flight is not None and flight.home == peer and flight.request == frame.request:
                    self._answered(flight, frame, now)
            case _:  # about members: not for this machine
                pass

    def _answered(self, flight: LeaseFlight, frame: Grant | Parent | Have | NotHome, now: float) -> None:
        del self._asks[frame.request]
        assert flight.home is not None
        match frame:
            case Grant(_, lease, _):
                self._granted(flight, lease, now)
            case Parent(_, lease, depth, peer) if peer != self.own and peer not in flight.excluded:
                self._take_parent(flight, peer, lease, depth, now)
            case Have(_, peers) if others := [p for p in peers if p != self.own and p not in flight.excluded]:
                self._take_parent(flight, self._rng.choice(others), 0, DEPTH_MAX, now)
            case NotHome():
                flight.tried.add(flight.home)
                self._ask(flight, now)
            case _:  # this node itself, or whom it has asked in vain
                self._home_failed(flight, now)

    def _granted(self, flight: LeaseFlight, lease: int, now: float) -> None:
        flight.tried.clear()
        flight.excluded.clear()
        flight.parked = False
        if flight.level is Level.ZONE:
            flight.zone_lease, flight.level = lease, Level.CLUSTER
            flight.lease, flight.depth, flight.state = 0, DEPTH_NONE, State.IDLE
            self._let_go(flight, flight.strangers())
        else:
            flight.state, flight.lease, flight.depth = State.HOLDER, lease, 0
        self._register(flight, now)
        self._step(flight, now)

    def _take_parent(self, flight: LeaseFlight, peer: bytes, lease: int, depth: int, now: float) -> None:
        flight.state, flight.parent = State.CHILD, peer
        flight.heard_at = flight.touched = now
        flight.move(lease, depth)
        self._let_go(flight, flight.strangers())
        self._step(flight, now)

    def _follow_of(self, peer: bytes, frame: Follow, now: float) -> None:
        """A peer wants chunks as soon as they are here."""
        chunks = set(chunks_of(frame.runs)) or {0}
        waiting = Waiting(frame.level, frame.lease, frame.depth, frame.priority)
        key = (peer, frame.request)
        ready = {n for n in chunks if self._has(frame.swarm, n)}
        if ready:
            self._serve(key, waiting, frame.swarm, frame.extent, ready)
        waiting.chunks = chunks - ready
        if not waiting.chunks:
            return
        flight = self._flights.get((frame.swarm, frame.extent))
        if (
            flight is None
            or len(flight.children) >= CHILDREN_MAX
            or not flight.takes(frame.level, frame.lease, frame.depth)
        ):
            self._send(peer, Gone(frame.request, runs_of(sorted(waiting.chunks))))
            return
        flight.children[key] = waiting
        self._step(flight, now)

    # --- one step

    def _step(self, flight: LeaseFlight, now: float) -> None:
        """Do what the flight's place allows for what is needed and not under way."""
        needed = flight.needed()
        if not needed:
            if not flight.parked and not flight.fetching:
                flight.parked = True
                self._register(flight, now)
            return
        if flight.parked:
            flight.parked = False
            self._register(flight, now)
        match flight.state:
            case State.IDLE:
                self._ask(flight, now)
            case State.CHILD:
                new = sorted(needed.keys() - flight.under_way())
                for at in range(0, len(new), FOLLOW_CHUNKS):
                    self._follow(flight, new[at : at + FOLLOW_CHUNKS], needed)
            case State.HOLDER:
                new = sorted(needed.keys() - flight.fetching)
                if new:
                    flight.fetching.update(new)
                    urgency = min(needed[n] for n in new)
                    self._actions.append(Fetch(flight.swarm, flight.extent, tuple(new), urgency))

    def _follow(self, flight: LeaseFlight, chunks: list[int], needed: dict[int, int]) -> None:
        assert flight.parent is not None
        request = self._next_request(flight)
        flight.followed[request] = set(chunks)
        urgency = min(needed[n] for n in chunks)
        runs = runs_of(chunks) if not flight.is_document else ()
        self._send(
            flight.parent,
            Follow(
                request, urgency, flight.swarm, flight.extent, flight.level, flight.lease, flight.depth, runs
            ),
        )

    def _ask(self, flight: LeaseFlight, now: float) -> None:
        homes = self._electorate.homes(flight.swarm, flight.extent, flight.level, self._part)
        left = [home for home in homes if home not in flight.tried and home not in flight.bad_homes]
        if not left:
            if flight.level is Level.ZONE:
                flight.to_cluster()
                self._ask(flight, now)
            else:
                self._no_home(flight, now)
            return
        flight.home = min(left, key=lambda home: self._ignored(home, now))  # the first of equals
        flight.state = State.ASKING
        flight.asked_at = flight.heard_at = now
        flight.request = self._next_request(flight)
        lease, depth = flight.place()
        avoided = [peer for peer, until in self._avoided.items() if until > now]
        flags = AskFlag.NO_GRANT if self._no_grant.get(flight.swarm, 0.0) > now else AskFlag.NONE
        urgency = min(flight.needed().values(), default=0)
        ask = Ask(
            flight.request, flight.swarm, flight.extent, flight.level, urgency, flags, self.view, lease, depth,
            tuple(flight.excluded), tuple(avoided[-EXCLUDED_MAX:]),
        )  # fmt: skip
        self._send(flight.home, ask)

    def _no_home(self, flight: LeaseFlight, now: float) -> None:
        """Nobody decides: a few urgent chunks from the registry, for the rest another try later."""
        flight.state, flight.home = State.PAUSED, None
        flight.renew_at = now + PAUSE_SECONDS
        flight.bad_homes.clear()
        share = EMERGENCY_SHARE * self._asked_chunks / max(1, len(self._electorate))
        allowed = int(share) - self._emergencies
        urgent = sorted(n for n, (priority, _) in flight.wanted.items() if priority == 0)[: max(0, allowed)]
        if urgent:
            self._emergencies += len(urgent)
            self._go_direct(flight, urgent)

    def _go_direct(self, flight: LeaseFlight, chunks: list[int]) -> None:
        for n in chunks:
            del flight.wanted[n]
        self.direct_chunks += len(chunks)
        self._actions.append(Direct(flight.swarm, flight.extent, tuple(chunks)))

    # --- what goes wrong

    def _parent_failed(self, flight: LeaseFlight, now: float) -> None:
        """Ask the home again, for somebody else; place and children are kept."""
        assert flight.parent is not None
        for request in list(flight.followed):
            self._close(flight, request)
        flight.exclude(flight.parent)
        flight.parent = None
        flight.failures += 1
        if flight.failures >= FAILURES_MAX and flight.home is not None:
            flight.bad_homes.add(flight.home)
            self._home_fault(flight.home, now)
            flight.failures = 0
        flight.state = State.IDLE
        flight.tried.clear()
        self._step(flight, now)

    def _leave_parent(self, flight: LeaseFlight, now: float) -> None:
        """It promises and brings nothing: ask for another one. It may be the only one there is."""
        assert flight.parent is not None
        for request in list(flight.followed):
            self._close(flight, request)
            self._actions.append(Forget(flight.parent, request))
        self._avoided.pop(flight.parent, None)
        self._avoided[flight.parent] = now + AVOID_SECONDS
        flight.parent = None
        flight.state = State.IDLE
        flight.tried.clear()
        self._step(flight, now)

    def _home_failed(self, flight: LeaseFlight, now: float) -> None:
        assert flight.home is not None
        self._asks.pop(flight.request, None)
        flight.tried.add(flight.home)
        self._home_fault(flight.home, now)
        self._ask(flight, now)

    def _home_fault(self, home: bytes, now: float) -> None:
        times, until = self._home_faults.get(home, (0, 0.0))
        times = 0 if until and until <= now else times
        self._home_faults[home] = (times + 1, now + HOME_IGNORED_SECONDS)

    def _ignored(self, home: bytes, now: float) -> bool:
        times, until = self._home_faults.get(home, (0, 0.0))
        return times >= HOME_FAULTS_MAX and until > now

    def _patience(self, flight: LeaseFlight) -> float:
        homes = self._electorate.homes(flight.swarm, flight.extent, flight.level, self._part)
        others = [
            h for h in homes if h != flight.home and h not in flight.tried and h not in flight.bad_homes
        ]
        return SILENCE_SECONDS if others else LAST_HOME_SECONDS

    def _watch_parent(self, flight: LeaseFlight, now: float) -> None:
        if not flight.followed:
            return
        assert flight.parent is not None
        silent = now - flight.heard_at
        away = now - self._heard.get(flight.parent, 0.0) >= SILENCE_SECONDS
        if (silent >= SILENCE_SECONDS and away) or silent >= FORGOTTEN_SECONDS:
            self._parent_failed(flight, now)
        elif max(flight.touched, self._gave.get(flight.parent, 0.0)) + flight.stall_seconds() <= now:
            flight.touched = now
            self._leave_parent(flight, now)

    # --- small ones

    def _register(self, flight: LeaseFlight, now: float, *, only_new: bool = False) -> None:
        """Tell all homes of the leases held, so that the next one can go on when the first is gone."""
        flight.renew_at = now + LEASE_SECONDS / 3
        told = set(flight.registered) if only_new else set()
        flight.registered = ()
        for level, lease in flight.held():
            ref = ref_of((flight.swarm, flight.extent, level), lease)
            frame: Renew | Done = Renew(ref, self._fetched_bytes)
            if flight.parked:
                frame = Done(ref, self._complete(flight.swarm, flight.extent))
            homes = self._electorate.homes(flight.swarm, flight.extent, level, self._part)
            flight.registered += homes
            for home in homes:
                if home not in told:
                    self._send(home, frame)

    def _serve(
        self, key: tuple[bytes, int], waiting: Waiting, swarm: bytes, extent: int, chunks: set[int]
    ) -> None:
        waiting.sending |= chunks
        self._sending[key] = waiting
        self._actions.append(Serve(*key, swarm, extent, tuple(sorted(chunks)), waiting.priority))

    def _let_go(self, flight: LeaseFlight, keys: Iterable[tuple[bytes, int]]) -> None:
        for peer, request in keys:
            child = flight.children.pop((peer, request))
            self._send(peer, Gone(request, runs_of(sorted(child.chunks))))

    def _flight(self, swarm: bytes, extent: int, now: float) -> LeaseFlight:
        key = (swarm, extent)
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= FLIGHTS_MAX:
                self._drop(next((k for k, f in self._flights.items() if f.parked), next(iter(self._flights))))
            flight = self._flights[key] = LeaseFlight(swarm, extent, self._electorate.levels()[0], now)
        flight.touched = now
        return flight

    def _drop(self, key: tuple[bytes, int]) -> None:
        flight = self._flights.pop(key)
        self._let_go(flight, list(flight.children))
        for request in [flight.request, *flight.followed]:
            self._asks.pop(request, None)

    def _next_request(self, flight: LeaseFlight) -> int:
        self._requests = (self._requests + 1) % REQUEST_BIT
        self._asks[REQUEST_BIT | self._requests] = flight
        return REQUEST_BIT | self._requests

    def _close(self, flight: LeaseFlight, request: int) -> None:
        del flight.followed[request]
        self._asks.pop(request, None)

    def _is_home(self, swarm: bytes, extent: int, level: Level) -> bool:
        return self._electorate.is_home(self.own, swarm, extent, level, self._part)

    def _send_all(self, sent: Iterable[tuple[bytes, CrowdFrame]]) -> None:
        for peer, frame in sent:
            self._send(peer, frame)

    def _send(self, peer: bytes, frame: CrowdFrame) -> None:
        if peer == self.own:
            self._to_self.append(frame)
        else:
            self._actions.append(Send(peer, frame))

    def _settle(self, now: float) -> None:
        while self._to_self:
            self._receive(self.own, self._to_self.pop(0), now)
