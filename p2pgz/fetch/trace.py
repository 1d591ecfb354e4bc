"""Where each chunk came from and how long it took. In memory, a few bytes a chunk, bounded.

Whoever makes a chunk present notes it here: lanes, race, passes over plain layers, copies inside the pool. `fetch.why` reads
it. What is not noted was here before this node started, or has been forgotten.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from enum import StrEnum
from typing import Final, NamedTuple

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentTable
from p2pgz.core.model import ChunkKind
from p2pgz.fetch.flights import Flight
from p2pgz.pool.segment import Segment
from p2pgz.telemetry.histogram import Histogram

# 7 bytes a chunk: some 10 MB for the largest hosts, and nothing for most
SEGMENTS_MAX: Final = 1024
SOURCES_MAX: Final = 65_535
UNKNOWN: Final = 0


class Kind(StrEnum):
    """Kinds of sources, named as in `p2pgz status`."""

    BEFORE = "before"
    """it was here before this node started"""
    POOL = "pool"
    """it was on this host's disk: copied from another layer, or checked again"""
    PEER = "peer"
    REGISTRY = "registry"


class Source(NamedTuple):
    """Who gave a chunk: a peer id, a registry's repository or a local layout; no name for the pool."""

    kind: Kind
    name: str = ""


POOL: Final = Source(Kind.POOL)


class Came(NamedTuple):
    """How one chunk came: from whom, how long after it was first asked for, and how many further peers were asked."""

    source: Source
    seconds: float
    hedges: int


_BEFORE: Final = Came(Source(Kind.BEFORE), 0.0, 0)


class Trace:
    """The record of this node's run."""

    def __init__(self) -> None:
        self.seconds = {kind: Histogram() for kind in (Kind.POOL, Kind.PEER, Kind.REGISTRY)}
        """how long chunks took that somebody asked for"""
        self._sources = [_BEFORE.source]
        self._numbers = {_BEFORE.source: UNKNOWN}
        self._segments: OrderedDict[tuple[str, Digest], tuple[array[int], array[float], bytearray]] = (
            OrderedDict()
        )
        self._bytes: dict[tuple[str, Digest], Counter[Kind]] = {}

    def landed(self, segment: Segment, flight: Flight, source: Source) -> None:
        """A flight has landed."""
        seconds = trio.current_time() - flight.started
        self.seconds[source.kind].observe(seconds)
        self.note(segment.domain, segment.table, [flight.n], source, seconds, flight.hedges)

    def note(
        self,
        domain: str,
        table: SegmentTable,
        chunks: Iterable[int],
        source: Source,
        seconds: float,
        hedges: int = 0,
    ) -> None:
        """Chunks of a segment, which need not be open yet, have come."""
        key = (domain, table.id)
        columns = self._segments.get(key)
        if columns is None:
            count = table.chunk_count
            columns = (array("H", bytes(2 * count)), array("f", bytes(4 * count)), bytearray(count))
            self._segments[key] = columns
            self._bytes[key] = Counter()
            if len(self._segments) > SEGMENTS_MAX:
                del self._bytes[self._segments.popitem(last=False)[0]]
        number = self._number(source)
        sources, times, further = columns
        came, size, kind = self._bytes[key], table.size, table.kind
        for n in chunks:
            if kind[n] != ChunkKind.ZEROS:
                came[source.kind] += size[n]
                if sources[n] != UNKNOWN:
                    came[self._sources[sources[n]].kind] -= size[n]
            sources[n] = number
            times[n] = seconds
            further[n] = min(hedges, 255)

    def _number(self, source: Source) -> int:
        number = self._numbers.get(source)
        if number is None:
            if len(self._sources) > SOURCES_MAX:
                return UNKNOWN
            number = self._numbers[source] = len(self._sources)
            self._sources.append(source)
        return number

    def came(self, segment: Segment, n: int) -> Came:
        """How a chunk came."""
        columns = self._segments.get((segment.domain, segment.id))
        if columns is None:
            return _BEFORE
        sources, times, further = columns
        return Came(self._sources[sources[n]], times[n], further[n])

    def bytes_from(self, segments: Iterable[Segment], present_bytes: int) -> dict[str, int]:
        """How many bytes of these segments each kind of source gave; what nobody is known to have given was here before."""
        found: Counter[Kind] = Counter()
        for segment in segments:
            found.update(self._bytes.get((segment.domain, segment.id), {}))
        given = {kind: found[kind] for kind in (Kind.POOL, Kind.PEER, Kind.REGISTRY)}
        before = max(0, present_bytes - sum(given.values()))
        return {str(kind): count for kind, count in ({Kind.BEFORE: before} | given).items()}
