"""Chunks from peers: the quickest holder first, a second one when it is slow, the registry when none makes progress.

Called by `ChunkFetcher` for chunks that are missing here and that some connected peer says it has. Nothing is decided in
here (`core.race`) and nobody is waited for: a chunk that no peer gives goes to the source's lane, where it would have
been without peers. Losers are cancelled, which makes the exchange forget their answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder, PeerSource
from p2pgz.core.race import PROGRESS_SECONDS, HedgeBudget, Latencies, assign
from p2pgz.core.schedule import Priority
from p2pgz.core.sharing import swarm_name
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import P2pgzError, PeerFault
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.trace import Trace
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
    ) -> None:
        self._peers = peers
        self._pool = pool
        self._nursery = nursery
        self._counters = counters
        self._trace = trace
        self._to_source = to_source
        self._latencies: dict[PeerId, Latencies] = {}
        self._budget = HedgeBudget()
        self._followed: dict[bytes, float] = {}

    def interested(self, origin: Origin) -> None:
        """Somebody reads this segment: learn who has it."""
        swarm = swarm_of(origin)
        if swarm is None:
            return
        now = trio.current_time()
        if swarm not in self._followed:
            self._peers.follow(swarm, origin.secret)
            for other in [key for key, used in self._followed.items() if now - used > FOLLOW_SECONDS]:
                del self._followed[other]
                self._peers.unfollow(other)
        self._followed[swarm] = now

    def start(self, origin: Origin, chunks: Sequence[int], priority: Priority, deadline: float) -> None:
        """Ask peers for those of the chunks that nobody fetches yet and any of them has: each gets a flight."""
        swarm = swarm_of(origin)
        if swarm is None:
            return
        self.interested(origin)
        holders = self._peers.swarm_holders(swarm)
        if not holders:
            return
        mine = [n for n in chunks if n not in origin.flights and any(holder.has(n) for holder in holders)]
        for n in mine:
            origin.flights[n] = Flight(n, priority, deadline)
        self._chase_all(origin, mine, priority, holders)

    def copies(self, origin: Origin) -> Callable[[int], int] | None:
        """How many connected peers have each chunk; None for what is not shared. May be asked in a thread."""
        swarm = swarm_of(origin)
        if swarm is None:
            return None
        holders = list(self._peers.swarm_holders(swarm))
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

    def _offer(self, origin: Origin, flights: Sequence[Flight]) -> None:
        waiting = [f.n for f in flights if f.at_source and not f.chased]
        swarm = swarm_of(origin) if waiting else None
        if swarm is None:
            return
        holders = self._peers.swarm_holders(swarm)
        found = [n for n in waiting if any(holder.has(n) for holder in holders)]
        self._chase_all(origin, found, Priority.BLOCKED_READ, holders)

    def _chase_all(
        self, origin: Origin, chunks: Sequence[int], priority: Priority, holders: Sequence[Holder]
    ) -> None:
        sizes = origin.segment.table.size
        plan = assign(
            {n: [holder.peer for holder in holders if holder.has(n)] for n in chunks},
            sizes,
            {holder.peer: holder.wait_seconds for holder in holders},
            {holder.peer: holder.bytes_per_second for holder in holders},
        )
        for peer, share in plan.items():
            for batch in _batches(share, sizes):
                for n in batch:
                    origin.flights[n].chased = True
                self._nursery.start_soon(_Chase(self, origin, batch, priority, peer).run)

    def latencies(self, peer: PeerId) -> Latencies:
        """What is known of a peer's speed."""
        found = self._latencies.pop(peer, None) or Latencies()
        self._latencies[peer] = found  # the one used last goes last
        if len(self._latencies) > PEERS_REMEMBERED:
            del self._latencies[next(iter(self._latencies))]
        return found


