"""Reads the pool's chunks from the disk again and finds those that changed there: silent corruption.

Run on demand (`p2pgz pool scrub`) and in idle time. It reads past the page cache where the file system lets it, at a limited
rate and in the idle class of I/O where the scheduler has one. Where an idle pass stopped is kept in the index, so that a
node that is restarted goes on from there. What is wrong is forgotten, never punched, and then fetched over.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import trio

from p2pgz.core.model import ChunkKind
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkCorrupt, P2pgzError
from p2pgz.pool.disk import read_fully
from p2pgz.pool.pool import Pool
from p2pgz.pool.presence import iterate_bits
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="pool")

# What is claimed, read and hashed at a time: eviction and writers of these chunks wait about 5 ms for it
STEP_BYTES: Final = 2 << 20
STEP_CHUNKS: Final = 256
PAGE_BYTES: Final = 4096
CURSOR_SECONDS: Final = 30.0
IDLE_TICK_SECONDS: Final = 1.0
# A pass in idle time waits until nobody has asked for a chunk for this long
IDLE_AFTER_SECONDS: Final = 2.0
# linux/ioprio.h: class 3 is idle; asm/unistd.h
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_IDLE: Final = 3 << 13
_SYS_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}.get(platform.machine())

Progress = Callable[[dict[str, Any]], Awaitable[None]]
Refetch = Callable[[Segment, list[int]], Awaitable[None]]
"""make wrong chunks present again; raises P2pgzError when no source has them"""
FoundWrong = Callable[[Segment, list[int]], None]
"""told of wrong chunks (ascending) once they are absent: kernels have to forget what they cached of them"""

_libc = ctypes.CDLL(None, use_errno=True)


class Scrubber:
    """One per node."""

    def __init__(
        self,
        pool: Pool,
        refetch: Refetch,
        *,
        is_busy: Callable[[], bool] = lambda: False,
        found_wrong: FoundWrong = lambda segment, chunks: None,
    ) -> None:
        self._pool = pool
        self._refetch = refetch
        self._found_wrong = found_wrong
        self._is_busy = is_busy
        self._running = trio.Lock()
        self._asked = 0  # commands that run or wait: an idle pass gives way
        self._called = trio.Event()
        self.counts: Counter[str] = Counter()

    async def scrub(self, bytes_per_second: int, progress: Progress) -> dict[str, Any]:
        """Everything once; 0 bytes per second is no limit. Returns what was found."""
        self._asked += 1
        self._called.set()
        try:
            async with self._running:
                return await self._pass(bytes_per_second, progress, (0, 0), idle=False)
        finally:
            self._asked -= 1
            if not self._asked:
                self._called = trio.Event()

    async def run(self, interval_seconds: float, bytes_per_second: int) -> None:
        """Passes in idle time, one each interval; until cancelled."""
        while True:
            await trio.sleep(IDLE_TICK_SECONDS)
            try:
                finished = self._pool.fact("scrub_finished")
                # a new pool: what was just written was just checked; or the clock was ahead, and then is not to stop us
                if finished is None or float(finished) > time.time():
                    finished = time.time()
                    await self._pool.set_facts({"scrub_finished": finished})
                if self._asked or self._is_busy() or time.time() < float(finished) + interval_seconds:
                    continue
                row, n = map(int, str(self._pool.fact("scrub_cursor") or "0 0").split())
                async with self._running:
                    result = await self._pass(bytes_per_second, _silent, (row, n), idle=True)
            except P2pgzError as error:
                log.warning("pool.scrub_failed", reason=str(error))
                await trio.sleep(CURSOR_SECONDS)
                continue
            except Exception:
                log.exception("pool.bug")
                await trio.sleep(CURSOR_SECONDS)
                continue
            if result["finished"]:
                log.info("pool.scrubbed", **result)

    async def _pass(
        self, bytes_per_second: int, progress: Progress, cursor: tuple[int, int], *, idle: bool
    ) -> dict[str, Any]:
        found: Counter[str] = Counter()
        wrong: list[str] = []
        noted = trio.current_time()
        rows = [row for row, *_ in self._pool.heat()]
        total = self._pool.stats().bytes
        for row in sorted(row for row in rows if row >= cursor[0]):
            segment = self._pool.segment_of_row(row)
            if segment is None:
                found["unusable_segments"] += 1
                continue
            for step in _steps(segment, cursor[1] if row == cursor[0] else 0):
                while idle and not self._asked and self._is_busy():
                    await self._pause(trio.current_time() + IDLE_TICK_SECONDS, idle=idle)
                if idle and self._asked:
                    await self._note_cursor(row, step[0])
                    return _summary(found, wrong, finished=False)
                begin, bytes_before = trio.current_time(), found["bytes"]
                bad = await self._step(segment, step, found)
                wrong += [f"chunk {n} of segment {segment.id}" for n in bad]
                if bad:
                    await self._repair(segment, bad, found)
                if bytes_per_second:  # step by step: what a pause or a slow disk cost is not made up for
                    await self._pause(begin + (found["bytes"] - bytes_before) / bytes_per_second, idle=idle)
                now = trio.current_time()
                if idle and now - noted > CURSOR_SECONDS:
                    noted = now
                    await self._note_cursor(row, step[-1] + 1)
                await progress(
                    {
                        "event": "progress",
                        "text": f"scrubbed {found['bytes']} of about {total} bytes, {len(wrong)} chunks wrong",
                        "done": found["bytes"],
                        "total": total,
                    }
                )
        await self._pool.set_facts({"scrub_finished": time.time(), "scrub_cursor": "0 0"})
        return _summary(found, wrong, finished=True)

    async def _pause(self, until: float, *, idle: bool) -> None:
        """A command ends the pauses of an idle pass."""
        with trio.move_on_at(until):
            await (self._called if idle else trio.Event()).wait()

    async def _note_cursor(self, row: int, n: int) -> None:
        await self._pool.set_facts({"scrub_cursor": f"{row} {n}"})

    async def _step(self, segment: Segment, step: list[int], found: Counter[str]) -> list[int]:
        """Read and hash; returns the wrong ones, which are absent then."""
        await segment.claim(step)
        try:
            here = [
                n
                for n in step
                if (segment.presence.has(n) or segment.recorded(n)) and n not in segment.unsynced
            ]
            bad = await trio.to_thread.run_sync(_check, segment, here) if here else []
        finally:
            segment.release(step)
        for name, count in (("chunks", len(here)), ("bytes", segment.bytes_of(here)), ("wrong", len(bad))):
            found[name] += count
            self.counts[name] += count
        if bad:
            log.error("pool.silent_corruption", file=str(segment.path), chunks=len(bad))
            await self._pool.forget_wrong(segment, bad)
            self._found_wrong(segment, bad)
        return bad

    async def _repair(self, segment: Segment, bad: list[int], found: Counter[str]) -> None:
        try:
            await self._refetch(segment, bad)
        except P2pgzError as error:
            log.warning("pool.not_refetched", file=str(segment.path), reason=str(error))
        fetched = sum(segment.presence.has(n) for n in bad)
        found["refetched"] += fetched
        self.counts["refetched"] += fetched

    def status(self) -> dict[str, Any]:
        """For the status document."""
        return {
            "scrubbed_chunks": self.counts["chunks"],
            "scrubbed_bytes": self.counts["bytes"],
            "scrub_wrong_chunks": self.counts["wrong"],
            "scrub_refetched_chunks": self.counts["refetched"],
            "scrub_finished": float(self._pool.fact("scrub_finished") or 0),
        }


def _summary(found: Counter[str], wrong: list[str], *, finished: bool) -> dict[str, Any]:
    return {
        "chunks": found["chunks"],
        "bytes": found["bytes"],
        "wrong": wrong,
        "refetched_chunks": found["refetched"],
        "unusable_segments": found["unusable_segments"],
        "finished": finished,
    }


def _steps(segment: Segment, first: int) -> Iterator[list[int]]:
    """Chunks with bytes on the disk, from number `first` on, in steps."""
    table = segment.table
    here = int.from_bytes(segment.presence.to_bytes(), "little")
    here |= int.from_bytes(segment.on_record.to_bytes(), "little")
    step: list[int] = []
    size = 0
    for n in iterate_bits(here.to_bytes(segment.presence.bitmap_bytes, "little")):
        if n < first or table.kind[n] == ChunkKind.ZEROS:
            continue
        step.append(n)
        size += table.size[n]
        if size >= STEP_BYTES or len(step) >= STEP_CHUNKS:
            yield step
            step, size = [], 0
    if step:
        yield step


def _check(segment: Segment, chunks: list[int]) -> list[int]:
    """In a worker thread: the chunks whose bytes on the disk are not theirs."""
    table = segment.table
    bad = []
    with _idle_class(), _uncached(segment) as read:
        for n in chunks:
            try:
                verify(
                    table.digest(n), read(table.segment_offset[n], table.size[n]), source=str(segment.path)
                )
            except (ChunkCorrupt, OSError):
                bad.append(n)
    return bad


@contextmanager
def _uncached(segment: Segment) -> Iterator[Callable[[int, int], bytes]]:
    """A reader of the segment's file that asks the disk itself, where the file system can do that."""
    try:
        fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        yield lambda offset, size: _dropped(segment.data_fd, offset, size)
        return
    try:
        yield lambda offset, size: _direct(fd, segment.data_fd, offset, size)
    finally:
        os.close(fd)


def _direct(fd: int, cached_fd: int, offset: int, size: int) -> bytes:
    start = offset // PAGE_BYTES * PAGE_BYTES
    end = -(-(offset + size) // PAGE_BYTES) * PAGE_BYTES
    with (
        mmap.mmap(-1, end - start) as buffer,
        memoryview(buffer) as view,
    ):  # page-aligned, as O_DIRECT wants it
        try:
            got = os.preadv(fd, [view], start)
        except OSError:
            return _dropped(cached_fd, offset, size)
        data = bytes(view[offset - start : min(got, offset - start + size)])
    return data if len(data) == size else _dropped(cached_fd, offset, size)


def _dropped(fd: int, offset: int, size: int) -> bytes:
    """The next best: ask the page cache to forget clean pages first."""
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
    return read_fully(fd, size, offset)


@contextmanager
def _idle_class() -> Iterator[None]:
    """This thread's I/O yields to everybody else's; a hint that some schedulers have no use for."""
    if _SYS_IOPRIO_SET is None:
        yield
        return
    _libc.syscall(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
    try:
        yield
    finally:
        _libc.syscall(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, 0)


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()
