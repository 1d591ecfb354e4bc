"""Why a file's bytes are where they are: of each chunk, who gave it, or who would be asked for it now.

Called by the node for `p2pgz why`. Fetches nothing. Answers come in batches, so that a file of
many thousand chunks holds up nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

import trio

from p2pgz.core.model import ChunkKind
from p2pgz.core.ports import Holder
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.trace import Kind
from p2pgz.pool.pool import Segment

# 5 us a chunk
BATCH_CHUNKS: Final = 500
# peers named for one chunk: who comes behind these is not asked
PEERS_NAMED: Final = 3


class State(StrEnum):
    """What a chunk is on this host."""

    HERE = "here"
    UNCHECKED = "unchecked"
    """on the disk, and hashed once more before its first use"""
    FETCHING = "fetching"
    MISSING = "missing"
    ZEROS = "zeros"
    """nothing but zeros: nobody needs to be asked"""


class Why:
    """One question; what each segment's peers say is looked up once."""

    def __init__(self, fetcher: ChunkFetcher) -> None:
        self._fetcher = fetcher
        self._prospects: dict[Segment, tuple[Origin | None, list[Holder]]] = {}
        self.summary: dict[str, dict[str, dict[str, int]]] = {}
        """state → source → `chunks` and `bytes`; for what is not here the source that would be asked first"""

    def batches(self, segment: Segment, first: int, count: int) -> Iterator[list[dict[str, Any]]]:
        """Chunks first .. first+count, some at a time."""
        for start in range(first, first + count, BATCH_CHUNKS):
            chunks = range(start, min(start + BATCH_CHUNKS, first + count))
            yield [self._chunk(segment, n) for n in chunks]

    def _chunk(self, segment: Segment, n: int) -> dict[str, Any]:
        table = segment.table
        origin, holders = self._prospects_of(segment)
        state = self._state(segment, n, origin)
        document: dict[str, Any] = {"n": n, "bytes": table.size[n], "state": str(state)}
        if state is State.HERE:
            source, seconds, hedges = self._fetcher.trace.came(segment, n)
            document |= {"source": str(source.kind), "from": source.name}
            if source.kind is not Kind.BEFORE:
                document |= {"seconds": round(seconds, 6), "hedges": hedges}
            self._count(state, source.kind, table.size[n])
            return document
        if state is State.ZEROS or state is State.UNCHECKED:
            self._count(state, Kind.POOL, table.size[n])
            return document
        if state is State.FETCHING and origin is not None:
            flight = origin.flights[n]
            document |= {
                "seconds": round(trio.current_time() - flight.started, 6),
                "hedges": flight.hedges,
                "asked": [
                    *([str(Kind.PEER)] if flight.chased else []),
                    *([str(Kind.REGISTRY)] if flight.at_source else []),
                ],
            }
        peers = [
            {"peer_id": str(holder.peer), "wait_seconds": round(holder.wait_seconds, 6)}
            for holder in holders
            if holder.has(n)
        ][:PEERS_NAMED]
        document["next"] = {"peers": peers, "registry": origin.source.name if origin is not None else ""}
        self._count(state, Kind.PEER if peers else Kind.REGISTRY, table.size[n])
        return document

    def _state(self, segment: Segment, n: int, origin: Origin | None) -> State:
        if segment.presence.has(n):
            return State.HERE
        if origin is not None and n in origin.flights:
            return State.FETCHING
        if segment.table.kind[n] == ChunkKind.ZEROS:
            return State.ZEROS
        return State.UNCHECKED if segment.recorded(n) else State.MISSING

    def _prospects_of(self, segment: Segment) -> tuple[Origin | None, list[Holder]]:
        found = self._prospects.get(segment)
        if found is None:
            origin = self._fetcher.origin(segment)
            holders = list(self._fetcher.holders(origin)) if origin is not None else []
            found = self._prospects[segment] = (origin, holders)
        return found

    def _count(self, state: State, kind: Kind, size: int) -> None:
        counts = self.summary.setdefault(str(state), {}).setdefault(str(kind), {"chunks": 0, "bytes": 0})
        counts["chunks"] += 1
        counts["bytes"] += size


def is_complete(summary: Mapping[str, Any]) -> bool:
    """Whether nobody need be asked for anything any more."""
    return not {State.MISSING, State.FETCHING} & summary.keys()
