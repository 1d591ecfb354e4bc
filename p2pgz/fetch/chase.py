"""One chase of the race: some chunks of a segment, until each has landed from a peer or is the source's alone.

Made by `fetch.race`, which holds what all chases share. A chunk is asked of one peer at a time, and of one more if that one
is slow. What a peer does not give is asked of the next holder at once; a peer that is busy is asked again when it said, if
nobody better has come by then; what no peer has goes to the source at once; and when nothing has landed for a second, the
source and a further peer are asked for all of it while the others go on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import structlog
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import PeerAnswer, PeerSource
from p2pgz.core.race import PROGRESS_SECONDS, BusyPeers, HedgeBudget, Latencies
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import P2pgzError, PeerFault
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin
from p2pgz.pool.pool import Pool

log = structlog.get_logger(component="fetch")

# One chase asks a busy peer so often; who is busy for longer may be offered again by `Race.watch`
BUSY_ASKS_MAX: Final = 16
BUSY_MIN_SECONDS: Final = 0.05
BUSY_MAX_SECONDS: Final = 5.0
# while all holders are busy others may come, since the busy ones name some
LOOK_SECONDS: Final = 0.2


class Shared(Protocol):
    """What the chases of a node have in common."""

    peers: PeerSource
    pool: Pool
    counters: Counters
    budget: HedgeBudget
    busy: BusyPeers[PeerId]
    to_source: Callable[[Origin, Sequence[int]], None]

    def latencies(self, peer: PeerId) -> Latencies:
        """What is known of a peer's speed."""
        ...

    def note(self, origin: Origin, flight: Flight, peer: PeerId) -> None:
        """A chunk has come from a peer."""
        ...


