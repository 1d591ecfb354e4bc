"""Keeps the pool within its quota and above the floor of free space; decides what becomes of chunks without room.

One per node, run beside the pool. What goes is `core.eviction`'s decision; here are the measuring, the looking again, and
the removal itself in bounded steps. When nothing is left that may go, the pool stops keeping: chunks go through memory to
their readers (`overflow`) until there is room again. Design, section 3.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.eviction import (
    ChunkState,
    SegmentState,
    Step,
    coldest_first,
    excess_bytes,
    is_evictable,
    plan,
)
from p2pgz.core.model import ChunkKind
from p2pgz.errors import P2pgzError, PoolFull, StateError
from p2pgz.pool.measure import allocated_bytes
from p2pgz.pool.overflow import OVERFLOW_BYTES, Overflow
from p2pgz.pool.pool import Pool
from p2pgz.pool.presence import iterate_bits
from p2pgz.pool.segment import Segment, tenths_now
from p2pgz.pool.users import NoUsers, Users

log = structlog.get_logger(component="pool")

TICK_SECONDS: Final = 1.0
# One removal: a full sync, and a transaction of some milliseconds
STEP_CHUNKS: Final = 4096
# What is freed at a time when the disk is full; more than a reader needs, so that the next one need not wait again
FREE_AT_ONCE_BYTES: Final = 16 << 20
# An `fs` answers a ping within a millisecond; one that is stopped, or hangs in the kernel, keeps its chunks
ACKNOWLEDGE_SECONDS: Final = 5.0
ASIDE_SECONDS: Final = 30.0
# Chunks that came just now have readers on the way to them; rather than these, nothing is kept. In tenths of a second
GRACE_TENTHS: Final = (20, 2)
# Keeping begins again with this much free, or this share of a small disk
RESUME_BYTES: Final = 8 << 20
RESUME_SHARE: Final = 0.02
COMPLAIN_AGAIN_SECONDS: Final = 60.0
# What is in memory for want of room is forgotten after once or twice this time without a reader, who has it by then
UNKEPT_UNUSED_SECONDS: Final = 30.0
# How much more is looked at than is needed, since not all of a segment may go
CANDIDATES_FACTOR: Final = 2

Copies = Callable[[int], int]
"""how many others have chunk n"""
Rarity = Callable[[Segment], Copies | None]
"""the others' copies of a segment as they are known now, to be asked in a worker thread; None: unknown"""