class _Chase:
    """Some chunks, asked of one peer, then perhaps of others, until all have landed or are the source's."""

    def __init__(
        self, race: Race, origin: Origin, chunks: list[int], priority: Priority, peer: PeerId
    ) -> None:
        self._race = race
        self._origin = origin
        self._left = dict.fromkeys(chunks)
        self._priority = priority
        self._first = peer
        self._tried: dict[int, set[PeerId]] = defaultdict(set)
        self._given = False
        self._running = 0
        self._progress_at = trio.current_time()
        self._changed = trio.Event()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._ask(nursery, self._first, list(self._left), hedge=False)
                await self._watch(nursery)
                nursery.cancel_scope.cancel()
        except Exception:  # a bug in here must cost the peers their turn, not the readers their chunks
            log.exception("fetch.bug", segment=str(self._origin.segment.id))
        self._release()

    async def _watch(self, nursery: trio.Nursery) -> None:
        """Hedge when the first peer is slow; give up on all when nobody shows progress or nobody is left."""
        hedge_at = trio.current_time() + self._race.latencies(self._first).hedge_after_seconds()
        hedged = False
        while self._pending():
            if not self._running and not self._ask_next(nursery, self._pending()):
                return
            give_at = self._progress_at + PROGRESS_SECONDS
            until = give_at if hedged else min(hedge_at, give_at)
            with trio.move_on_at(until):
                await self._changed.wait()
            self._changed = trio.Event()
            now = trio.current_time()
            if not hedged and now >= hedge_at:
                hedged = True
                waiting = [n for n in self._pending() if self._is_waited_for(n)]
                if waiting and self._progress_at < hedge_at - 1e-9 and self._afford(waiting):
                    self._ask_next(nursery, waiting)
            if now >= self._progress_at + PROGRESS_SECONDS and not self._given:
                self._give()

    def _pending(self) -> list[int]:
        """What has not landed, from whomever."""
        flights = self._origin.flights
        for n in [n for n in self._left if n not in flights]:
            del self._left[n]
        return list(self._left)

    def _is_waited_for(self, n: int) -> bool:
        flight = self._origin.flights.get(n)
        return flight is not None and flight.priority <= Priority.READ_AHEAD

    def _afford(self, chunks: Iterable[int]) -> bool:
        sizes = self._origin.segment.table.size
        return self._race._budget.hedge(sum(sizes[n] for n in chunks))

    def _ask_next(self, nursery: trio.Nursery, chunks: Sequence[int]) -> bool:
        """Ask the best peers not asked yet; false when there is none for any of the chunks."""
        swarm = swarm_of(self._origin)
        assert swarm is not None
        holders = self._race._peers.swarm_holders(swarm)
        plan: dict[PeerId, list[int]] = defaultdict(list)
        for n in chunks:
            for holder in holders:
                if holder.peer not in self._tried[n] and holder.has(n):
                    plan[holder.peer].append(n)
                    break
        for peer, share in plan.items():
            self._ask(nursery, peer, share, hedge=True)
        return bool(plan)

    def _ask(self, nursery: trio.Nursery, peer: PeerId, chunks: list[int], *, hedge: bool) -> None:
        for n in chunks:
            self._tried[n].add(peer)
            if hedge and (flight := self._origin.flights.get(n)) is not None:
                flight.hedges += 1
        if not hedge:
            sizes = self._origin.segment.table.size
            self._race._budget.ask(sum(sizes[n] for n in chunks))
        self._running += 1
        nursery.start_soon(self._from_peer, peer, sorted(chunks))

    async def _from_peer(self, peer: PeerId, chunks: list[int]) -> None:
        origin, race = self._origin, self._race
        swarm = swarm_of(origin)
        assert swarm is not None
        asked_at = trio.current_time()
        first = True

        async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
            nonlocal first
            if first:
                first = False
                race.latencies(peer).sample(trio.current_time() - asked_at)
            await self._keep(peer, good)

        try:
            answer = await race._peers.fetch(
                peer, swarm, origin.segment.table, chunks, priority=self._priority, landed=landed
            )
            if answer.missing or answer.busy:
                log.debug(
                    "peer.left_over", peer=str(peer), missing=len(answer.missing), busy=len(answer.busy)
                )
        except P2pgzError as error:
            race._counters.peer_failures += 1
            log.info("peer.failed", peer=str(peer), chunks=len(chunks), reason=error.what)
            if first and not isinstance(error, PeerFault):
                race.latencies(peer).sample(trio.current_time() - asked_at)
        finally:
            self._running -= 1
            self._changed.set()

    async def _keep(self, peer: PeerId, good: list[tuple[int, VerifiedChunk]]) -> None:
        """Into the pool; whoever else fetches one of these has lost."""
        origin, race = self._origin, self._race
        wanted = [(n, chunk) for n, chunk in good if not origin.segment.presence.has(n)]
        race._counters.wasted_bytes += sum(len(chunk) for _, chunk in good) - sum(
            len(chunk) for _, chunk in wanted
        )
        error: P2pgzError | None = None
        try:
            await race._pool.add_many(origin.segment, wanted)
        except P2pgzError as failure:  # this host's own trouble: nobody else could help
            error = failure
        else:
            race._counters.from_peers(chunk for _, chunk in wanted)
        for n, _ in good:
            flight = origin.flights.pop(n, None)
            origin.wanted.pop(n, None)
            self._left.pop(n, None)
            if flight is None:
                continue
            if error is None:
                race._trace.note(origin.segment, flight, f"peer {peer}")
                flight.land()
            else:
                flight.fail(error)
        self._progress_at = trio.current_time()
        self._changed.set()

    def _give(self) -> None:
        """Let the source's lane try as well."""
        self._given = True
        chunks = [n for n in self._pending() if not self._origin.flights[n].at_source]
        if chunks:
            self._race._to_source(self._origin, chunks)

    def _release(self) -> None:
        """No peer is asked any more: what is left is the source's alone."""
        flights = self._origin.flights
        left = self._pending()
        for n in left:
            flights[n].chased = False
        chunks = [n for n in left if not flights[n].at_source]
        if chunks:
            self._race._to_source(self._origin, chunks)


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
