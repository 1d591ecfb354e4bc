"""One Range request's worth of chunks: stream, inflate, verify, keep.

Chunks land one by one while the response is still arriving, so that a blocked read waits for its own bytes only. The
heavy half (inflate, sha256, pwrite) runs in a worker thread once a piece is large enough to pay for the hop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.core.members import MemberInflater
from p2pgz.core.ranges import MemberPlan, RangePlan, plan_ranges
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.stall import watched
from p2pgz.pool.pool import Pool, Segment

# A thread hop costs about 60 us, inflating and hashing 64 KiB of compressed bytes about 300 us: below, it does not pay
THREAD_FROM_BYTES = 64 << 10
# Chunks of so many bytes go to the disk before the next member is inflated: 64 KiB from the wire can be as much as 64 MiB
REPORT_BYTES = 4 << 20

Outcomes = list[tuple[int, VerifiedChunk | ChunkCorrupt]]


async def fetch_range(
    origin: Origin,
    plan: RangePlan,
    *,
    report: Callable[[Outcomes], Awaitable[None]],
    pace: Callable[[int], Awaitable[None]],
    arrivals: trio.CapacityLimiter,
) -> None:
    """Run one request and report each chunk of `plan`, verified or corrupt, once, as soon as it is complete.

    Holds a token of `arrivals` while chunks are between the wire and the disk, at most about REPORT_BYTES of them.

    Raises SourceUnavailable (and its kin) when the request itself breaks; chunks not reported by then were not fetched.
    `pace(count)` is awaited with the number of bytes received, before the next piece is read.
    """
    started = trio.current_time()
    first_byte_at = 0.0
    received = 0
    members = _MemberFeed(origin.segment.table, origin.source.name, plan)
    async with watched(
        origin.source.blob(origin.descriptor, plan.start, plan.end), origin.source.name
    ) as pieces:
        origin.requested += 1
        async for piece in pieces:
            if not received:
                first_byte_at = trio.current_time()
            received += len(piece)
            origin.received_bytes += len(piece)
            rest = memoryview(piece)
            while rest:
                async with arrivals:
                    outcomes, rest = await members.feed(rest)
                    if outcomes:
                        await report(outcomes)
            await pace(len(piece))
    if received:
        body_seconds = trio.current_time() - first_byte_at
        origin.link.sample(first_byte_at - started, received, body_seconds)


async def harvest(
    pool: Pool, segment: Segment, data: bytes, start: int, *, source: str
) -> list[tuple[int, VerifiedChunk]]:
    """Keep the chunks whose bytes are all in `data`, which is what stands in the blob from offset `start` on.

    The request for a layer's tail often brings a good part of a small layer, or all of it. Returns what was
    kept; damaged ones are left to be fetched.
    """
    table = segment.table
    inside = [n for n in segment.presence.missing(0, table.chunk_count) if table.blob_offset[n] >= start]
    kept: list[tuple[int, VerifiedChunk]] = []
    for plan in plan_ranges(table, inside, gap_bytes=len(data), max_bytes=len(data)):
        if plan.end > start + len(data):
            continue
        members = _MemberFeed(table, source, plan)
        rest = memoryview(data)[plan.start - start : plan.end - start]
        while rest:
            outcomes, rest = await members.feed(rest)
            chunks = [(n, outcome) for n, outcome in outcomes if isinstance(outcome, VerifiedChunk)]
            await pool.add_many(segment, chunks)
            kept += chunks
    return kept


class _MemberFeed:
    """Cuts the response into members and gives each to its inflater; a broken member does not hurt its neighbours."""

    def __init__(self, table: SegmentTable, name: str, plan: RangePlan) -> None:
        if table.compression == "none":
            raise ValueError("a plain layer has no members: it is streamed")
        self._compression: Literal["gzip", "zstd"] = table.compression
        self._assembly = _Assembly(table, name)
        self._members = iter(plan.members)
        self._at = plan.start
        self._member: MemberPlan | None = None
        self._inflater: MemberInflater | None = None
        self._reported: set[int] = set()
        self._made_bytes = 0
        self._next()

    def _next(self) -> None:
        self._member = next(self._members, None)
        self._inflater = None
        self._reported.clear()
        if self._member is not None:
            wanted = [(inner, size) for _, _, inner, size in self._member.wanted]
            self._inflater = MemberInflater(self._compression, wanted)

    async def feed(self, data: memoryview) -> tuple[Outcomes, memoryview]:
        """What becomes of the next bytes of the response, in a worker thread when they are worth the hop, and those of
        them that are left for the next call."""
        if len(data) >= THREAD_FROM_BYTES:
            return await trio.to_thread.run_sync(self.process, data)
        return self.process(data)

    def process(self, view: memoryview) -> tuple[Outcomes, memoryview]:
        """Inflate and verify: each chunk comes once, verified or with what is wrong with it."""
        outcomes: Outcomes = []
        self._made_bytes = 0
        while view and self._member is not None and self._made_bytes < REPORT_BYTES:
            member = self._member
            skip = member.start - self._at
            if skip > 0:
                view = self._advance(view, skip)
                continue
            room = member.end - self._at
            piece = view[:room]
            view = self._advance(view, room)
            ended = self._at >= member.end
            self._inflate(member, piece, outcomes, ended=ended)
            if ended:
                self._next()
        return outcomes, view if self._member is not None else view[len(view) :]

    def _advance(self, view: memoryview, count: int) -> memoryview:
        self._at += min(count, len(view))
        return view[count:]

    def _inflate(self, member: MemberPlan, piece: memoryview, outcomes: Outcomes, *, ended: bool) -> None:
        inflater = self._inflater
        if inflater is None or inflater.finished:
            return
        try:
            for index, payload in inflater.feed(piece):
                n, piece_no, _, _ = member.wanted[index]
                self._made_bytes += len(payload)
                outcome = self._assembly.add(n, piece_no, payload)
                if outcome is not None:
                    outcomes.append((n, outcome))
                    self._reported.add(n)
            if ended:
                inflater.close()
        except ChunkCorrupt as error:
            self._inflater = None
            outcomes += [(n, error) for n in {wanted.chunk_no for wanted in member.wanted} - self._reported]


class _Assembly:
    """Joins the pieces of chunks that have several (legacy stargz files of many parts) and verifies every chunk."""

    def __init__(self, table: SegmentTable, name: str) -> None:
        self._table = table
        self._name = name
        self._parts: dict[int, dict[int, bytes]] = {}

    def add(self, n: int, piece_no: int, payload: bytes) -> VerifiedChunk | ChunkCorrupt | None:
        """The verified chunk, the error, or None while pieces are missing."""
        count = len(self._table.pieces(n))
        if count > 1:
            parts = self._parts.setdefault(n, {})
            parts[piece_no] = payload
            if len(parts) < count:
                return None
            payload = b"".join(parts[index] for index in range(count))
            del self._parts[n]
        try:
            return verify(self._table.digest(n), payload, source=self._name)
        except ChunkCorrupt as error:
            return error