class Evictor:
    """The `Room` of a pool. `run` is its task."""

    def __init__(
        self,
        pool: Pool,
        *,
        quota_bytes: int = 0,
        free_floor_bytes: int = 0,
        users: Users | None = None,
        rarity: Rarity | None = None,
        overflow_bytes: int = OVERFLOW_BYTES,
    ) -> None:
        self._pool = pool
        self._quota_bytes = pool.quota_bytes = quota_bytes
        self._floor_bytes = free_floor_bytes
        self.users: Users = users or NoUsers()
        self._rarity = rarity
        self._keeps = True
        self._started = False
        self._evicting = trio.Lock()
        self._wake = trio.Event()
        self._aside: dict[int, float] = {}
        self._forget_at = self._evict_at = -math.inf
        self._complained_at = -COMPLAIN_AGAIN_SECONDS
        self._said_full = False
        self.counts: Counter[str] = Counter()
        self._measure_now()
        pool.overflow = Overflow(overflow_bytes)
        pool.room = self

    def limit(self, *, quota_bytes: int, free_floor_bytes: int) -> None:
        """Other limits from now on; what is beyond them goes as soon as it can."""
        self._quota_bytes = self._pool.quota_bytes = quota_bytes
        self._floor_bytes = free_floor_bytes
        self._wake.set()

    @property
    def keeps(self) -> bool:
        """See Room."""
        return self._keeps

    @property
    def used_bytes(self) -> int:
        """Allocated by the pool's files: as measured last, what was written since, and what is being written."""
        written = self._pool.written_bytes - self._measured_at
        return max(0, self._measured_bytes + written + self._pool.admitted_bytes)

    def admits(self, count: int) -> bool:
        """See Room."""
        if not self._quota_bytes:
            return True
        self._wake_if_near()
        return self.used_bytes + count <= self._quota_bytes

    def has_slack(self) -> bool:
        """Whether there is room for what nobody waits for: it must not push out what somebody read."""
        return self._keeps and not self.above_low_water()

    def _wake_if_near(self) -> None:
        if excess_bytes(self.used_bytes, self._quota_bytes, 1, 0, started=self._started):
            self._wake.set()

    async def make(self, count: int) -> bool:
        """See Room."""
        asked_at = self.counts["evicted_bytes"]
        async with self._evicting:
            await self._measure()
            if self.counts["evicted_bytes"] > asked_at and self.admits(count) and self._free_bytes > count:
                return True  # the one before us has freed enough
            need = count + FREE_AT_ONCE_BYTES
            if self._quota_bytes:
                over = self.used_bytes + count - self._quota_bytes
                need = max(count, over, min(need, self._quota_bytes // 10))
            freed = 0
            for grace in GRACE_TENTHS:
                freed += await self._evict(need - freed, grace)
                await self._measure()
                if freed >= count and self.admits(count):
                    return True
            self._stop_keeping()
            return False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_after(TICK_SECONDS):
                await self._wake.wait()
            self._wake = trio.Event()
            try:
                await self._look()
            except P2pgzError as error:
                self._complain("pool.eviction_failed", reason=str(error))
            except Exception:
                log.exception("pool.bug")
                await trio.sleep(TICK_SECONDS)

    async def _look(self) -> None:
        if trio.current_time() >= self._forget_at:
            self._forget_at = trio.current_time() + UNKEPT_UNUSED_SECONDS
            self._pool.overflow.forget_unused()
        async with self._evicting:
            await self._measure()
            while need := self._excess():
                self._started = True
                freed = await self._evict(need, GRACE_TENTHS[0])
                await self._measure()
                if not freed:
                    if self._floor_bytes and self._free_bytes < self._floor_bytes:
                        self._stop_keeping()
                    break
            else:
                self._started = False
            if self._pool.lacks_reserve:  # nothing is kept before that is back
                await self._pool.take_reserve()
                if self._pool.lacks_reserve:
                    await self._evict(FREE_AT_ONCE_BYTES, GRACE_TENTHS[0])  # which takes it
                await self._measure()
        if self._pool.lacks_reserve:
            return
        if not self._keeps:
            # first of all: the room that the index gave up must not pass for room for chunks
            await self._pool.take_reserve()
            await self._measure()
            await self._try_to_keep()
        elif not self._pool.failing:
            await self._write_out_waiting()
        elif (waiting := self._pool.overflow.oldest()) is not None:
            await self._pool.write_out(*waiting)

    def _excess(self) -> int:
        return excess_bytes(
            self.used_bytes, self._quota_bytes, self._free_bytes, self._floor_bytes, started=self._started
        )

    def above_low_water(self) -> int:
        """How much there is to evict before the pool has slack again; 0 without a limit, or far from it."""
        return excess_bytes(
            self.used_bytes, self._quota_bytes, self._free_bytes, self._floor_bytes, started=True
        )

    async def evict(self, need_bytes: int, *, grace_tenths: int = 0) -> int:
        """Free this much if it can be had, cold chunks first; returns how much it was."""
        async with self._evicting:
            freed = 0
            while freed < need_bytes:
                got = await self._evict(need_bytes - freed, grace_tenths)
                if not got:
                    break
                freed += got
            await self._measure()
        return freed

    async def _evict(self, need_bytes: int, grace_tenths: int) -> int:
        """One round; the caller holds the lock."""
        states = [state for state in self._states() if is_evictable(state)]
        segments: dict[int, Segment] = {}
        used_before = tenths_now() - grace_tenths if grace_tenths else None
        planned: list[Step] = []
        held = 0
        ordered = coldest_first(states)
        for position, state in enumerate(ordered):
            segment = self._pool.segment_of_row(state.key)
            if segment is not None:
                segments[state.key] = segment
                held += state.held_bytes
            if held < CANDIDATES_FACTOR * need_bytes and position + 1 < len(ordered):
                continue
            chosen = [state for state in ordered if state.key in segments]
            planned = await self._plan(chosen, segments, need_bytes, used_before)
            if sum(step.freed_bytes for step in planned) >= need_bytes:
                break
            held = 0
        freed = 0
        for step in planned:
            freed += await self._take(segments[step.key], step, used_before)
        return freed

    async def _plan(
        self,
        states: Sequence[SegmentState],
        segments: Mapping[int, Segment],
        need_bytes: int,
        used_before: int | None,
    ) -> list[Step]:
        copies = {key: self._rarity(segment) for key, segment in segments.items()} if self._rarity else {}

        def chunks_of(key: int) -> list[ChunkState]:
            return _chunks_of(segments[key], copies.get(key))

        return await trio.to_thread.run_sync(
            lambda: plan(states, chunks_of, need_bytes, max_chunks=STEP_CHUNKS, used_before=used_before)
        )

    def _states(self) -> list[SegmentState]:
        mounted = {segment.row for segment in self.users.mounted()}
        pinned = self._pool.catalog.pinned_segments()
        now = trio.current_time()
        self._aside = {row: until for row, until in self._aside.items() if until > now}
        states = []
        opened = {segment.row: segment for segment in self._pool.segments()}
        for row, domain, segment_id, held, last_mount, mounts, native in self._pool.heat():
            segment = opened.get(row)
            if segment is not None:
                held = max(held, segment.unsynced_bytes, segment.presence.present_count())
                native = int(segment.native_served)
            if row in self._aside:
                held = 0  # nothing to be had there for the moment
            pin = (domain, Digest(segment_id)) in pinned
            states.append(SegmentState(row, held, row in mounted, last_mount, mounts, pin, bool(native)))
        return states

    async def _take(self, segment: Segment, step: Step, used_before: int | None) -> int:
        """Remove what was planned, as far as that still holds."""
        try:
            if step.whole:
                freed = await self._pool.renew_segment(segment, lambda: not self.users.is_mapped(segment))
                count = len(step.chunks)
            else:
                chunks = [
                    n
                    for n in step.chunks
                    if not segment.is_busy(n) and (used_before is None or segment.used_at[n] < used_before)
                ]
                if not chunks:
                    return 0
                if not self.users.may_punch():
                    raise StateError("a file system process of an earlier node may still read the pool")
                freed = await self._pool.remove_chunks(segment, chunks, lambda: self.acknowledge(segment))
                count = len(chunks)
        except (P2pgzError, OSError) as error:
            self.counts["eviction_failures"] += 1
            self._aside[segment.row] = trio.current_time() + ASIDE_SECONDS
            self._complain("pool.not_evicted", segment=str(segment.id), reason=str(error))
            return 0
        self.counts["evicted_chunks"] += count
        self.counts["evicted_bytes"] += freed
        return freed

    async def acknowledge(self, segment: Segment) -> None:
        """`Users.acknowledge`, and StateError when it takes too long."""
        try:
            with trio.fail_after(ACKNOWLEDGE_SECONDS):
                await self.users.acknowledge(segment)
        except trio.TooSlowError:
            raise StateError("a file system process does not answer: its chunks stay") from None

    def _stop_keeping(self) -> None:
        if self._keeps:
            self._keeps = False
            self.counts["full_periods"] += 1
            self._said_full = self._complain(
                "pool.full",
                used_bytes=self.used_bytes,
                free_bytes=self._free_bytes,
                effect="chunks are served without being kept until there is room",
            )

    async def _try_to_keep(self) -> None:
        """Back to keeping once the disk takes what waits in memory."""
        resume = max(self._floor_bytes, min(RESUME_BYTES, int(self._total_bytes * RESUME_SHARE)))
        if self._free_bytes < resume or not self.has_slack_for(1):
            return
        if not await self._write_out_waiting():
            # the system has set a quota, of which nothing tells but its refusals; or no eviction helps
            if trio.current_time() >= self._evict_at:
                self._evict_at = trio.current_time() + ASIDE_SECONDS
                await self.evict(FREE_AT_ONCE_BYTES, grace_tenths=GRACE_TENTHS[0])
            return
        self._keeps = True
        if self._said_full:
            self._said_full = False
            log.info("pool.keeps_again", used_bytes=self.used_bytes, free_bytes=self._free_bytes)

    async def _write_out_waiting(self) -> bool:
        """What waits in memory goes to the disk as far as the quota allows; false when there is no room for it."""
        while (waiting := self._pool.overflow.oldest()) is not None and self.has_slack_for(len(waiting[2])):
            try:
                await self._pool.write_out(*waiting)
            except PoolFull:
                return False
        return True

    def has_slack_for(self, count: int) -> bool:
        """Whether the quota leaves room for this much."""
        return not self._quota_bytes or self.used_bytes + count <= self._quota_bytes

    def _complain(self, event: str, **fields: Any) -> bool:
        now = trio.current_time()
        if now - self._complained_at < COMPLAIN_AGAIN_SECONDS:
            return False
        self._complained_at = now
        log.warning(event, **fields)
        return True

    async def _measure(self) -> None:
        await trio.to_thread.run_sync(self._measure_now)

    def _measure_now(self) -> None:
        written = self._pool.written_bytes
        self._measured_bytes = allocated_bytes(self._pool.directory)
        self._measured_at = written
        space = os.statvfs(self._pool.directory)
        self._free_bytes = space.f_bavail * space.f_frsize
        self._total_bytes = space.f_blocks * space.f_frsize

    def status(self) -> dict[str, Any]:
        """For the status document."""
        states = self._states()
        return {
            "state": "failing" if self._pool.failing else "keeping" if self._keeps else "full",
            "error": self._pool.failing,
            "free_floor_bytes": self._floor_bytes,
            "allocated_bytes": self.used_bytes,
            "pinned_bytes": sum(state.held_bytes for state in states if state.pinned),
            "evictable_bytes": sum(state.held_bytes for state in states if is_evictable(state)),
            "evicted_chunks": self.counts["evicted_chunks"],
            "evicted_bytes": self.counts["evicted_bytes"],
            "eviction_failures": self.counts["eviction_failures"],
            "full_periods": self.counts["full_periods"],
            "unkept_chunks": self._pool.overflow.chunks,
            "unkept_bytes_now": self._pool.overflow.bytes,
        }


def _chunks_of(segment: Segment, copies: Copies | None) -> list[ChunkState]:
    """In a worker thread."""
    here = int.from_bytes(segment.presence.to_bytes(), "little")
    here |= int.from_bytes(segment.on_record.to_bytes(), "little")
    size, kind, used_at = segment.table.size, segment.table.kind, segment.used_at
    return [
        ChunkState(n, size[n], used_at[n], copies(n) if copies is not None else None)
        for n in iterate_bits(here.to_bytes(segment.presence.bitmap_bytes, "little"))
        if kind[n] != ChunkKind.ZEROS
    ]
