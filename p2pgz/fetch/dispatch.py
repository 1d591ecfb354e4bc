"""Spends the request slots of one source on the chunks that are wanted most.

A lane is the queue of one source (a registry's repository): all layers of its images, four priority classes. Deciding is
synchronous (`pump`), the requests are tasks of the fetcher's nursery. Background classes stop reading while somebody
waits for other bytes of the same source; what they already fetch and somebody now waits for goes on.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable

import structlog
import trio

from p2pgz.core.ranges import plan_ranges
from p2pgz.core.schedule import GAP_BYTES, REQUEST_MAX_BYTES, Priority, choose
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import ChunkCorrupt, P2pgzError, SourceUnavailable
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.from_registry import Outcomes, fetch_range
from p2pgz.fetch.limiter import Rates
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.trace import Kind, Source, Trace
from p2pgz.pool.pool import Pool

log = structlog.get_logger(component="fetch")

# A chunk that arrives corrupt is asked for once more on a fresh request: a cut connection or a bad cache between
# explains the first time, nothing innocent the second.
CORRUPT_ATTEMPTS = 2
# Background classes give up after this many broken requests; a reader would ask again
BACKGROUND_ATTEMPTS = 4
BACKOFF_START_SECONDS = 0.1
BACKOFF_MAX_SECONDS = 3.0


class Lane:
    """The queue and the slots of one source."""

    def __init__(
        self,
        pool: Pool,
        nursery: trio.Nursery,
        counters: Counters,
        trace: Trace,
        *,
        connections: int,
        rates: Rates,
        is_remote: bool,
    ) -> None:
        self._pool = pool
        self._nursery = nursery
        self._counters = counters
        self._trace = trace
        self._connections = connections
        self._rates = rates
        self._is_remote = is_remote
        self._queue: list[
            tuple[int, int, int, Origin]
        ] = []  # (class, order of arrival, chunk, origin); stale entries stay
        self._arrival = itertools.count()
        self._running = dict.fromkeys(Priority, 0)
        self._calm = trio.Event()
        self._calm.set()
        self.rescue: Callable[[Origin, Flight, P2pgzError], bool] | None = None
        """takes over a chunk that the source did not give, if it can"""

    def want(
        self, origin: Origin, chunks: Iterable[int], priority: Priority, deadline: float
    ) -> list[Flight]:
        """Queue chunks, or join their flights; the caller pumps afterwards. A more urgent class replaces a lesser one."""
        flights = []
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is None:
                flight = origin.flights[n] = Flight(n, priority, deadline)
                self._enqueue(origin, n, priority)
            elif not (flight.at_source or flight.chased):
                self._enqueue(origin, n, priority)
            else:
                flight.deadline = max(flight.deadline, deadline)
                if priority < flight.priority:
                    flight.priority = priority
                    if n in origin.wanted:
                        self._enqueue(origin, n, priority)
            flights.append(flight)
        return flights

    def adopt(self, origin: Origin, chunks: Iterable[int]) -> None:
        """Take over flights that peers could not end, or not soon enough."""
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is not None and not flight.at_source:
                self._enqueue(origin, n, flight.priority)
        self.pump()

    def _enqueue(self, origin: Origin, n: int, priority: Priority) -> None:
        origin.wanted[n] = priority
        origin.flights[n].at_source = True
        heapq.heappush(self._queue, (priority, next(self._arrival), n, origin))

    def pump(self) -> None:
        """Start as many requests as slots and queue allow."""
        while (head := self._head()) is not None:
            priority, n, origin = head
            if not self._has_slot(priority):
                return
            alone = priority is Priority.BLOCKED_READ and n not in origin.listed and not origin.leased
            window = origin.link.window_bytes() if alone else 0
            table = origin.segment.table
            chosen = choose(
                origin.order,
                table.blob_offset,
                table.blob_end,
                n,
                priority,
                origin.wanted,
                origin.absent,
                window,
            )
            self._take(origin, chosen, priority)
            self._running[priority] += 1
            self._update_calm()
            self._nursery.start_soon(self._run, origin, chosen, priority)

    def _head(self) -> tuple[Priority, int, Origin] | None:
        while self._queue:
            priority, _, n, origin = self._queue[0]
            if origin.wanted.get(n) == priority:
                return Priority(priority), n, origin
            heapq.heappop(self._queue)
        return None

    def _has_slot(self, priority: Priority) -> bool:
        blocked, ahead, start_up, fill = (self._running[p] for p in Priority)
        if priority is Priority.BLOCKED_READ:
            return blocked < self._connections
        if priority is Priority.READ_AHEAD:
            return blocked + ahead < self._connections
        if priority is Priority.START_UP:
            return start_up < max(1, self._connections // 2)
        return fill < 1 and blocked + ahead == 0

    def _take(self, origin: Origin, chosen: list[int], priority: Priority) -> None:
        deadline = trio.current_time()  # nobody waits for neighbours: one attempt
        for n in chosen:
            if origin.wanted.pop(n, None) is None:
                origin.flights[n] = Flight(n, max(priority, Priority.READ_AHEAD), deadline)
                origin.flights[n].at_source = True

    def _update_calm(self) -> None:
        urgent = self._running[Priority.BLOCKED_READ] + self._running[Priority.READ_AHEAD]
        if urgent and self._calm.is_set():
            self._calm = trio.Event()
        elif not urgent:
            self._calm.set()

    async def _run(self, origin: Origin, chosen: list[int], priority: Priority) -> None:
        remaining = set(chosen)

        async def report(outcomes: Outcomes) -> None:
            chunks = [(n, outcome) for n, outcome in outcomes if isinstance(outcome, VerifiedChunk)]
            remaining.difference_update(n for n, _ in outcomes)
            error = await self._keep(origin, chunks)
            for n, outcome in outcomes:
                flight = origin.flights.get(n)
                if flight is None:
                    continue  # a peer was quicker
                if isinstance(outcome, ChunkCorrupt):
                    self._is_corrupt(origin, flight, outcome)
                else:
                    self._end(origin, flight, error)

        def is_wanted(least: Priority) -> bool:
            return any(
                flight.priority <= least for n in remaining if (flight := origin.flights.get(n)) is not None
            )

        async def pace(count: int) -> None:
            if self._is_remote:
                await self._rates.registry.take(count, lambda: is_wanted(Priority.BLOCKED_READ))
            if priority <= Priority.READ_AHEAD:
                return
            if priority is Priority.FILL:
                await self._rates.fill.take(count, lambda: is_wanted(Priority.START_UP))
            while not self._calm.is_set() and all(
                flight.priority >= Priority.START_UP for n in remaining if (flight := origin.flights.get(n))
            ):
                with trio.move_on_after(0.05):  # an upgrade of one of ours does not set the event: look again
                    await self._calm.wait()

        try:
            table = origin.segment.table
            plans = plan_ranges(table, chosen, gap_bytes=GAP_BYTES, max_bytes=2 * REQUEST_MAX_BYTES[priority])
            for plan in plans:
                log.debug(
                    "fetch.request",
                    blob=origin.descriptor.digest.hex[:12],
                    start=plan.start,
                    end=plan.end,
                    priority=priority.name,
                    chunks=len(chosen),
                )
                await fetch_range(origin, plan, report=report, pace=pace, arrivals=self._pool.arrivals)
            self._requeue(origin, remaining, SourceUnavailable(f"{origin.source.name}: chunks were left out"))
        except P2pgzError as error:
            self._requeue(origin, remaining, error)
        except Exception as error:  # a bug here must fail these chunks, not the node
            log.exception("fetch.bug", blob=str(origin.descriptor.digest))
            self._requeue(origin, remaining, P2pgzError(f"internal error: {error!r}"))
        finally:
            self._running[priority] -= 1
            self._update_calm()
            self.pump()

    async def _keep(self, origin: Origin, chunks: list[tuple[int, VerifiedChunk]]) -> P2pgzError | None:
        try:
            await self._pool.add_many(origin.segment, chunks)
        except P2pgzError as error:
            return error
        self._counters.from_registry(chunk for _, chunk in chunks)
        return None

    def _is_corrupt(self, origin: Origin, flight: Flight, error: ChunkCorrupt) -> None:
        self._counters.corrupt_chunks += 1
        flight.corrupt += 1
        log.warning("chunk.corrupt", chunk=flight.n, blob=str(origin.descriptor.digest), reason=error.what)
        if flight.corrupt >= CORRUPT_ATTEMPTS:
            self._end(origin, flight, error)
        else:
            self._again(origin, flight, error, delay_seconds=0.0)

    def _requeue(self, origin: Origin, remaining: Iterable[int], error: P2pgzError) -> None:
        """After a broken request: chunks somebody waits for go back into the queue until their deadline."""
        for n in sorted(remaining):
            flight = origin.flights.get(n)
            if flight is None:
                continue
            flight.attempts += 1
            if self.rescue is not None and self.rescue(origin, flight, error):
                continue
            waiting = flight.priority <= Priority.READ_AHEAD
            expired = (
                trio.current_time() >= flight.deadline if waiting else flight.attempts >= BACKGROUND_ATTEMPTS
            )
            if not error.retryable or expired:
                self._end(origin, flight, error)
                continue
            backoff = min(BACKOFF_MAX_SECONDS, BACKOFF_START_SECONDS * 2 ** (flight.attempts - 1))
            jittered = backoff * random.uniform(0.5, 1.0)  # noqa: S311  # spreads retries, guards nothing
            self._again(origin, flight, error, delay_seconds=jittered)

    def _again(self, origin: Origin, flight: Flight, error: P2pgzError, *, delay_seconds: float) -> None:
        if not delay_seconds:
            self._enqueue(origin, flight.n, flight.priority)
            return

        async def later() -> None:
            await trio.sleep(delay_seconds)
            if origin.flights.get(flight.n) is flight and not flight.done:
                if trio.current_time() >= flight.deadline and flight.priority <= Priority.READ_AHEAD:
                    self._end(origin, flight, error)
                else:
                    self._enqueue(origin, flight.n, flight.priority)
                    self.pump()

        self._nursery.start_soon(later)

    def _end(self, origin: Origin, flight: Flight, error: P2pgzError | None) -> None:
        origin.wanted.pop(flight.n, None)
        if error is not None and flight.chased and error.retryable:
            flight.at_source = False  # a peer may still have it; else it comes back here
            return
        if origin.flights.get(flight.n) is flight:
            del origin.flights[flight.n]
        if error is None:
            self._trace.landed(origin.segment, flight, Source(Kind.REGISTRY, origin.source.name))
            flight.land()
        else:
            flight.fail(error)

    def abandon(self, origin: Origin, error: P2pgzError) -> None:
        """Fail everything that is queued for a segment; what is being received ends by itself."""
        for n in list(origin.wanted):
            self._end(origin, origin.flights[n], error)
