"""`ChunkFetcher`: makes chunks present. The one door between those who read and those who supply.

Called by the mount's channel, by `cat`/`verify` and by fill and prefetch. It never returns bytes: once a chunk is present
in the pool, readers take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.model import ChunkKind
from p2pgz.core.ports import Holder, PeerSource
from p2pgz.core.schedule import LinkEstimate, Priority
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkMissing, P2pgzError, PoolFull
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.dispatch import Lane
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.leaselayer import LeaseLinks
from p2pgz.fetch.leasing import Leasing
from p2pgz.fetch.limiter import Rates, Throttle
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.race import Race, swarm_of
from p2pgz.fetch.streamed import Streams
from p2pgz.fetch.trace import POOL
from p2pgz.pool.pool import Pool, Segment

log = structlog.get_logger(component="fetch")

# A chunk that came and is evicted, or pushed out of memory, before its reader has it is fetched again
SUPPLY_ATTEMPTS = 100
# Layouts on this host's disk: no rate is for them
LOCAL_SOURCES = ("oci:", "oci-archive:")


class ChunkFetcher:
    """Pool first, then the source of the segment. Safe to call from any number of tasks of the owning nursery's loop."""

    def __init__(
        self,
        pool: Pool,
        nursery: trio.Nursery,
        *,
        connections: int,
        fill_bytes_per_second: int,
        read_deadline_seconds: float,
        registry_bytes_per_second: int = 0,
        peers_bytes_per_second: int = 0,
        peers: PeerSource | None = None,
    ) -> None:
        self._pool = pool
        self._nursery = nursery
        self._connections = connections
        self.rates = Rates(
            fill=Throttle(fill_bytes_per_second),
            registry=Throttle(registry_bytes_per_second),
            peers=Throttle(peers_bytes_per_second),
        )
        self._read_deadline_seconds = read_deadline_seconds
        self._origins: dict[tuple[str, Digest], Origin] = {}
        self._lanes: dict[str, Lane] = {}
        self._links: dict[str, LinkEstimate] = {}
        self.counters = Counters()
        self.trace = self.counters.trace
        self._peers = peers
        self._race: Race | None = None
        if peers is not None:
            self._race = Race(
                peers,
                pool,
                nursery,
                self.counters,
                self.trace,
                self._to_source,
                self.rates,
            )
            nursery.start_soon(self._race.watch, self.origins)
        self.leasing: Leasing | None = None
        chase = self._race.offer_late if self._race is not None else None
        self._streams = Streams(pool, nursery, self.trace, chase)

    def lease(self, links: LeaseLinks, own: bytes, zone: str) -> Leasing:
        """From now on let one of those who want the same ask the source for all; returns what the frames are for."""
        assert self._race is not None, "leases are among peers"
        self.leasing = Leasing(
            links, own, zone, self._race, lambda o, n: self._lane(o).adopt(o, n), self._nursery
        )
        self._nursery.start_soon(self.leasing.run)
        return self.leasing

    def add_origin(self, origin: Origin) -> None:
        """Say where a segment's bytes come from; a later one replaces it (new credentials, another tag)."""
        if self._race is not None:
            self._race.interested(origin)
        known = self._origins.get(_key(origin.segment))
        if known is not None:
            known.source, known.descriptor = origin.source, origin.descriptor
            known.peers |= origin.peers
            return
        origin.link = self._links.setdefault(origin.source.name, origin.link)
        self._origins[_key(origin.segment)] = origin

    def refuse(self, segment: Segment, error: P2pgzError) -> None:
        """Let every further read of a segment fail: its index has turned out to be a lie."""
        origin = self._origins.get(_key(segment))
        if origin is not None:
            origin.refused = error
        for n in range(segment.table.chunk_count):
            segment.presence.clear(n)

    def origin(self, segment: Segment) -> Origin | None:
        """What is known about the source of a segment."""
        return self._origins.get(_key(segment))

    def origins(self) -> Iterable[Origin]:
        """All of them."""
        return self._origins.values()

    def copies(self, segment: Segment) -> Callable[[int], int] | None:
        """How many connected peers have each chunk of a segment, as they say; None when there is nobody to know it from."""
        origin = self._origins.get(_key(segment))
        return None if origin is None or self._race is None else self._race.copies(origin)

    def holders(self, origin: Origin) -> Sequence[Holder]:
        """The peers that would be asked for its chunks now, the quickest first."""
        return self._race.holders(origin) if self._race is not None else ()

    async def ensure(self, segment: Segment, first: int, count: int, priority: Priority) -> None:
        """Return when chunks first .. first+count are present; raises what the last source failed with."""
        await self.ensure_chunks(segment, segment.presence.missing(first, count), priority)
        if priority is Priority.BLOCKED_READ:
            self._read_ahead(segment, first, count)

    async def supply(self, segment: Segment, first: int, count: int, priority: Priority) -> dict[int, bytes]:
        """The same, and the bytes of those chunks that the pool has no room for.

        The others are present when this returns, and may be evicted as soon as the caller awaits anything.
        """
        began = trio.current_time()
        for _ in range(SUPPLY_ATTEMPTS):
            await self.ensure(segment, first, count, priority)
            found = {n: self._pool.unkept(segment, n) for n in segment.presence.missing(first, count)}
            unkept = {n: bytes(chunk.data) for n, chunk in found.items() if chunk is not None}
            if len(unkept) == len(found):
                self.counters.waits[priority].observe(trio.current_time() - began)
                return unkept
        raise PoolFull(
            f"segment {segment.id}: its chunks are pushed out before they are read",
            hint="free some space, or raise pool.quota_bytes",
        )

    async def keep(self, segment: Segment, chunks: Sequence[int]) -> None:
        """Try once more to put on the disk what found no room there; what still finds none stays in memory for a while."""
        unkept = [(n, chunk) for n in chunks if (chunk := self._pool.unkept(segment, n)) is not None]
        await self._pool.add_many(segment, unkept)

    async def ensure_chunks(self, segment: Segment, chunks: Sequence[int], priority: Priority) -> None:
        """The same for any set of chunks; those that the pool has no room for are in its overflow for a while.

        What nobody waits for is refused with PoolFull while it would push out what somebody has read.
        """
        for flight in self.begin(segment, chunks, priority):
            await flight.wait()

    def begin(self, segment: Segment, chunks: Sequence[int], priority: Priority) -> list[Flight]:
        """The same without waiting: the flights of those chunks that are not in the overflow."""
        chunks = [n for n in chunks if self._pool.unkept(segment, n) is None]
        if not chunks:
            return []
        if priority >= Priority.START_UP and not self._pool.has_slack:
            raise PoolFull("the pool has no room for what nobody waits for", hint="raise pool.quota_bytes")
        return self._start(segment, chunks, priority)

    def at_peers(self, origin: Origin) -> Callable[[int], bool]:
        """Whether some connected peer says it has a chunk. May be asked in a thread."""
        swarm = swarm_of(origin)
        holders = self._peers.swarm_holders(swarm) if self._peers is not None and swarm is not None else ()
        return lambda n: any(holder.has(n) for holder in holders)

    def _start(self, segment: Segment, chunks: Sequence[int], priority: Priority) -> list[Flight]:
        origin = self._origins.get(_key(segment))
        if origin is None:
            raise ChunkMissing(
                f"segment {segment.id}: no source is known for it", hint="mount its image by reference"
            )
        if origin.refused is not None:
            raise type(origin.refused)(origin.refused.what, hint=origin.refused.hint)
        self.counters.flights_shared += sum(n in origin.flights for n in chunks)
        deadline = trio.current_time() + self._read_deadline_seconds
        local = [n for n in chunks if n not in origin.flights and self.is_local(origin, n)]
        flights = []
        if local:
            for n in local:
                origin.flights[n] = Flight(n, priority, deadline)
                flights.append(origin.flights[n])
            self._nursery.start_soon(self._from_pool, origin, local, priority, deadline)
        here = set(local)
        rest = [n for n in chunks if n not in here]
        if rest:
            flights += self._from_source(origin, rest, priority, deadline)
        return flights

    def _from_source(
        self, origin: Origin, chunks: Sequence[int], priority: Priority, deadline: float
    ) -> list[Flight]:
        """Peers that have the chunks, else the segment's source."""
        if self._race is not None:
            self._race.start(origin, chunks, priority, deadline)
        if origin.streamed:
            return self._streams.want(origin, chunks, priority, deadline)
        lane = self._lane(origin)
        flights: list[Flight] = []
        if self._leases(origin) and self.leasing is not None:
            mine = [n for n in chunks if n not in origin.flights or not origin.flights[n].at_source]
            flights = self.leasing.want(origin, mine, priority, deadline)
            chunks = [n for n in chunks if n in origin.flights and origin.flights[n].at_source]
        flights += lane.want(origin, chunks, priority, deadline)
        lane.pump()
        return flights

    def _to_source(self, origin: Origin, chunks: Sequence[int]) -> None:
        """What peers could not give."""
        if self._leases(origin) and self.leasing is not None:
            self.leasing.take_over(origin, chunks)
            return
        (self._streams if origin.streamed else self._lane(origin)).adopt(origin, chunks)

    def _leases(self, origin: Origin) -> bool:
        origin.leased = self.leasing is not None and self.leasing.applies(origin)
        return origin.leased

    def _lane(self, origin: Origin) -> Lane:
        lane = self._lanes.get(origin.source.name)
        if lane is None:
            lane = self._lanes[origin.source.name] = Lane(
                self._pool,
                self._nursery,
                self.counters,
                self.trace,
                connections=self._connections,
                rates=self.rates,
                is_remote=not origin.source.name.startswith(LOCAL_SOURCES),
            )
            if self.leasing is not None:
                lane.rescue = self.leasing.rescue
        return lane

    def _read_ahead(self, segment: Segment, first: int, count: int) -> None:
        origin = self._origins.get(_key(segment))
        if origin is None or origin.streamed or not self._pool.keeps:
            return
        table = segment.table

        def contiguous(n: int) -> bool:
            return table.segment_offset[n] == table.segment_offset[n - 1] + table.size[n - 1]

        ahead = origin.readers.ahead(first, count, table.size, contiguous, segment.presence.has)
        missing = segment.presence.missing(first + count, ahead) if ahead else []
        if missing:
            self._start(segment, missing, Priority.READ_AHEAD)

    def is_local(self, origin: Origin, n: int) -> bool:
        """Whether the pool may have the bytes: recorded before this boot, elsewhere in the pool, or zeros."""
        segment = origin.segment
        return (
            segment.table.kind[n] == ChunkKind.ZEROS
            or segment.recorded(n)
            or self._pool.find(segment.domain, segment.table.digest(n)) is not None
        )

    async def _from_pool(
        self, origin: Origin, chunks: list[int], priority: Priority, deadline: float
    ) -> None:
        """Bring chunks to life that the pool has somewhere; what turns out missing or damaged goes to the source."""
        segment = origin.segment
        for n in chunks:
            flight = origin.flights.get(n)
            if flight is None:
                continue
            try:
                found = await self._one_from_pool(segment, n)
            except P2pgzError as error:
                log.warning("pool.unusable", chunk=n, segment=str(segment.id), reason=error.what)
                found = False
            except Exception:  # a bug or a dying disk must not strand the readers of these chunks
                log.exception("pool.bug", chunk=n, segment=str(segment.id))
                found = False
            if origin.flights.get(n) is not flight:
                continue  # a pass over the whole blob brought it meanwhile
            del origin.flights[n]
            if found:
                self.trace.landed(segment, flight, POOL)
                self.counters.pool_chunks += 1
                self.counters.pool_bytes += segment.table.size[n]
                flight.land()
                continue
            try:
                # whoever joined the old flight waits for the new one
                (successor,) = self._from_source(origin, [n], flight.priority, max(deadline, flight.deadline))
            except P2pgzError as error:
                flight.fail(error)
                continue
            self._nursery.start_soon(_follow, flight, successor)

    async def _one_from_pool(self, segment: Segment, n: int) -> bool:
        table = segment.table
        if table.kind[n] == ChunkKind.ZEROS:
            size = table.size[n]
            chunk = await trio.to_thread.run_sync(lambda: verify(table.digest(n), bytes(size), source="TOC"))
            await self._pool.add(segment, n, chunk)
            return True
        if segment.recorded(n) and await self._pool.revive(segment, [n]):
            return True
        return await self._pool.copy_from(segment, n)


def _key(segment: Segment) -> tuple[str, Digest]:
    """One layer may be in several domains: their bytes, sources and peers have nothing to do with each other."""
    return segment.domain, segment.id


async def _follow(flight: Flight, successor: Flight) -> None:
    try:
        await successor.wait()
    except P2pgzError as error:
        flight.fail(error)
    else:
        flight.land()
