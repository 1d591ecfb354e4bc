"""Spends a start-up list: asks for its chunks in few large requests, in its order, behind whatever a reader waits for.

Called by `mount.startup`. All of the list is queued at once: the lanes start what comes first, and a reader that meets a
queued chunk finds its neighbours queued beside it, so that its request brings them, and nothing that the list does not name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
import trio

from p2pgz.core.schedule import Priority
from p2pgz.core.startplan import Group, groups
from p2pgz.errors import P2pgzError
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.pool.pool import Segment

log = structlog.get_logger(component="fetch")

# What one image may fetch by its list. A start-up reads some ten MB; models and databases read more.
LIST_MAX_BYTES: Final = 1 << 30
# One request to peers, and how long the event loop is kept at most: 256 chunks are queued in about a millisecond
BATCH_BYTES: Final = 4 << 20
BATCH_CHUNKS: Final = 256

Want = tuple[Segment, int]
"""a segment and a chunk of it"""


class Prefetch:
    """What is fetched for one mount by its start-up lists."""

    def __init__(self, fetcher: ChunkFetcher) -> None:
        self._fetcher = fetcher
        self._listed: dict[Segment, set[int]] = {}
        self._closed = False
        self._left_bytes = LIST_MAX_BYTES
        self.listed_chunks = self.listed_bytes = 0
        """what the lists name of this image"""
        self.chunks = self.bytes = 0
        """what was not here and has come by it"""

    def names(self, segment: Segment, n: int) -> bool:
        """Whether a list names the chunk."""
        return n in self._listed.get(segment, ())

    async def run(self, wanted: Sequence[Want]) -> None:
        """Fetch what of a list is not here; returns when all has come or failed. Failures are left to readers."""
        new = [(segment, n) for segment, n in wanted if not self.names(segment, n)]
        for segment, n in new:
            self._listed.setdefault(segment, set()).add(n)
            self.listed_chunks += 1
            self.listed_bytes += segment.table.size[n]
        started: list[tuple[Segment, Flight]] = []
        try:
            for segment, group in await self._plan(new):
                origin = self._fetcher.origin(segment)
                chunks = [n for n in group.chunks if origin is not None and _is_absent(origin, n)]
                flights = self._fetcher.begin(segment, chunks, Priority.START_UP)
                started += [(segment, flight) for flight in flights]
                await trio.lowlevel.checkpoint()
        except P2pgzError as error:  # no room, or nothing of it may be read any more
            log.info("prefetch.stopped", reason=error.what)
        for segment, flight in started:
            try:
                await flight.wait()
            except P2pgzError as error:
                log.debug("prefetch.failed", chunk=flight.n, segment=str(segment.id), reason=error.what)
                continue
            self.chunks += 1
            self.bytes += segment.table.size[flight.n]

    async def _plan(self, wanted: Sequence[Want]) -> list[tuple[Segment, Group]]:
        """What to ask for, the first needed first."""
        ranks: dict[Segment, dict[int, int]] = defaultdict(dict)
        for rank, (segment, n) in enumerate(wanted):
            ranks[segment][n] = rank
        plan: list[tuple[Segment, Group]] = []
        for segment, places in ranks.items():
            origin = self._fetcher.origin(segment)
            if origin is None or origin.streamed:
                continue  # a streamed layer is here as a whole, or costs a whole one
            near, far = await self._sort(origin, places)
            if not self._closed:
                origin.listed |= near.keys() | far.keys()
            plan += [(segment, group) for group in _batches(segment, near)]
            fills = partial(_fills, origin, self._fetcher.at_peers(origin))
            table = segment.table
            for group in await trio.to_thread.run_sync(
                groups, origin.order, table.blob_offset, table.blob_end, far, fills
            ):
                plan.append((segment, group))  # an await inside a comprehension reads worse
        return sorted(plan, key=lambda item: item[1].rank)

    async def _sort(self, origin: Origin, places: dict[int, int]) -> tuple[dict[int, int], dict[int, int]]:
        """What is missing: what pool or peers give without ranges, and what only the source has."""
        near: dict[int, int] = {}
        far: dict[int, int] = {}
        at_peers = self._fetcher.at_peers(origin)
        for count, (n, rank) in enumerate(places.items()):
            if count % BATCH_CHUNKS == BATCH_CHUNKS - 1:
                await trio.lowlevel.checkpoint()
            if self._affords(origin, n):
                (near if self._fetcher.is_local(origin, n) or at_peers(n) else far)[n] = rank
        return near, far

    def _affords(self, origin: Origin, n: int) -> bool:
        """Whether to fetch a chunk of the list; accounts for it."""
        if not _is_absent(origin, n):
            return False
        self._left_bytes -= origin.segment.table.size[n]
        return self._left_bytes >= 0

    def close(self) -> None:
        """The start-up is over: readers of what has not come take their neighbourhood along again. Forgets the list."""
        self._closed = True
        for segment, chunks in self._listed.items():
            origin = self._fetcher.origin(segment)
            if origin is not None:
                origin.listed -= chunks
        self._listed.clear()


def _is_absent(origin: Origin, n: int) -> bool:
    return not origin.segment.presence.has(n) and n not in origin.flights


def _fills(origin: Origin, at_peers: Callable[[int], bool], n: int) -> bool:
    """Whether a chunk may be fetched only because it stands between two that are needed."""
    return _is_absent(origin, n) and not origin.segment.recorded(n) and not at_peers(n)


def _batches(segment: Segment, ranks: dict[int, int]) -> list[Group]:
    """Chunks that need no ranges, in the order of need."""
    found: list[Group] = []
    size = 0
    for n, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if not found or size + segment.table.size[n] > BATCH_BYTES or len(found[-1].chunks) >= BATCH_CHUNKS:
            found.append(Group(rank, []))
            size = 0
        found[-1].chunks.append(n)
        size += segment.table.size[n]
    for group in found:
        group.chunks.sort()
    return found
