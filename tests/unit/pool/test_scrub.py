"""Reading the pool through: silent damage is found and repaired, at a rate, in idle time, and from where it stopped."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pgz.errors import SourceUnavailable, StateError
from p2pgz.pool import scrub as module
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.scrub import Scrubber
from p2pgz.testing.conformance_pool import Layer, check_content

pytestmark = pytest.mark.trio

CHUNK = 64 << 10
CHUNKS = 96  # three steps
BYTES = CHUNK * CHUNKS
RATE = 1 << 20


def layer_of(seed: int) -> Layer:
    rng = random.Random(seed)
    return Layer([[rng.randbytes(CHUNK)] for _ in range(CHUNKS)])


class Bench:
    """A pool with one full segment, its scrubber, and what that has called."""

    def __init__(self, pool: Pool, segment: Segment, layer: Layer) -> None:
        self.pool, self.segment, self.layer = pool, segment, layer
        self.scrubber = Scrubber(pool, self.refetch, is_busy=lambda: self.busy, found_wrong=self.found_wrong)
        self.busy = False
        self.has_source = True
        self.told: list[tuple[list[int], bool]] = []
        self.progress: list[dict[str, Any]] = []

    async def refetch(self, segment: Segment, chunks: list[int]) -> None:
        if not self.has_source:
            await trio.lowlevel.checkpoint()
            raise SourceUnavailable("nobody has it")
        await self.pool.add_many(segment, [(n, self.layer.verified(n)) for n in chunks])

    def found_wrong(self, segment: Segment, chunks: list[int]) -> None:
        self.told.append((chunks, any(segment.presence.has(n) for n in chunks)))

    async def note(self, event: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.progress.append(event)

    def flip(self, n: int) -> None:
        """One bit of a chunk on the disk."""
        with self.segment.path.open("r+b") as file:
            offset = self.segment.table.segment_offset[n] + 777
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)
            os.fsync(file.fileno())


@asynccontextmanager
async def bench(state: Path) -> AsyncIterator[Bench]:
    layer = layer_of(1)
    async with Pool.open(state, boot_id="boot") as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        await pool.flush()
        yield Bench(pool, segment, layer)


async def test_sound_pool_is_read_whole_and_nothing_else_happens(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        found = await b.scrubber.scrub(0, b.note)
        assert found == {
            "chunks": CHUNKS,
            "bytes": BYTES,
            "wrong": [],
            "refetched_chunks": 0,
            "unusable_segments": 0,
            "finished": True,
        }
        assert b.told == []
        assert [event["done"] for event in b.progress] == [BYTES // 3, BYTES * 2 // 3, BYTES]
        assert b.scrubber.status()["scrub_finished"] == pytest.approx(time.time(), abs=60)


async def test_flipped_bits_are_found_told_of_while_absent_and_refetched(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        for n in (3, 40, 41):
            b.flip(n)
        found = await b.scrubber.scrub(0, b.note)
        assert found["wrong"] == [f"chunk {n} of segment {b.segment.id}" for n in (3, 40, 41)]
        assert found["refetched_chunks"] == 3
        assert b.told == [([3], False), ([40, 41], False)]
        assert check_content(b.segment, b.layer) == CHUNKS
        await b.pool.flush()
        assert (await b.scrubber.scrub(0, b.note))["wrong"] == []
        assert b.scrubber.status()["scrub_wrong_chunks"] == 3


async def test_what_no_source_has_is_absent_and_never_shown_wrong(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.flip(5)
        b.has_source = False
        found = await b.scrubber.scrub(0, b.note)
        assert (len(found["wrong"]), found["refetched_chunks"]) == (1, 0)
        assert check_content(b.segment, b.layer) == CHUNKS - 1
        assert not b.segment.recorded(5)
    async with Pool.open(tmp_path, boot_id="boot") as pool:
        segment = pool.segment(b.segment.id)
        assert segment is not None
        assert check_content(segment, b.layer) == CHUNKS - 1


async def test_chunks_of_an_earlier_run_are_checked_though_nobody_used_them(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.flip(7)
    os.utime(b.segment.path)
    async with Pool.open(tmp_path, boot_id="another") as pool:
        again = Bench(pool, pool.segment(b.segment.id), b.layer)  # type: ignore[arg-type]  # it is there
        assert again.segment.presence.present_count() == 0
        found = await again.scrubber.scrub(0, again.note)
        assert (found["chunks"], len(found["wrong"])) == (CHUNKS, 1)
        assert again.segment.presence.has(7)


async def test_unusable_segment_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        other = layer_of(2)
        segment = await b.pool.open_segment(other.layout)
        await b.pool.add_many(segment, other.all_verified())
    b.segment.table_path.write_bytes(b"")
    async with Pool.open(tmp_path, boot_id="boot") as pool:
        again = Bench(pool, pool.segment(segment.id), other)  # type: ignore[arg-type]
        found = await again.scrubber.scrub(0, again.note)
        assert (found["chunks"], found["unusable_segments"]) == (CHUNKS, 1)


async def test_rate_is_kept_also_after_a_pause(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with bench(tmp_path) as b:
        begin = trio.current_time()
        await b.scrubber.scrub(RATE, b.note)
        took = trio.current_time() - begin
        assert took == pytest.approx(BYTES / RATE, rel=0.2)
        # an idle pass that had to wait for an hour does not make up for it
        ends = []

        async def note_and_be_busy(event: dict[str, Any]) -> None:
            ends.append(trio.current_time())
            if len(ends) == 1:
                await trio.sleep(3600)

        begin = trio.current_time()
        await b.scrubber.scrub(RATE, note_and_be_busy)
        assert trio.current_time() - begin - 3600 == pytest.approx(BYTES / RATE, rel=0.2)


async def test_idle_pass_waits_until_nobody_reads_and_goes_on_where_it_stopped(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CURSOR_SECONDS", 0.5)
    async with bench(tmp_path) as b:
        b.busy = True
        await b.pool.set_facts({"scrub_finished": time.time() - 3600})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.scrubber.run, 60.0, RATE)
            await trio.sleep(100)
            assert b.scrubber.counts["chunks"] == 0
            b.busy = False
            while not b.scrubber.counts["chunks"]:
                await trio.sleep(0.1)
            b.busy = True  # in the middle of a pass
            await trio.sleep(50)
            stopped_at = b.scrubber.counts["chunks"]
            assert 0 < stopped_at < CHUNKS
            b.busy = False
            while b.scrubber.counts["chunks"] == stopped_at:
                await trio.sleep(0.1)
            await trio.sleep(1.9)
            nursery.cancel_scope.cancel()  # the node ends, before the last step was noted
        done = b.scrubber.counts["chunks"]
        cursor = b.pool.fact("scrub_cursor")
    assert cursor != "0 0"
    async with Pool.open(tmp_path, boot_id="boot") as pool:
        again = Bench(pool, pool.segment(b.segment.id), b.layer)  # type: ignore[arg-type]
        again.flip(CHUNKS - 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.scrubber.run, 60.0, RATE)
            while not again.scrubber.counts["refetched"]:
                await trio.sleep(0.1)
            while pool.fact("scrub_cursor") != "0 0":
                await trio.sleep(0.1)
            assert again.scrubber.counts["chunks"] <= CHUNKS - stopped_at
            assert done + again.scrubber.counts["chunks"] >= CHUNKS
            before = again.scrubber.counts["chunks"]
            await trio.sleep(30)
            assert again.scrubber.counts["chunks"] == before  # not again before the interval is over
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("busy", [False, True])
async def test_command_takes_over_from_an_idle_pass_whatever_that_waits_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, busy: bool
) -> None:
    async with bench(tmp_path) as b:
        await b.pool.set_facts({"scrub_finished": time.time() - 3600})
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.scrubber.run, 60.0, 1)  # a step of it takes a month
            while not b.scrubber.counts["chunks"]:
                await trio.sleep(0.1)
            b.busy = busy
            found = await b.scrubber.scrub(0, b.note)
            assert (found["chunks"], found["finished"]) == (CHUNKS, True)
            assert trio.current_time() - begin < 86_400
            nursery.cancel_scope.cancel()


async def test_clock_that_was_ahead_does_not_put_the_scrub_off_for_years(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with bench(tmp_path) as b:
        await b.pool.set_facts({"scrub_finished": time.time() + 10 * 365 * 86400})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.scrubber.run, 60.0, RATE)
            while float(b.pool.fact("scrub_finished")) > time.time():
                await trio.sleep(1)
            nursery.cancel_scope.cancel()


async def test_trouble_with_the_index_does_not_end_the_task(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as b:
        await b.pool.set_facts({"scrub_finished": time.time() - 3600})
        heat, failures = b.pool.heat, 2

        def sometimes() -> Any:
            nonlocal failures
            failures -= 1
            if failures == 1:
                raise StateError("the index is damaged")
            if failures == 0:
                raise RuntimeError("a bug")
            return heat()

        monkeypatch.setattr(b.pool, "heat", sometimes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.scrubber.run, 60.0, RATE)
            while b.scrubber.counts["chunks"] < CHUNKS:
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
