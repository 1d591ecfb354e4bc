"""A race without network, disk and real time: peers and a source that do what a test says, all on one mock clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.core.media import Descriptor
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder, Landed, PeerAnswer
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import P2pgzError
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.race import Race
from p2pgz.fetch.trace import Trace
from p2pgz.pool.presence import Presence
from p2pgz.pool.segment import SHARED_DOMAIN
from p2pgz.testing.conformance_pool import Layer

Give = Callable[[Sequence[int]], Awaitable[None]]
Fate = Callable[[Sequence[int], Give], Awaitable[PeerAnswer | None]]
"""chunks asked for, and a way to hand some of them over"""


class Asked(NamedTuple):
    """One request that a peer got."""

    seconds: float
    peer: str
    chunks: list[int]
    priority: int


@dataclass
class FakePeers:
    """A `PeerSource`. `fates`: what a peer does when it is asked, by its name; who has none holds nothing."""

    layer: Layer
    fates: dict[str, Fate] = field(default_factory=dict)
    has: dict[str, set[int]] = field(default_factory=dict)
    """chunks of those that do not have all"""
    asked: list[Asked] = field(default_factory=list)
    followed: list[bytes] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def id(self, name: str) -> PeerId:
        return PeerId.of_ed25519(name.encode().ljust(32))

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        self.followed.append(swarm)

    def unfollow(self, swarm: bytes) -> None:
        self.followed.remove(swarm)

    def swarm_holders(self, swarm: bytes) -> list[Holder]:
        def holding(name: str) -> Callable[[int], bool]:
            chunks = self.has.get(name)
            return lambda n: chunks is None or n in chunks

        return [Holder(self.id(name), holding(name), 0.001 * i, 0.0) for i, name in enumerate(self.fates)]

    def holders(self, swarm: bytes, n: int) -> list[PeerId]:
        return [holder.peer for holder in self.swarm_holders(swarm) if holder.has(n)]

    async def fetch(
        self,
        peer: PeerId,
        swarm: bytes,
        table: SegmentTable,
        chunks: Sequence[int],
        *,
        priority: int,
        landed: Landed,
    ) -> PeerAnswer:
        name = next(name for name in self.fates if self.id(name) == peer)
        assert list(chunks) == sorted(set(chunks))
        self.asked.append(Asked(trio.current_time(), name, list(chunks), priority))

        async def give(some: Sequence[int]) -> None:
            assert set(some) <= set(chunks)
            await landed([(n, self.layer.verified(n)) for n in some])

        try:
            answer = await self.fates[name](chunks, give)
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        return answer or PeerAnswer()

    async def document(self, digest: bytes, *, limit_bytes: int, secret: bytes = b"") -> bytes | None:
        raise AssertionError("not in a race")

    def times(self, name: str) -> list[float]:
        """When a peer was asked, in milliseconds' precision."""
        return [round(asked.seconds, 3) for asked in self.asked if asked.peer == name]


class FakePool:
    """What is landed is present."""

    def __init__(self) -> None:
        self.error: P2pgzError | None = None

    async def add_many(self, segment: Any, chunks: Iterable[tuple[int, VerifiedChunk]]) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        for n, _ in chunks:
            segment.presence.set(n)


@dataclass
class FakeLane:
    """The source's queue: each chunk takes `seconds`, then lands, or fails with `error` as the real lane does it."""

    nursery: trio.Nursery
    seconds: float = math.inf
    error: P2pgzError | None = None
    given: list[tuple[float, list[int]]] = field(default_factory=list)

    def to_source(self, origin: Origin, chunks: Sequence[int]) -> None:
        assert chunks
        self.given.append((round(trio.current_time(), 3), list(chunks)))
        for n in chunks:
            flight = origin.flights[n]
            assert not flight.at_source
            flight.at_source = True
            self.nursery.start_soon(self._bring, origin, flight)

    async def _bring(self, origin: Origin, flight: Flight) -> None:
        if self.seconds == math.inf:
            await trio.sleep_until(flight.deadline)
        else:
            await trio.sleep(self.seconds)
        if origin.flights.get(flight.n) is not flight:
            return
        error = self.error
        if error is None and self.seconds == math.inf:
            error = P2pgzError("the source never answered")
        if error is not None and error.retryable and flight.chased:
            flight.at_source = False
            return
        del origin.flights[flight.n]
        if error is None:
            origin.segment.presence.set(flight.n)
            flight.land()
        else:
            flight.fail(error)


