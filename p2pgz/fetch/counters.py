"""What the sources supplied: one object per node, counted where chunks arrive, read by status, metrics and `fetch.why`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk
from p2pgz.fetch.trace import Kind, Source, Trace
from p2pgz.pool.segment import Segment
from p2pgz.telemetry.histogram import Histogram


class Counters:
    """What the sources supplied since the node started: plain ints, read at scrape time."""

    __slots__ = (
        "corrupt_chunks",
        "flights_shared",
        "peer_bytes",
        "peer_chunks",
        "peer_failures",
        "pool_bytes",
        "pool_chunks",
        "registry_bytes",
        "registry_chunks",
        "trace",
        "waits",
        "wasted_bytes",
    )

    def __init__(self) -> None:
        self.pool_chunks = self.pool_bytes = 0
        self.registry_chunks = self.registry_bytes = 0
        self.corrupt_chunks = 0
        self.peer_chunks = self.peer_bytes = 0
        self.peer_failures = 0
        self.wasted_bytes = 0
        """that came although they were here already: the losers of races"""
        self.flights_shared = 0
        """chunks asked for that were on their way already"""
        self.waits = {priority: Histogram() for priority in Priority}
        """how long those waited who asked for chunks that were not here"""
        self.trace = Trace()
        """and from whom each chunk came"""

    def from_registry(self, chunks: Iterable[VerifiedChunk]) -> None:
        """Count chunks that came from a registry."""
        for chunk in chunks:
            self.registry_chunks += 1
            self.registry_bytes += len(chunk)

    def from_peers(self, chunks: Iterable[VerifiedChunk]) -> None:
        """Count chunks that came from peers."""
        for chunk in chunks:
            self.peer_chunks += 1
            self.peer_bytes += len(chunk)

    def brought_along(
        self, segment: Segment, chunks: Sequence[tuple[int, VerifiedChunk]], registry: str, seconds: float
    ) -> None:
        """Count chunks that came with the answer to a request for something else."""
        self.from_registry(chunk for _, chunk in chunks)
        source = Source(Kind.REGISTRY, registry)
        self.trace.note(segment.domain, segment.table, [n for n, _ in chunks], source, seconds)

    def whole_layer(self, segment: Segment, registry: str, seconds: float) -> None:
        """Count a layer that was read whole from a registry."""
        everything = range(segment.table.chunk_count)
        source = Source(Kind.REGISTRY, registry)
        self.trace.note(segment.domain, segment.table, everything, source, seconds)
        self.registry_chunks += segment.table.chunk_count
        self.registry_bytes += segment.bytes_of(range(segment.table.chunk_count))
