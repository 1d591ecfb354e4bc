"""Missing chunks of layers that nobody converted, when no peer gives them: the blob is read once more, whole.

The lane of `ChunkFetcher` for streamed origins. Such blobs have no ranges to ask for, so one pass is made for all who wait,
whichever chunks they wait for; and since it costs the whole layer, peers of whom we have just begun to learn get a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from p2pgz.core.schedule import Priority
from p2pgz.errors import P2pgzError, SourceUnavailable
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.plain import restream
from p2pgz.fetch.trace import Kind, Source, Trace
from p2pgz.pool.pool import Pool

log = structlog.get_logger(component="fetch")

# Peers answer JOIN within a round trip; a stream takes seconds
HOLD_SECONDS: Final = 0.25


class Streams:
    """Passes over blobs, one at a time for each. `chase` offers flights to peers; None: there are none."""

    def __init__(
        self,
        pool: Pool,
        nursery: trio.Nursery,
        trace: Trace,
        chase: Callable[[Origin], None] | None,
    ) -> None:
        self._pool = pool
        self._nursery = nursery
        self._trace = trace
        self._chase = chase
        self._running: set[int] = set()

    def want(
        self, origin: Origin, chunks: Iterable[int], priority: Priority, deadline: float
    ) -> list[Flight]:
        """Join the flights of these chunks, or begin them."""
        flights = []
        new = []
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is None:
                flight = origin.flights[n] = Flight(n, priority, deadline)
                new.append(n)
            else:
                flight.deadline = max(flight.deadline, deadline)
                flight.priority = min(flight.priority, priority)
            flights.append(flight)
        self._begin(origin, new, hold=True)
        return flights

    def adopt(self, origin: Origin, chunks: Sequence[int]) -> None:
        """Take over flights that peers could not end, or not soon enough."""
        self._begin(origin, chunks, hold=False)

    def _begin(self, origin: Origin, chunks: Sequence[int], *, hold: bool) -> None:
        for n in chunks:
            if (flight := origin.flights.get(n)) is not None:
                flight.at_source = True
        if chunks and id(origin) not in self._running:
            self._running.add(id(origin))  # origins live as long as the fetcher
            self._nursery.start_soon(self._run, origin, hold and self._chase is not None)

    async def _run(self, origin: Origin, hold: bool) -> None:
        try:
            if hold and self._chase is not None:
                await trio.sleep(HOLD_SECONDS)
                self._chase(origin)
                for flight in origin.flights.values():
                    flight.at_source &= not flight.chased
            while any(flight.at_source for flight in origin.flights.values()):
                await self._pass(origin)
        finally:
            self._running.discard(id(origin))

    async def _pass(self, origin: Origin) -> None:
        mine = [flight for flight in origin.flights.values() if flight.at_source]
        error: P2pgzError | None = None
        try:
            await restream(self._pool, origin, self._trace)
        except P2pgzError as failure:
            error = failure
        except Exception as failure:  # a bug here must fail these chunks, not the node
            log.exception("fetch.bug", blob=str(origin.descriptor.digest))
            error = P2pgzError(f"internal error: {failure!r}")
        for flight in list(origin.flights.values()):
            # who came late may have missed the chunk: then the next pass brings it
            if flight.at_source and (flight in mine or error or origin.segment.presence.has(flight.n)):
                self._end(origin, flight, error)

    def _end(self, origin: Origin, flight: Flight, error: P2pgzError | None) -> None:
        if origin.segment.presence.has(flight.n):
            error = None
            self._trace.landed(origin.segment, flight, Source(Kind.REGISTRY, origin.source.name))
        elif error is None:
            error = SourceUnavailable(f"{origin.source.name}: the layer has no chunk {flight.n}")
        if error is not None and flight.chased and error.retryable:
            flight.at_source = False  # a peer may still have it; else it comes back here
            return
        if origin.flights.get(flight.n) is flight:
            del origin.flights[flight.n]
        if error is None:
            flight.land()
        else:
            flight.fail(error)