@dataclass
class Bench:
    """A race over one segment."""

    peers: FakePeers
    pool: FakePool
    lane: FakeLane
    race: Race
    origin: Origin
    counters: Counters
    layer: Layer

    def start(
        self,
        chunks: Sequence[int],
        priority: Priority = Priority.BLOCKED_READ,
        *,
        deadline_seconds: float = 60.0,
    ) -> list[Flight]:
        """As the fetcher does: peers first, the source for what no peer has."""
        deadline = trio.current_time() + deadline_seconds
        self.race.start(self.origin, chunks, priority, deadline)
        rest = [n for n in chunks if n not in self.origin.flights]
        for n in rest:
            self.origin.flights[n] = Flight(n, priority, deadline)
        if rest:
            self.lane.to_source(self.origin, rest)
        return [self.origin.flights[n] for n in chunks]

    async def read(self, chunks: Sequence[int], priority: Priority = Priority.BLOCKED_READ) -> float:
        """Wait for chunks; the seconds it took."""
        before = trio.current_time()
        for flight in self.start(chunks, priority):
            await flight.wait()
        assert all(self.origin.segment.presence.has(n) for n in chunks)
        return round(trio.current_time() - before, 3)

    def given(self) -> dict[int, float]:
        """When each chunk was given to the source for the first time."""
        found: dict[int, float] = {}
        for seconds, chunks in self.lane.given:
            for n in chunks:
                found.setdefault(n, seconds)
        return found


@asynccontextmanager
async def racing(chunks: int = 8, *, chunk_bytes: int = 100) -> AsyncIterator[Bench]:
    """Nothing has happened yet; peers get their fates from the test."""
    layer = Layer([[bytes([n]) * chunk_bytes] for n in range(chunks)], name=b"race")
    table = SegmentTable(layer.layout.to_bytes())
    segment = SimpleNamespace(
        id=layer.toc.digest, domain=SHARED_DOMAIN, table=table, presence=Presence.create(chunks)
    )
    descriptor = Descriptor(media_type="", digest=layer.toc.digest, size=1)
    origin = Origin(segment=segment, source=SimpleNamespace(name="source"), descriptor=descriptor)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        peers, pool, counters, lane = FakePeers(layer), FakePool(), Counters(), FakeLane(nursery)
        race = Race(peers, pool, nursery, counters, Trace(), lane.to_source)  # type: ignore[arg-type]
        yield Bench(peers, pool, lane, race, origin, counters, layer)
        nursery.cancel_scope.cancel()


# --- what peers do


def gives(seconds: float = 0.0) -> Fate:
    """All of it at once, after a while."""

    async def fate(chunks: Sequence[int], give: Give) -> None:
        await trio.sleep(seconds)
        await give(chunks)

    return fate


def drips(seconds: float) -> Fate:
    """One chunk after the other, this long apart."""

    async def fate(chunks: Sequence[int], give: Give) -> None:
        for n in chunks:
            await trio.sleep(seconds)
            await give([n])

    return fate


def lacks(missing: set[int], seconds: float = 0.0) -> Fate:
    """All but these."""

    async def fate(chunks: Sequence[int], give: Give) -> PeerAnswer:
        await trio.sleep(seconds)
        if found := [n for n in chunks if n not in missing]:
            await give(found)
        return PeerAnswer(missing=[n for n in chunks if n in missing])

    return fate


def fails(error: P2pgzError, seconds: float = 0.0) -> Fate:
    """Nothing."""

    async def fate(chunks: Sequence[int], give: Give) -> None:
        await trio.sleep(seconds)
        raise error

    return fate


def busy(times: float, retry_seconds: float) -> Fate:
    """Busy so often, then all of it."""
    left = times

    async def fate(chunks: Sequence[int], give: Give) -> PeerAnswer:
        nonlocal left
        await trio.lowlevel.checkpoint()
        left -= 1
        if left >= 0:
            return PeerAnswer(busy=list(chunks), retry_seconds=retry_seconds)
        await give(chunks)
        return PeerAnswer()

    return fate


async def hangs(chunks: Sequence[int], give: Give) -> None:
    """Nothing, for ever."""
    await trio.sleep_forever()
