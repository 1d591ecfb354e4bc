"""How a start-up list becomes few large requests: which of its chunks travel together, and which group goes first.

Called by `fetch.prefetch` for what no peer has. A request costs a round trip, so that holes between listed chunks are filled
where that costs little: the smallest first, all of them together at most a tenth of what the list names. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from p2pgz.core.schedule import BlobOrder

# The bytes that filled holes may cost, as a share of the listed ones (the bar of "at most 1.1 x the bytes")
SPARE_SHARE: Final = 0.1
# One hole: beyond 20 ms at 100 Mbit/s a request of its own is cheaper
HOLE_MAX_BYTES: Final = 256 << 10
# A group that is one request. What is needed first is not to wait long behind what stands beside it.
GROUP_MAX_BYTES: Final = 4 << 20


class Group(NamedTuple):
    """Chunks in the order of the blob, without holes, that are asked for together; `rank` is when the first is needed."""

    rank: int
    chunks: list[int]


class _Run(NamedTuple):
    """Listed neighbours, by their places in blob order: `first` to `last`, and the bytes they span."""

    first: int
    last: int
    start: int
    end: int


def groups(
    order: BlobOrder,
    blob_offset: Sequence[int],
    blob_end: Sequence[int],
    ranks: Mapping[int, int],
    absent: Callable[[int], bool],
) -> list[Group]:
    """The groups for the chunks in `ranks` (chunk → its place in the list), the one that is needed first at the front.

    `absent` says whether a chunk that is not listed may be fetched to fill a hole: it is neither here nor on its way.
    """
    runs = _runs(order, blob_offset, blob_end, ranks)
    closed = _holes_to_close(runs, order, absent)
    found: list[Group] = []
    chunks: list[int] = []
    start = 0
    for index, run in enumerate(runs):
        begin = run.first
        if index and index - 1 in closed:
            begin = runs[index - 1].last + 1
        elif chunks:
            found.append(_group(chunks, ranks))
            chunks = []
        for n in order.chunk_at[begin : run.last + 1]:
            if chunks and blob_end[n] - start > GROUP_MAX_BYTES and blob_offset[n] != blob_offset[chunks[-1]]:
                found.append(_group(chunks, ranks))
                chunks = []
            start = start if chunks else blob_offset[n]
            chunks.append(n)
    if chunks:
        found.append(_group(chunks, ranks))
    return sorted((group for group in found if group.rank >= 0), key=lambda group: group.rank)


def _runs(
    order: BlobOrder, blob_offset: Sequence[int], blob_end: Sequence[int], ranks: Mapping[int, int]
) -> list[_Run]:
    runs: list[_Run] = []
    for place in sorted(order.rank_of[n] for n in ranks):
        n = order.chunk_at[place]
        start, end = blob_offset[n], blob_end[n]
        if runs and (place == runs[-1].last + 1 or start < runs[-1].end):
            last = runs[-1]
            runs[-1] = _Run(last.first, place, last.start, max(last.end, end))
        else:
            runs.append(_Run(place, place, start, end))
    return runs


def _holes_to_close(runs: Sequence[_Run], order: BlobOrder, absent: Callable[[int], bool]) -> set[int]:
    """Indexes of runs whose hole to the next one is filled."""
    spare = SPARE_SHARE * sum(run.end - run.start for run in runs)
    holes = sorted((after.start - before.end, index) for index, (before, after) in enumerate(pairwise(runs)))
    closed: set[int] = set()
    for size, index in holes:
        if size > min(spare, HOLE_MAX_BYTES):
            break
        between = order.chunk_at[runs[index].last + 1 : runs[index + 1].first]
        if all(map(absent, between)):
            spare -= size
            closed.add(index)
    return closed


def _group(chunks: list[int], ranks: Mapping[int, int]) -> Group:
    return Group(min((ranks[n] for n in chunks if n in ranks), default=-1), chunks)
