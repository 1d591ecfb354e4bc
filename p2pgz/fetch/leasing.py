"""Leases in the fetch path: of a chunk that several nodes want at the same time one asks the registry, for all.

Owned by `fetch.service`, which hands over what no connected peer has; decides nothing itself (`core.leases` does). What the
machine says is done with what is there: a Fetch goes to the source's lane, a frame to the peer, and chunks of whoever is
followed are taken by the race once its bitmap says that they are there. One task polls while anything is under way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Final

import structlog
import trio

from p2pgz.core.crowdmsg import EXTENT_DOCUMENT, CrowdFrame, Follow, Gone, Member
from p2pgz.core.homes import ELDER_SECONDS, Electorate
from p2pgz.core.leaseactions import Direct, Fetch, Forget, Send, Serve
from p2pgz.core.leases import Leases
from p2pgz.core.messages import chunks_of
from p2pgz.core.schedule import Priority, choose
from p2pgz.errors import AuthRefused, P2pgzError
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.leasedocs import LeasedDocuments
from p2pgz.fetch.leaselayer import LeaseLayer, LeaseLinks, guarded
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.race import Race, swarm_of

log = structlog.get_logger(component="leases")

# Between two looks while something is under way, at least and at most; and while there are only records
WOKEN_SECONDS: Final = 0.005
POLL_SECONDS: Final = 0.05
RECORDS_SECONDS: Final = 0.25
IDLE_SECONDS: Final = 5.0
# How often to look who has become an elder
ELECT_SECONDS: Final = 0.5
# After so long a reader's chunk is asked of the registry whatever others are doing about it; a registry that is slow
# answers within it, and the reader's own deadline is far behind it
DIRECT_SECONDS: Final = 20.0
DIRECT_UNURGENT_SECONDS: Final = 300.0
# What is fetched for others has the deadline of a reader
FOR_OTHERS_SECONDS: Final = 60.0
# Broken requests before somebody else shall try, and how often that is done for one chunk
ATTEMPTS_MAX: Final = 2
RESCUES_MAX: Final = 3


class Leasing:
    """See the module. `to_lane(origin, chunks)` has the source's lane fetch chunks that have flights."""

    def __init__(
        self,
        links: LeaseLinks,
        own: bytes,
        zone: str,
        race: Race,
        to_lane: Callable[[Origin, Sequence[int]], None],
        nursery: trio.Nursery,
        rng: Random | None = None,
    ) -> None:
        self._links = links
        self._race = race
        self._to_lane = to_lane
        self._layers: dict[bytes, LeaseLayer] = {}
        self._serving: dict[tuple[bytes, int], tuple[bytes, set[int]]] = {}
        self._received_bytes = 0
        self._members: dict[bytes, Member] = {}
        self._view = 0
        self._elected_at = self._growing_until = 0.0
        self._woken = trio.Event()
        members = links.lease_members()
        self.machine = Leases(
            own,
            zone,
            Electorate(members, links.now()),
            rng or Random(),  # noqa: S311  # who follows whom: nothing to guess
            has=self._has,
            complete=self._complete,
        )
        self.documents = LeasedDocuments(self.machine, links, nursery, self._act_now)
        self.fetched_chunks = self.followed_chunks = self.direct_chunks = self.rescued_chunks = 0

    # --- for the fetcher

    def has_company(self) -> bool:
        """Whether there are others at all."""
        self._refresh()
        return len(self._members) > 1

    def applies(self, origin: Origin) -> bool:
        """Whether chunks of this layer are leased: it is shared, and there are others."""
        return self.has_company() and not origin.streamed and swarm_of(origin) is not None

    def want(
        self, origin: Origin, chunks: Iterable[int], priority: Priority, deadline: float
    ) -> list[Flight]:
        """Get chunks that no connected peer had a moment ago; those that have flights already are joined."""
        layer = self._layer(origin)
        flights = []
        new: dict[Priority, list[int]] = defaultdict(list)
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is None:
                flight = origin.flights[n] = Flight(n, priority, deadline)
                new[priority].append(n)
                for beside in self._beside(layer, n, priority):
                    origin.flights[beside] = Flight(beside, Priority.READ_AHEAD, trio.current_time())
                    new[Priority.READ_AHEAD].append(beside)
            else:
                flight.deadline = max(flight.deadline, deadline)
                if priority < flight.priority:
                    flight.priority = priority
                    if n in layer.waiting:
                        new[priority].append(n)
            flights.append(flight)
        for urgency, wanted in new.items():
            self._want(layer, wanted, urgency)
        self._act()
        self._wake()
        return flights

    def take_over(self, origin: Origin, chunks: Sequence[int]) -> None:
        """Peers could not give these, or not soon enough."""
        layer = self._layer(origin)
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is not None and not flight.at_source:
                self._want(layer, [n], flight.priority)
        self._act()

    def rescue(self, origin: Origin, flight: Flight, error: P2pgzError) -> bool:
        """The registry does not give a chunk: whether somebody else is asked to try instead of failing its readers."""
        swarm = swarm_of(origin)
        layer = self._layers.get(swarm) if swarm is not None else None
        if layer is None or flight.n not in layer.fetching or not self.applies(origin):
            return False
        if error.retryable and flight.attempts < ATTEMPTS_MAX:
            return False
        layer.fetching.discard(flight.n)
        if flight.rescues >= RESCUES_MAX or flight.deadline <= trio.current_time():
            return False
        flight.rescues += 1
        flight.attempts = 0
        flight.at_source = False
        self.rescued_chunks += 1
        log.info("lease.given_up", chunk=flight.n, segment=str(origin.segment.id), reason=error.what)
        refused = isinstance(error, AuthRefused)
        extent = layer.extents.of[flight.n]
        self.machine.failed(layer.swarm, extent, self._links.now(), refused=refused)
        self._want(layer, [flight.n], flight.priority)
        self._act()
        return True

    def status(self) -> dict[str, Any]:
        """What `p2pgz status` says of leases."""
        return {
            "fetched_chunks": self.fetched_chunks,
            "followed_chunks": self.followed_chunks,
            "direct_chunks": self.direct_chunks,
            "rescued_chunks": self.rescued_chunks,
            "granted": self.machine.desk.grants,
        }

    # --- for the connections

    def on_frame(self, peer: bytes, frame: CrowdFrame) -> None:
        """A frame about leases has come."""
        is_chunks = isinstance(frame, Follow) and frame.extent != EXTENT_DOCUMENT
        if isinstance(frame, Follow) and is_chunks and not self._links.shares(peer, frame.swarm):
            self._links.send(peer, Gone(frame.request, frame.runs))  # the same as for what is not here
            return
        self._refresh()
        self.machine.receive(peer, frame, self._links.now())
        self._act()

    def lost(self, peer: bytes) -> None:
        """The last connection has ended, or there is none to be had."""
        for key in [key for key in self._serving if key[0] == peer]:
            del self._serving[key]
        self.machine.lost(peer, self._links.now())
        self._act()

    def leave(self) -> None:
        """This node stops: its leases go to others."""
        self.machine.leave(self._links.now())
        self._act()

    # --- time

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            with trio.move_on_after(self._pause_seconds()):
                await self._woken.wait()
            await trio.sleep(WOKEN_SECONDS)
            self._woken = trio.Event()
            with guarded():
                self._refresh()
                self._poll()

    def _pause_seconds(self) -> float:
        if self._serving or any(layer.waiting for layer in self._layers.values()):
            return POLL_SECONDS
        return IDLE_SECONDS if self.machine.next_at() is None else RECORDS_SECONDS

    def _refresh(self) -> None:
        """The members may be others, or some may have become elders."""
        now = self._links.now()
        growing = self._elected_at < self._growing_until and now - self._elected_at >= ELECT_SECONDS
        if growing or self._links.lease_view() != self._view:
            self._elect()

    def _elect(self) -> None:
        now, members = self._links.now(), self._links.lease_members()
        gone = self._members.keys() - members.keys() if len(members) > 1 else set()
        self._view, self._members, self._elected_at = self._links.lease_view(), members, now
        youngest = max(member.since_seconds for member in members.values())
        self._growing_until = min(youngest, now) + ELDER_SECONDS + 1  # some are about to become elders
        self.machine.elect(Electorate(members, now), self._view, now)
        for peer in gone:
            self.machine.lost(peer, now, dead=True)
        self._act()

    def _poll(self) -> None:
        now = self._links.now()
        if self.machine.next_at() is None and not self._layers:
            return
        for peer, at in self._links.heard():
            self.machine.heard(peer, at)
        received = sum(layer.origin.received_bytes for layer in self._layers.values())
        if received > self._received_bytes:
            self.machine.fetched(received - self._received_bytes)
        self._received_bytes = received
        for layer in list(self._layers.values()):
            self._settle(layer, now)
            self._chase(layer)
        self._note_sent()
        self.machine.tick(now)
        self._act()
        if self.machine.next_at() is None:
            self._layers = {swarm: layer for swarm, layer in self._layers.items() if layer.waiting}
            self._received_bytes = sum(layer.origin.received_bytes for layer in self._layers.values())

    def _settle(self, layer: LeaseLayer, now: float) -> None:
        """Tell the machine what has come, wherever it came from."""
        presence, flights = layer.origin.segment.presence, layer.origin.flights
        done: dict[bytes, list[int]] = defaultdict(list)
        for n, flight in layer.waiting.items():
            if presence.has(n) or flights.get(n) is not flight:
                done[flight.giver].append(n)
        for giver, chunks in done.items():
            for n in chunks:
                del layer.waiting[n]
                layer.mask &= ~(1 << n)
                layer.fetching.discard(n)
            for extent, some in layer.by_extent(chunks).items():
                self.machine.landed(layer.swarm, extent, some, now, source=giver or None)

    def _chase(self, layer: LeaseLayer) -> None:
        """Have the race ask peers for what they have by now."""
        held = layer.mask & self._links.held(layer.swarm)
        found = []
        while held:
            bit = held & -held
            held ^= bit
            flight = layer.waiting[bit.bit_length() - 1]
            if not flight.chased:
                found.append(flight.n)
        if found:
            self._race.chase(layer.origin, found)

    def _note_sent(self) -> None:
        """Who follows has taken a chunk once it says that it has it."""
        for (peer, request), (swarm, chunks) in list(self._serving.items()):
            sent = [n for n in chunks if self._links.tells(peer, swarm, n) is not False]
            if sent:
                self.machine.sent(peer, request, sent)
                chunks.difference_update(sent)
                if not chunks:
                    del self._serving[peer, request]

    # --- what the machine says

    def _act(self) -> None:
        for action in self.machine.actions():
            match action:
                case Send(peer, frame):
                    if isinstance(frame, Follow) and frame.extent == EXTENT_DOCUMENT:
                        self.documents.follow(peer, frame)
                    elif isinstance(frame, Follow):
                        self._follow(frame)
                    self._links.send(peer, frame)
                case Fetch(swarm, extent, _) | Direct(swarm, extent, _) if extent == EXTENT_DOCUMENT:
                    self.documents.turn(swarm)
                case Serve(peer, request, _, extent, chunks) if extent == EXTENT_DOCUMENT:
                    self.machine.sent(peer, request, chunks)  # whoever follows asks again and again
                case Fetch(swarm, extent, chunks, priority):
                    self._fetch(swarm, extent, chunks, Priority(min(priority, Priority.FILL)))
                case Direct(swarm, _, chunks):
                    self.direct_chunks += len(chunks)
                    if (layer := self._layers.get(swarm)) is not None:
                        self._to_lane(layer.origin, chunks)
                case Serve(peer, request, swarm, _, chunks, _):
                    # its bitmap tells the follower, which asks by WANT: that goes by the rules of all requests
                    known = self._serving.setdefault((peer, request), (swarm, set()))
                    known[1].update(chunks)
                case Forget():
                    pass  # nothing was promised but to be told

    def _follow(self, frame: Follow) -> None:
        layer = self._layers.get(frame.swarm)
        if layer is None:
            return
        for n in chunks_of(frame.runs):
            if n not in layer.waiting:
                self._wait_for(layer, n, Priority(frame.priority))
            self.followed_chunks += 1

    def _fetch(self, swarm: bytes, extent: int, chunks: Sequence[int], priority: Priority) -> None:
        layer = self._layers.get(swarm)
        if layer is None:  # only what was wanted here is ever leased
            self.machine.failed(swarm, extent, self._links.now())
            return
        self.fetched_chunks += len(chunks)
        for n in chunks:
            self._wait_for(layer, n, priority)
        layer.fetching.update(chunks)
        self._to_lane(layer.origin, [n for n in chunks if not layer.origin.segment.presence.has(n)])

    def _wait_for(self, layer: LeaseLayer, n: int, priority: Priority) -> None:
        """For others, if nobody here wants it."""
        origin = layer.origin
        flight = origin.flights.get(n)
        if flight is None:
            flight = Flight(n, priority, trio.current_time() + FOR_OTHERS_SECONDS)
            if not origin.segment.presence.has(n):
                origin.flights[n] = flight
        layer.wait_for(flight)
        flight.on_end = self._wake

    def _want(self, layer: LeaseLayer, chunks: Iterable[int], priority: Priority) -> None:
        now = self._links.now()
        seconds = DIRECT_SECONDS if priority <= Priority.READ_AHEAD else DIRECT_UNURGENT_SECONDS
        for extent, some in layer.by_extent(chunks).items():
            for n in some:
                flight = layer.origin.flights[n]
                layer.wait_for(flight)
                flight.on_end = self._wake
            self.machine.want(layer.swarm, extent, some, priority=priority, deadline=now + seconds, now=now)

    def _beside(self, layer: LeaseLayer, n: int, priority: Priority) -> Sequence[int]:
        """What is fetched along with a blocked read because it costs about nothing: of the same extent only."""
        origin = layer.origin
        if priority is not Priority.BLOCKED_READ or n in origin.listed:
            return ()
        table = origin.segment.table
        near = choose(
            origin.order,
            table.blob_offset,
            table.blob_end,
            n,
            priority,
            {},
            lambda other: not origin.segment.presence.has(other) and other not in origin.flights,
            origin.link.window_bytes(),
        )
        extent = layer.extents.of[n]
        return [other for other in near if other != n and layer.extents.of[other] == extent]

    def _layer(self, origin: Origin) -> LeaseLayer:
        swarm = swarm_of(origin) or b""
        layer = self._layers.get(swarm)
        if layer is None:
            layer = self._layers[swarm] = LeaseLayer(swarm, origin)
            self._received_bytes += origin.received_bytes
        return layer

    def _act_now(self) -> None:
        self._act()
        self._wake()

    def _has(self, swarm: bytes, n: int) -> bool:
        return self.documents.has(swarm) or self._links.has(swarm, n)

    def _complete(self, swarm: bytes, extent: int) -> bool:
        if extent == EXTENT_DOCUMENT:
            return self.documents.has(swarm)
        layer = self._layers.get(swarm)
        return layer is not None and all(
            layer.origin.segment.presence.has(n) for n in layer.extents.chunks(extent)
        )

    def _wake(self) -> None:
        self._woken.set()
