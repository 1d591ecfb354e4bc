"""Chunks from peers: the quickest holder first, a second one when it is slow, the registry when none makes progress.

Called by `ChunkFetcher` for chunks that are missing here and that some connected peer says it has. Nothing is decided in
here (`core.race`) and nobody is waited for: each batch of chunks is a task of its own (`fetch.chase`), and what no peer
gives goes to the source's lane, where it would have been without peers. Losers are cancelled, which makes the exchange
forget their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder, PeerSource
from p2pgz.core.race import PROGRESS_SECONDS, BusyPeers, HedgeBudget, Latencies, assign
from p2pgz.core.schedule import Priority
from p2pgz.core.sharing import swarm_name
from p2pgz.fetch.chase import Chase
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.limiter import Rates
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.trace import Kind, Source, Trace
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN

log = structlog.get_logger(component="fetch")

# One chase asks for at most this much: what is lost with a peer, and what a hedge asks for again
CHASE_BYTES_MAX: Final = 4 << 20
PEERS_REMEMBERED: Final = 4096
# How often readers that wait for the registry are offered peers that have appeared meanwhile
LATE_PEERS_SECONDS: Final = 0.5
# A swarm that nobody has asked for this long is not followed any more
FOLLOW_SECONDS: Final = 600.0

ToSource = Callable[[Origin, Sequence[int]], None]


class Race:
    """The way to the peers. `to_source(origin, chunks)` takes over flights that they do not end."""

    def __init__(
        self,
        peers: PeerSource,
        pool: Pool,
        nursery: trio.Nursery,
        counters: Counters,
        trace: Trace,
        to_source: ToSource,
        rates: Rates | None = None,
    ) -> None:
        self.peers = peers
        self.pool = pool
        self.counters = counters
        self.to_source = to_source
        self.budget = HedgeBudget()
        self.busy: BusyPeers[PeerId] = BusyPeers()
        self.rates = rates or Rates.unlimited()
        self._nursery = nursery
        self._trace = trace
        self._latencies: dict[PeerId, Latencies] = {}
        self._followed: dict[bytes, float] = {}

    def interested(self, origin: Origin) -> None:
        """Somebody reads this segment: learn who has it."""
        swarm = swarm_of(origin)
        if swarm is None:
            return
        now = trio.current_time()
        if swarm not in self._followed:
            self.peers.follow(swarm, origin.secret)
            for other in [key for key, used in self._followed.items() if now - used > FOLLOW_SECONDS]:
                del self._followed[other]
                self.peers.unfollow(other)
        self._followed[swarm] = now

    def holders(self, origin: Origin) -> Sequence[Holder]:
        """The peers that would be asked for chunks of a segment now, the quickest first."""
        swarm = swarm_of(origin)
        return self.peers.swarm_holders(swarm) if swarm is not None else ()

    def start(self, origin: Origin, chunks: Sequence[int], priority: Priority, deadline: float) -> None:
        """Ask peers for those of the chunks that nobody fetches yet and any of them has: each gets a flight."""
        swarm = swarm_of(origin)
        if swarm is None:
            return
        self.interested(origin)
        holders = self.peers.swarm_holders(swarm)
        if not holders:
            return
        mine = [n for n in chunks if n not in origin.flights and any(holder.has(n) for holder in holders)]
        for n in mine:
            origin.flights[n] = Flight(n, priority, deadline)
        self._chase_all(origin, swarm, mine, holders)

    def copies(self, origin: Origin) -> Callable[[int], int] | None:
        """How many connected peers have each chunk; None for what is not shared. May be asked in a thread."""
        swarm = swarm_of(origin)
        if swarm is None:
            return None
        holders = list(self.peers.swarm_holders(swarm))
        return lambda n: sum(holder.has(n) for holder in holders)

    async def watch(self, origins: Callable[[], Iterable[Origin]]) -> None:
        """For ever: give readers that wait for a source the peers that have come since."""
        while True:
            await trio.sleep(LATE_PEERS_SECONDS)
            long_ago = trio.current_time() - PROGRESS_SECONDS
            for origin in list(origins()):
                late = [f for f in origin.flights.values() if f.started < long_ago]
                self._offer(origin, [f for f in late if f.priority <= Priority.READ_AHEAD])

    def offer_late(self, origin: Origin) -> None:
        """Ask peers that have come since for what nobody asks them for yet."""
        self._offer(origin, list(origin.flights.values()))

    def chase(self, origin: Origin, chunks: Sequence[int]) -> None:
        """Ask peers for chunks that have flights and that nobody is asked for yet."""
        swarm = swarm_of(origin)
        if swarm is not None:
            holders = self.peers.swarm_holders(swarm)
            found = [n for n in chunks if any(holder.has(n) for holder in holders)]
            self._chase_all(origin, swarm, found, holders)

    def _offer(self, origin: Origin, flights: Sequence[Flight]) -> None:
        now = trio.current_time()
        waiting = [
            f.n
            for f in flights
            # what a reader has waited for in vain is about to fail where it is
            if f.at_source and not f.chased and (f.deadline > now or f.priority > Priority.READ_AHEAD)
        ]
        swarm = swarm_of(origin) if waiting else None
        if swarm is None:
            return
        holders = self.peers.swarm_holders(swarm)
        found = [n for n in waiting if any(holder.has(n) for holder in holders)]
        self._chase_all(origin, swarm, found, holders)

    def _chase_all(
        self, origin: Origin, swarm: bytes, chunks: Sequence[int], holders: Sequence[Holder]
    ) -> None:
        sizes = origin.segment.table.size
        now = trio.current_time()
        most_urgent = min((origin.flights[n].priority for n in chunks), default=Priority.FILL)
        plan = assign(
            {n: [holder.peer for holder in holders if holder.has(n)] for n in chunks},
            sizes,
            {h.peer: h.wait_seconds + max(0.0, self.busy.until(h.peer, most_urgent) - now) for h in holders},
            {holder.peer: holder.bytes_per_second for holder in holders},
        )
        for peer, share in plan.items():
            for batch in _batches(share, sizes):
                for n in batch:
                    origin.flights[n].chased = True
                self._nursery.start_soon(self._chase, origin, swarm, batch, peer)

    async def _chase(self, origin: Origin, swarm: bytes, batch: list[int], peer: PeerId) -> None:
        """Ask once the rates allow it; what a reader waits for goes at once, however much is held back."""
        count = sum(origin.segment.table.size[n] for n in batch)

        def is_wanted(least: Priority) -> bool:
            return any(
                flight.priority <= least for n in batch if (flight := origin.flights.get(n)) is not None
            )

        if not is_wanted(Priority.START_UP):
            await self.rates.fill.take(count, lambda: is_wanted(Priority.START_UP))
        await self.rates.peers.take(count, lambda: is_wanted(Priority.BLOCKED_READ))
        await Chase(self, origin, swarm, batch, peer).run()

    def latencies(self, peer: PeerId) -> Latencies:
        """What is known of a peer's speed."""
        found = self._latencies.pop(peer, None) or Latencies()
        self._latencies[peer] = found  # the one used last goes last
        if len(self._latencies) > PEERS_REMEMBERED:
            del self._latencies[next(iter(self._latencies))]
        return found

    def note(self, origin: Origin, flight: Flight, peer: PeerId) -> None:
        """See `Shared`."""
        flight.giver = peer.raw
        self._trace.landed(origin.segment, flight, Source(Kind.PEER, str(peer)))


def swarm_of(origin: Origin) -> bytes | None:
    """The name of the swarm in which a segment's chunks travel; None for what is not shared."""
    segment = origin.segment
    if not origin.peers:
        return None
    if origin.secret:
        return swarm_name(origin.secret, segment.id.raw)
    return segment.id.raw if segment.domain == SHARED_DOMAIN else None


def _batches(chunks: Sequence[int], sizes: Sequence[int] | memoryview) -> list[list[int]]:
    found: list[list[int]] = [[]]
    total = 0
    for n in chunks:
        if found[-1] and total + sizes[n] > CHASE_BYTES_MAX:
            found.append([])
            total = 0
        found[-1].append(n)
        total += sizes[n]
    return found