class Chase:
    """Chunks to be got from peers, `first` to begin with. `run` returns when peers have done what they can."""

    def __init__(
        self, shared: Shared, origin: Origin, swarm: bytes, chunks: list[int], first: PeerId
    ) -> None:
        self._shared = shared
        self._origin = origin
        self._swarm = swarm
        self._left = dict.fromkeys(chunks)
        self._first = first
        self._tried: dict[int, set[PeerId]] = defaultdict(set)
        self._asking: Counter[int] = Counter()
        self._refusals: Counter[PeerId] = Counter()
        self._landed = False
        self._given = False
        self._give_at = trio.current_time() + PROGRESS_SECONDS
        self._hedge_at = math.inf
        self._changed = trio.Event()

    async def run(self) -> None:
        """Ask until there is nothing left to ask for."""
        try:
            async with trio.open_nursery() as nursery:
                if self._shared.busy.until(self._first, self._priority(self._left)) <= trio.current_time():
                    self._ask(nursery, self._first, list(self._left))
                while self._left:
                    until = self._step(nursery)
                    if self._left:
                        with trio.move_on_at(until):
                            await self._changed.wait()
                        self._changed = trio.Event()
                nursery.cancel_scope.cancel()
        except Exception:  # a bug in here must cost the peers their turn, not the readers their chunks
            log.exception("fetch.bug", segment=str(self._origin.segment.id))
        self._leave(list(self._left))

    # --- deciding: all that is due now is done, and the time returned when something else will be

    def _step(self, nursery: trio.Nursery) -> float:
        now = trio.current_time()
        flights = self._origin.flights
        for n in [n for n in self._left if n not in flights]:  # it has come, from whomever
            del self._left[n]
        # whoever waits has waited long enough: the source says why it cannot be had
        self._leave([n for n in self._left if _waits(flights[n]) and flights[n].deadline <= now])
        until = self._ask_idle(nursery, now)
        if self._hedge_at <= now:
            self._hedge_at = math.inf
            if not self._landed:
                self._ask_second(nursery, now, within_budget=True)
        if self._give_at <= now:
            self._give_at = now + PROGRESS_SECONDS  # what fails there comes back here
            self._given = True
            self._give([n for n in self._left if not flights[n].at_source])
            # who has stopped in the middle has as good as failed
            self._ask_second(nursery, now, within_budget=False)
        if self._given:
            until = min(until, now + LOOK_SECONDS)  # nobody tells us that the source has won
        deadline = min((flights[n].deadline for n in self._left if _waits(flights[n])), default=math.inf)
        return min(until, self._hedge_at, self._give_at, deadline)

    def _ask_idle(self, nursery: trio.Nursery, now: float) -> float:
        """Ask for what nobody is asked for; returns when to look again because holders are busy."""
        idle = [n for n in self._left if not self._asking[n]]
        if not idle:
            return math.inf
        plan, later = self._choose(idle, now)
        for peer, chunks in plan.items():
            self._ask(nursery, peer, chunks)
        asked = {n for chunks in plan.values() for n in chunks}
        self._leave([n for n in idle if n not in asked and n not in later])
        return min(min(later.values()), now + LOOK_SECONDS) if later else math.inf

    def _choose(self, chunks: Iterable[int], now: float) -> tuple[dict[PeerId, list[int]], dict[int, float]]:
        """For each chunk the best holder that was not asked yet; for the others, when a busy one may be asked again."""
        holders = self._shared.peers.swarm_holders(self._swarm)
        flights, busy = self._origin.flights, self._shared.busy
        plan: dict[PeerId, list[int]] = defaultdict(list)
        later: dict[int, float] = {}
        for n in chunks:
            for holder in holders:
                if holder.peer in self._tried[n] or not holder.has(n):
                    continue
                free_at = busy.until(holder.peer, flights[n].priority)
                if free_at <= now:
                    plan[holder.peer].append(n)
                    later.pop(n, None)
                    break
                later[n] = min(free_at, later.get(n, math.inf))
        return plan, later

    def _ask_second(self, nursery: trio.Nursery, now: float, *, within_budget: bool) -> None:
        """Ask further holders for what somebody waits for and who was asked does not bring."""
        flights = self._origin.flights
        plan, _ = self._choose([n for n in self._left if self._asking[n] and _waits(flights[n])], now)
        for peer, chunks in plan.items():
            if not within_budget or self._shared.budget.hedge(self._bytes_of(chunks)):
                for n in chunks:
                    flights[n].hedges += 1
                self._ask(nursery, peer, chunks, hedge=True)

    def _bytes_of(self, chunks: Iterable[int]) -> int:
        sizes = self._origin.segment.table.size
        return sum(sizes[n] for n in chunks)

    def _give(self, chunks: Sequence[int]) -> None:
        """Let the source try as well."""
        if chunks:
            self._shared.to_source(self._origin, chunks)

    def _leave(self, chunks: Sequence[int]) -> None:
        """No peer is asked for these any more: they are the source's alone."""
        flights = self._origin.flights
        for n in chunks:
            self._left.pop(n, None)
            if n in flights:
                flights[n].chased = False
        self._give([n for n in chunks if n in flights and not flights[n].at_source])

    # --- asking

    def _ask(self, nursery: trio.Nursery, peer: PeerId, chunks: list[int], *, hedge: bool = False) -> None:
        for n in chunks:
            self._tried[n].add(peer)
            self._asking[n] += 1
        if not hedge:
            self._shared.budget.ask(self._bytes_of(chunks))
        if self._hedge_at == math.inf and not self._landed and not hedge:
            self._hedge_at = trio.current_time() + self._shared.latencies(peer).hedge_after_seconds()
        nursery.start_soon(self._from_peer, peer, sorted(chunks))

    async def _from_peer(self, peer: PeerId, chunks: list[int]) -> None:
        origin, shared = self._origin, self._shared
        asked_at = trio.current_time()
        first = True

        async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
            nonlocal first
            if first:
                first = False
                shared.latencies(peer).sample(trio.current_time() - asked_at)
            await self._keep(peer, good)

        priority = self._priority(chunks)
        try:
            answer = await shared.peers.fetch(
                peer, self._swarm, origin.segment.table, chunks, priority=priority, landed=landed
            )
            if answer.busy:
                self._was_busy(peer, priority, answer)
            if answer.missing or answer.busy:
                log.debug(
                    "peer.left_over", peer=str(peer), missing=len(answer.missing), busy=len(answer.busy)
                )
        except P2pgzError as error:
            shared.counters.peer_failures += 1
            log.info("peer.failed", peer=str(peer), chunks=len(chunks), reason=error.what)
            if first and not isinstance(error, PeerFault):
                shared.latencies(peer).sample(trio.current_time() - asked_at)
        finally:
            self._asking.subtract(chunks)
            self._changed.set()

    def _priority(self, chunks: Iterable[int]) -> Priority:
        """Of the most urgent one."""
        flights = self._origin.flights
        return min((f.priority for n in chunks if (f := flights.get(n)) is not None), default=Priority.FILL)

    def _was_busy(self, peer: PeerId, priority: Priority, answer: PeerAnswer) -> None:
        seconds = min(BUSY_MAX_SECONDS, max(BUSY_MIN_SECONDS, answer.retry_seconds))
        self._shared.busy.note(peer, priority, trio.current_time() + seconds)
        self._refusals[peer] += 1
        if self._refusals[peer] < BUSY_ASKS_MAX:
            for n in answer.busy:
                self._tried[n].discard(peer)

    async def _keep(self, peer: PeerId, good: list[tuple[int, VerifiedChunk]]) -> None:
        """Into the pool; whoever else fetches one of these has lost."""
        origin, shared = self._origin, self._shared
        new = {n: chunk for n, chunk in good if not origin.segment.presence.has(n)}
        error: P2pgzError | None = None
        try:
            await shared.pool.add_many(origin.segment, list(new.items()))
        except P2pgzError as failure:  # this host's own trouble: nobody else could help
            error = failure
        for n, chunk in good:
            flight = origin.flights.pop(n, None)
            origin.wanted.pop(n, None)
            self._left.pop(n, None)
            if flight is None or n not in new:  # somebody else was quicker, perhaps while it was written
                shared.counters.wasted_bytes += len(chunk)
            elif error is None:
                shared.counters.from_peers([chunk])
            if flight is None:
                continue
            if error is None:
                shared.note(origin, flight, peer)
                flight.land()
            else:
                flight.fail(error)
        self._landed = True
        self._give_at = trio.current_time() + PROGRESS_SECONDS
        self._changed.set()


def _waits(flight: Flight) -> bool:
    """Whether somebody waits for it."""
    return flight.priority <= Priority.READ_AHEAD
