"""From wanted chunk to chunk in the pool: one source in memory, a real pool, blobs of the reference writers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.reference import parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.errors import ChunkCorrupt, ImageNotFound, SourceUnavailable
from p2pgz.fetch.background import CALM_MAX_SECONDS, calm, fill, prefetch
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Access
from p2pgz.image.layers import LayerOpener
from p2pgz.pool.pool import Pool
from p2pgz.testing.memory_source import Fault, MemorySource
from p2pgz.testing.vectors import expected_document

VECTORS = Path(__file__).parents[2] / "vectors"
pytestmark = pytest.mark.trio


class Bench:
    """A pool, a fetcher and one open layer."""

    def __init__(self, pool, fetcher, source, layer, descriptor):
        self.pool, self.fetcher, self.source, self.layer, self.descriptor = (
            pool,
            fetcher,
            source,
            layer,
            descriptor,
        )
        self.segment = layer.segment
        self.table = layer.segment.table

    def everything_is_right(self):
        return all(
            Digest.of(self.segment.view(n)).raw == self.table.digest(n) for n in range(self.table.chunk_count)
        )


async def no_progress_needed():
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def bench(tmp_path, vector="basic.esgz64k", *, deadline=5.0, blob=None, annotations=None, **limits):
    expected = expected_document(VECTORS / "expected" / f"{vector}.json")
    source = MemorySource(piece_bytes=4096)
    descriptor = source.add((VECTORS / expected["blob"]).read_bytes() if blob is None else blob)
    descriptor = replace(
        descriptor, annotations=expected.get("annotations", {}) if annotations is None else annotations
    )
    async with (
        Pool.open(tmp_path / "state", boot_id="boot", check_filesystem=False) as pool,
        trio.open_nursery() as nursery,
    ):
        fetcher = ChunkFetcher(
            pool,
            nursery,
            connections=limits.get("connections", 4),
            fill_bytes_per_second=limits.get("fill_bytes_per_second", 0),
            read_deadline_seconds=deadline,
        )

        async def no_diff_id():
            return Digest.parse(expected["diff_id"])

        async def no_progress(_):
            await trio.lowlevel.checkpoint()

        layer = await LayerOpener(pool, Documents(pool, None), fetcher.counters, tmp_path / "state").open(
            parse_reference("registry.test/image"),
            source,
            descriptor,
            access=Access(),
            diff_id=no_diff_id,
            allow_unverified_toc=True,
            progress=no_progress,
        )
        fetcher.add_origin(
            Origin(
                segment=layer.segment, source=source, descriptor=descriptor, streamed=layer.record.streamed
            )
        )
        await pool.flush()
        if not limits.get("keep_harvest"):
            await pool.remove_chunks(
                layer.segment, range(layer.segment.table.chunk_count), no_progress_needed
            )
        source.requests.clear()
        yield Bench(pool, fetcher, source, layer, descriptor)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "vector",
    [
        "basic.esgz64k",
        "basic.esgzmin",
        "basic.esgzpar",
        "basic.sgz",
        "basic.zsgz",
        "basic.zctr",
        "big.sgz",
        "basic.gz",
        "basic.zstm",
    ],
)
async def test_every_chunk_of_every_format_arrives_and_is_right(tmp_path, vector):
    async with bench(tmp_path, vector) as b:
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        assert b.everything_is_right()


async def test_the_request_for_the_tail_of_a_small_layer_brings_its_chunks_along(tmp_path):
    async with bench(tmp_path, keep_harvest=True) as b:
        assert b.everything_is_right()


async def test_adjacent_chunks_travel_in_one_request(tmp_path):
    async with bench(tmp_path) as b:
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.START_UP)
        assert len(b.source.requests) == 1


async def test_what_is_here_is_never_asked_for_again(tmp_path):
    async with bench(tmp_path) as b:
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        b.source.requests.clear()
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        assert b.source.requests == []


async def test_twenty_readers_of_one_chunk_cost_one_request(tmp_path):
    async with bench(tmp_path) as b:
        async with trio.open_nursery() as readers:
            for _ in range(20):
                readers.start_soon(b.fetcher.ensure, b.segment, 3, 1, Priority.BLOCKED_READ)
        assert len(b.source.requests) == 1


async def test_a_broken_request_is_repeated_until_the_bytes_are_there(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.extend([Fault(0, SourceUnavailable("cut")), Fault(4096, SourceUnavailable("cut"))])
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        assert b.everything_is_right()
        assert not b.source.faults


async def test_a_dead_source_fails_the_read_at_its_deadline_and_the_next_read_tries_again(
    tmp_path, autojump_clock
):
    async with bench(tmp_path, deadline=5.0) as b:
        b.source.faults.extend([Fault(0, SourceUnavailable("down"))] * 1000)
        started = trio.current_time()
        with pytest.raises(SourceUnavailable, match="down"):
            await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        assert 5.0 <= trio.current_time() - started < 10.0
        b.source.faults.clear()
        await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        assert b.segment.presence.has(0)


async def test_a_silent_source_is_given_up_and_asked_again(tmp_path, autojump_clock):
    async with bench(tmp_path, deadline=60.0) as b:
        b.source.faults.append(Fault(0, None))
        await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        assert len(b.source.requests) == 2


async def test_an_error_that_no_time_heals_fails_at_once(tmp_path):
    async with bench(tmp_path) as b:
        b.source.faults.append(Fault(0, ImageNotFound("gone")))
        with pytest.raises(ImageNotFound, match="gone"):
            await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        assert len(b.source.requests) == 1


async def test_a_corrupt_chunk_is_asked_for_twice_then_refused_and_its_neighbours_live(tmp_path):
    blob = (VECTORS / "bad/payload-flip-mid.blob").read_bytes()
    async with bench(tmp_path, "badbase.esgz64k", blob=blob, annotations={}) as b:
        failures = []
        for n in range(b.table.chunk_count):
            try:
                await b.fetcher.ensure(b.segment, n, 1, Priority.BLOCKED_READ)
            except ChunkCorrupt:
                failures.append(n)
        assert len(failures) == 1
        assert b.segment.presence.present_count() == b.table.chunk_count - 1
        assert b.fetcher.counters.corrupt_chunks == 2


async def test_a_source_that_heals_gives_the_right_bytes_on_the_second_try(tmp_path):
    good = (VECTORS / "blobs/badbase.esgz64k.tar.gz").read_bytes()
    async with bench(tmp_path, "badbase.esgz64k") as b:
        bad = bytearray(good)
        bad[b.table.blob_offset[0] + 12] ^= 0x40
        b.source.blobs[b.descriptor.digest] = bytes(bad)

        def heal():  # the bytes of the first request are cut out already when its first piece is sent
            b.source.blobs[b.descriptor.digest] = good

        b.source.before_piece = heal
        await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        assert b.segment.presence.has(0)


async def test_equal_chunks_of_another_segment_are_copied_not_fetched(tmp_path):
    async with bench(tmp_path, "basic.esgz64k") as b:
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        other = expected_document(VECTORS / "expected/basic.esgzpar.json")
        descriptor = replace(
            b.source.add((VECTORS / other["blob"]).read_bytes()), annotations=other["annotations"]
        )
        layer = await LayerOpener(
            b.pool, Documents(b.pool, None), b.fetcher.counters, tmp_path / "state"
        ).open(
            parse_reference("registry.test/image"),
            b.source,
            descriptor,
            access=Access(),
            diff_id=None,
            allow_unverified_toc=False,
            progress=None,
        )
        await b.pool.flush()
        await b.pool.remove_chunks(layer.segment, range(layer.segment.table.chunk_count), no_progress_needed)
        b.fetcher.add_origin(Origin(segment=layer.segment, source=b.source, descriptor=descriptor))
        b.source.requests.clear()
        await b.fetcher.ensure(layer.segment, 0, layer.segment.table.chunk_count, Priority.BLOCKED_READ)
        assert b.source.requests == []
        assert layer.segment.presence.present_count() == layer.segment.table.chunk_count


async def test_the_start_up_class_yields_to_a_blocked_read_of_other_bytes(tmp_path):
    async with bench(tmp_path, connections=1) as b:
        gate = trio.Event()
        b.source.before_piece = lambda: gate.wait() if len(b.source.requests) == 1 else None
        order = []

        async def want(n, priority):
            await b.fetcher.ensure(b.segment, n, 1, priority)
            order.append(priority)

        last = b.table.chunk_count - 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(want, last, Priority.START_UP)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(want, 0, Priority.BLOCKED_READ)
            await trio.testing.wait_all_tasks_blocked(0.02)
            gate.set()
        assert order[0] is Priority.BLOCKED_READ


async def test_fill_brings_everything_and_respects_its_rate(tmp_path, autojump_clock):
    async with bench(tmp_path, fill_bytes_per_second=20_000) as b:
        started = trio.current_time()
        await fill(b.fetcher, [b.segment])
        payload = sum(end - start for _, start, end in b.source.requests)
        assert b.segment.presence.present_count() == b.table.chunk_count
        assert trio.current_time() - started >= payload / 20_000 - 0.5


@pytest.mark.parametrize(
    ("busy_seconds", "delay_seconds", "least", "most"),
    [(0, 0, 0, 0), (0, 5, 5, 5), (12, 5, 15, 20), (1000, 5, CALM_MAX_SECONDS, CALM_MAX_SECONDS)],
)
async def test_fill_begins_when_a_start_is_over(autojump_clock, busy_seconds, delay_seconds, least, most):
    started = trio.current_time()
    passed = lambda: trio.current_time() - started  # noqa: E731
    await calm(lambda: int(min(passed(), busy_seconds)), delay_seconds=delay_seconds)
    assert least <= passed() <= most


async def test_fill_outlives_a_dead_source(tmp_path, autojump_clock):
    async with bench(tmp_path) as b:
        b.source.faults.extend([Fault(0, SourceUnavailable("down"))] * 20)
        await fill(b.fetcher, [b.segment])
        assert b.segment.presence.present_count() == b.table.chunk_count


async def test_prefetch_takes_exactly_what_stands_before_the_landmark(tmp_path):
    async with bench(tmp_path, "basic.esgzprio") as b:
        end = b.layer.record.prefetch_end
        assert end > 0
        await prefetch(b.fetcher, b.segment, end)
        present = {n for n in range(b.table.chunk_count) if b.segment.presence.has(n)}
        assert present == {n for n in range(b.table.chunk_count) if b.table.blob_end[n] <= end}
        assert present
