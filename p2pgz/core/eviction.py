"""Which chunks go when the pool has to shrink: plain decisions about what the caller tells.

Called by `pool.evictor`, in a worker thread, with numbers that may be a moment old: the caller looks again at whatever may
not be evicted before it does it. Heat is per segment first, since reads from the page cache never reach us: what is not
mounted goes before what is, the longest unmounted first. Inside a segment the chunks that came longest ago go first.
Pinned segments never go; chunks that nobody else is known to have go after all others. Design, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

# Evict down to this much below the limit at a time: eviction in sips would pay a full sync for each
BAND_SHARE: Final = 0.10
BAND_MAX_BYTES: Final = 1 << 30
# Start before the limit is reached, so that readers do not wait for it
EARLY_SHARE: Final = 0.05
EARLY_MAX_BYTES: Final = 256 << 20


class SegmentState(NamedTuple):
    """What counts of a segment."""

    key: int
    held_bytes: int
    mounted: bool
    last_mount: float
    """seconds since 1970; 0: never"""
    mounts: int
    """how often it was mounted"""
    pinned: bool
    native: bool
    """a kernel may read the file without asking: all of it goes, or nothing, and only while no mount has it"""


class ChunkState(NamedTuple):
    """What counts of a chunk that is here."""

    n: int
    size: int
    used: int
    """when it came or was asked for, on any clock; larger is later"""
    copies: int | None
    """how many others have it; None: unknown, 0: ours is the last that anybody knows of"""


class Step(NamedTuple):
    """Chunks of one segment that go together; all of it when `whole`."""

    key: int
    chunks: tuple[int, ...]
    freed_bytes: int
    whole: bool


def excess_bytes(used: int, quota: int, free: int, floor: int, *, started: bool) -> int:
    """How much has to go; 0 for nothing. `quota` and `floor` 0: no such limit.

    Nothing is to be done before a limit is near; once `started`, the answer is how far the low-water mark still is.
    """
    need = 0
    if quota:
        high = quota - min(int(quota * EARLY_SHARE), EARLY_MAX_BYTES)
        low = high - min(int(quota * BAND_SHARE), BAND_MAX_BYTES)
        if used > (low if started else high):
            need = used - low
    if floor:
        band = min(int(floor * BAND_SHARE), BAND_MAX_BYTES)
        if free < (floor + band if started else floor):
            need = max(need, floor + band - free)
    return need


def is_evictable(state: SegmentState) -> bool:
    """Whether anything of a segment may go at all."""
    return not state.pinned and state.held_bytes > 0 and not (state.native and state.mounted)


def coldest_first(states: Iterable[SegmentState]) -> list[SegmentState]:
    """The segments that may lose something, in the order in which they do."""
    return sorted(
        filter(is_evictable, states),
        key=lambda state: (state.mounted, state.last_mount, state.mounts, state.key),
    )


def plan(
    states: Iterable[SegmentState],
    chunks_of: Callable[[int], Sequence[ChunkState]],
    need_bytes: int,
    *,
    max_chunks: int,
    used_before: int | None = None,
) -> list[Step]:
    """The next steps, of at most `max_chunks` chunks together, that free `need_bytes` or as much of it as can be.

    Chunks used at or after `used_before` stay: somebody is just about to read them. A whole segment is never cut to
    the limit, since half of it cannot go.
    """
    ordered = coldest_first(states)
    steps: list[Step] = []
    left_bytes, left_chunks = need_bytes, max_chunks
    postponed: list[tuple[SegmentState, list[ChunkState]]] = []
    for last_copies in (False, True):
        work: Iterable[tuple[SegmentState, Sequence[ChunkState]]] = (
            postponed if last_copies else ((state, chunks_of(state.key)) for state in ordered)
        )
        for state, chunks in work:
            if left_bytes <= 0 or left_chunks <= 0:
                return steps
            if state.native:
                if not last_copies and any(chunk.copies == 0 for chunk in chunks):
                    postponed.append((state, list(chunks)))
                    continue
                if used_before is not None and any(chunk.used >= used_before for chunk in chunks):
                    continue
                step = _whole(state, chunks)
            else:
                old = [chunk for chunk in chunks if used_before is None or chunk.used < used_before]
                if not last_copies:
                    rare = [chunk for chunk in old if chunk.copies == 0]
                    if rare:
                        postponed.append((state, rare))
                        old = [chunk for chunk in old if chunk.copies != 0]
                step = _some(state, old, left_bytes, left_chunks)
            if step.chunks:
                steps.append(step)
                left_bytes -= step.freed_bytes
                left_chunks -= len(step.chunks)
    return steps


def _whole(state: SegmentState, chunks: Sequence[ChunkState]) -> Step:
    return Step(state.key, tuple(c.n for c in chunks), sum(c.size for c in chunks), whole=True)


def _some(state: SegmentState, chunks: list[ChunkState], need_bytes: int, max_chunks: int) -> Step:
    chunks.sort(key=lambda chunk: (chunk.used, chunk.n))
    chosen: list[int] = []
    freed = 0
    for chunk in chunks[:max_chunks]:
        if freed >= need_bytes:
            break
        chosen.append(chunk.n)
        freed += chunk.size
    return Step(state.key, tuple(chosen), freed, whole=False)
