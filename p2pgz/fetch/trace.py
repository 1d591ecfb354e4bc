"""Where each chunk came from and how long it took. In memory, a few bytes a chunk, bounded."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final, NamedTuple

import trio

from p2pgz.core.digest import Digest
from p2pgz.fetch.flights import Flight
from p2pgz.pool.segment import Segment

# 10 bytes a chunk: some 40 MB for the largest hosts, and nothing for most
SEGMENTS_MAX: Final = 1024
SOURCES_MAX: Final = 65_535
UNKNOWN: Final = 0


class Origin(NamedTuple):
    """How one chunk came."""

    source: str
    """`pool`, `peer ID`, the registry's name, or empty: it was here before this node started"""
    seconds: float
    hedges: int


class Trace:
    """The record of this node's run."""

    def __init__(self) -> None:
        self._names = [""]
        self._numbers = {"": UNKNOWN}
        self._segments: OrderedDict[Digest, tuple[array[int], array[float], array[int]]] = OrderedDict()

    def note(self, segment: Segment, flight: Flight, source: str) -> None:
        """A flight has landed."""
        columns = self._segments.get(segment.id)
        if columns is None:
            count = segment.table.chunk_count
            columns = (array("H", bytes(2 * count)), array("f", bytes(4 * count)), array("B", bytes(count)))
            self._segments[segment.id] = columns
            if len(self._segments) > SEGMENTS_MAX:
                self._segments.popitem(last=False)
        sources, seconds, hedges = columns
        sources[flight.n] = self._number(source)
        seconds[flight.n] = trio.current_time() - flight.started
        hedges[flight.n] = min(flight.hedges, 255)

    def _number(self, source: str) -> int:
        number = self._numbers.get(source)
        if number is None:
            if len(self._names) > SOURCES_MAX:
                return UNKNOWN
            number = self._numbers[source] = len(self._names)
            self._names.append(source)
        return number

    def origin(self, segment: Digest, n: int) -> Origin:
        """How a chunk came."""
        columns = self._segments.get(segment)
        if columns is None:
            return Origin("", 0.0, 0)
        sources, seconds, hedges = columns
        return Origin(self._names[sources[n]], seconds[n], hedges[n])
