"""Chunks in, few Range requests out.

Called by fetch for every request and by `verify`: members that stand near each other are fetched together,
members that are shared by several chunks once. Pure; the numbers come from a segment table. It decides how to
fetch what was chosen; what to choose is `core.schedule`'s business.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from p2pgz.core.layout import SegmentTable


class WantedPiece(NamedTuple):
    """`size` bytes at `inner` of what the member decompresses to are piece `piece_no` of chunk `chunk_no`."""

    chunk_no: int
    piece_no: int
    inner: int
    size: int


class MemberPlan(NamedTuple):
    """The blob bytes `start` .. `end` are one member, and what to cut out of it. `wanted` is in order of
    `inner`."""

    start: int
    end: int
    wanted: list[WantedPiece]


class RangePlan(NamedTuple):
    """One request for the blob bytes `start` .. `end`; its members do not overlap and are in blob order."""

    start: int
    end: int
    members: list[MemberPlan]


class _Run(NamedTuple):
    """A chunk: the blob bytes it needs."""

    start: int
    end: int
    pieces: list[tuple[int, int, WantedPiece]]  # member's start and end


def plan_ranges(
    table: SegmentTable, chunks: Iterable[int], *, gap_bytes: int, max_bytes: int
) -> list[RangePlan]:
    """Requests that bring `chunks`, in blob order; chunks of zeros need none.

    Two members share a request when at most `gap_bytes` of unwanted bytes are between them and the request
    stays within `max_bytes`; only a single chunk may need more. All pieces of a chunk come in one request.
    Chunks whose payloads overlap within a member, which no writer makes, come in requests of their own, so
    that one pass over a member never yields more bytes than the member holds.
    """
    plans: list[RangePlan] = []
    for runs in _without_overlaps([run for n in sorted(set(chunks)) if (run := _run(table, n))]):
        runs.sort()
        start, end, pieces = runs[0]
        pieces = list(pieces)
        for run in runs[1:]:
            near = run.start - end <= gap_bytes and max(end, run.end) - start <= max_bytes
            # a run that begins before the last one ends shares its member
            if near or run.start < end:
                end = max(end, run.end)
                pieces += run.pieces
            else:
                plans.append(RangePlan(start, end, _members(pieces)))
                start, end, pieces = run.start, run.end, list(run.pieces)
        plans.append(RangePlan(start, end, _members(pieces)))
    plans.sort(key=lambda plan: plan.start)
    return plans


def _run(table: SegmentTable, n: int) -> _Run | None:
    pieces = table.pieces(n)
    if not pieces:
        return None
    return _Run(
        min(piece.offset for piece in pieces),
        max(piece.end for piece in pieces),
        [
            (piece.offset, piece.end, WantedPiece(n, number, piece.inner, piece.size))
            for number, piece in enumerate(pieces)
        ],
    )


def _members(pieces: list[tuple[int, int, WantedPiece]]) -> list[MemberPlan]:
    members: dict[int, MemberPlan] = {}
    for start, end, wanted in sorted(pieces, key=lambda piece: (piece[0], piece[2].inner, piece[2].size)):
        if start in members:
            members[start].wanted.append(wanted)
        else:
            members[start] = MemberPlan(start, end, [wanted])
    return list(members.values())


def _without_overlaps(runs: list[_Run]) -> list[list[_Run]]:
    """Split into passes in which the payloads within each member are equal or apart."""
    users = Counter(start for run in runs for start, _, _ in run.pieces)
    if len(users) == sum(users.values()):
        return [runs] if runs else []
    first: list[_Run] = []
    passes = [first]
    shared: dict[int, list[_Run]] = {}
    for run in runs:
        if all(users[start] == 1 for start, _, _ in run.pieces):
            first.append(run)
        elif len(run.pieces) == 1:
            shared.setdefault(run.start, []).append(run)
        else:
            passes.append([run])
    taken = len(passes)
    for group in shared.values():
        _spread(group, passes, taken)
    return [runs for runs in passes if runs]


def _spread(group: list[_Run], passes: list[list[_Run]], taken: int) -> None:
    """Give the chunks of one member to pass 0 and those from `taken` on: colours of an interval graph."""
    group.sort(key=lambda run: (run.pieces[0][2].inner, run.pieces[0][2].size))
    free_from = [(0, 0)]  # (inner offset up to which the pass is taken, number of the pass)
    opened = 0
    previous: tuple[int, int, int] | None = None
    for run in group:
        _, _, inner, size = run.pieces[0][2]
        if previous is not None and previous[:2] == (inner, size):
            passes[previous[2]].append(run)
            continue
        if free_from[0][0] <= inner:
            _, number = heapq.heappop(free_from)
        else:
            number = taken + opened
            opened += 1
            if number == len(passes):
                passes.append([])
        passes[number].append(run)
        heapq.heappush(free_from, (inner + size, number))
        previous = (inner, size, number)
