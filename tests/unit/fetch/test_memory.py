"""What is in memory between the wire and a disk that does not keep up: bounded, however many images are fetched at once."""

from __future__ import annotations

import io
import random
import tarfile
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.core.digest import Digest
from p2pgz.core.reference import parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.fetch import from_registry
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Access
from p2pgz.image.layers import LayerOpener
from p2pgz.pool.chunks import ARRIVALS
from p2pgz.pool.commit import UNSYNCED_MAX_BYTES
from p2pgz.pool.evictor import Evictor
from p2pgz.pool.pool import Pool, Segment
from p2pgz.testing.faulty_disk import FaultyDisk, StuckDisk
from p2pgz.testing.memory_source import MemorySource

pytestmark = pytest.mark.trio

REPOSITORIES = 8
CONNECTIONS = 8
CHUNK = 256 << 10
REPORT = 1 << 20  # instead of REPORT_BYTES, so that less has to be made
LIMIT = ARRIVALS * (REPORT + CHUNK)
CHUNKS = 24
SECONDS = 30


@pytest.fixture(autouse=True)
def _report_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_registry.REPORT_BYTES <= 4 << 20
    monkeypatch.setattr(from_registry, "REPORT_BYTES", REPORT)


@cache
def compressible_layer(seed: int) -> tuple[bytes, dict[str, str]]:
    """An eStargz blob, and its annotations, of CHUNKS chunks, each of which is a thousandth of its size on the wire."""
    rng = random.Random(seed)
    plain, out = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        info = tarfile.TarInfo("f")
        info.size = CHUNK * CHUNKS
        tar.addfile(info, io.BytesIO(b"".join(rng.randbytes(8) * (CHUNK // 8) for _ in range(CHUNKS))))
    plain.seek(0)
    written = convert_layer(plain, out, LayerOptions(chunk_bytes=CHUNK, threads=0))
    return out.getvalue(), written.annotations


class Bench:
    """A fetcher, and a layer in each of several repositories; what is added and not written yet is counted."""

    def __init__(self, pool: Pool, fetcher: ChunkFetcher) -> None:
        self.pool, self.fetcher = pool, fetcher
        self.segments: list[Segment] = []
        self.arrived_bytes = self.most_bytes = 0
        add = pool.add_many

        async def counted(segment: Segment, chunks: Any) -> None:
            chunks = list(chunks)
            size = sum(len(chunk) for _, chunk in chunks)
            self.arrived_bytes += size
            self.most_bytes = max(self.most_bytes, self.arrived_bytes)
            try:
                await add(segment, chunks)
            finally:
                self.arrived_bytes -= size

        pool.add_many = counted  # type: ignore[method-assign]

    async def fetch_all(self, landed: Callable[[Segment], None] = lambda _: None) -> None:
        async def fetch(segment: Segment, n: int) -> None:
            await self.fetcher.supply(segment, n, 1, Priority.BLOCKED_READ)
            landed(segment)

        async with trio.open_nursery() as nursery:
            for segment in self.segments:
                for n in range(CHUNKS):
                    nursery.start_soon(fetch, segment, n)


@asynccontextmanager
async def bench(state: Path, disk: FaultyDisk) -> AsyncIterator[Bench]:
    async with (
        Pool.open(state, boot_id="boot", check_filesystem=False, disk=disk) as pool,
        trio.open_nursery() as nursery,
    ):
        fetcher = ChunkFetcher(
            pool, nursery, connections=CONNECTIONS, fill_bytes_per_second=0, read_deadline_seconds=SECONDS
        )
        made = Bench(pool, fetcher)
        opener = LayerOpener(pool, Documents(pool, None), fetcher.counters, state)
        for seed in range(REPOSITORIES):
            source = MemorySource(name=f"registry.test/{seed}", piece_bytes=64 << 10)
            blob, annotations = compressible_layer(seed)
            descriptor = replace(source.add(blob), annotations=annotations)

            async def diff_id() -> Digest:
                raise AssertionError("only plain layers need it")

            async def no_progress(_: Any) -> None:
                await trio.lowlevel.checkpoint()

            layer = await opener.open(
                parse_reference(source.name),
                source,
                descriptor,
                access=Access(),
                diff_id=diff_id,
                allow_unverified_toc=False,
                progress=no_progress,
            )
            fetcher.add_origin(Origin(segment=layer.segment, source=source, descriptor=descriptor))
            await pool.flush()
            everything = range(layer.segment.table.chunk_count)
            await pool.remove_chunks(layer.segment, everything, trio.lowlevel.checkpoint)
            made.segments.append(layer.segment)
        made.most_bytes = 0
        yield made
        nursery.cancel_scope.cancel()


async def test_stuck_disk_stops_fetching_before_memory_fills(tmp_path: Path) -> None:
    disk = StuckDisk()
    async with bench(tmp_path, disk) as b:
        tracemalloc.start()
        try:
            disk.gate.clear()
            before = tracemalloc.get_traced_memory()[0]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.fetch_all)
                while not b.arrived_bytes:
                    await trio.sleep(0.01)
                await trio.testing.wait_all_tasks_blocked(0.5)
                # all that came is stuck: this is as much as there will ever be
                stuck_bytes = b.arrived_bytes
                held_bytes = tracemalloc.get_traced_memory()[0] - before
                disk.gate.set()
        finally:
            tracemalloc.stop()
        everything = REPOSITORIES * CHUNKS * CHUNK
        assert 0 < stuck_bytes <= LIMIT < everything / 2
        assert b.most_bytes <= LIMIT
        # and besides: a chunk that is being put together for each request, what inflates it, and who waits
        assert held_bytes <= LIMIT + REPOSITORIES * CONNECTIONS * CHUNK // 4
        for segment in b.segments:
            assert segment.presence.present_count() == CHUNKS
            assert all(Digest.of(segment.view(n)).raw == segment.table.digest(n) for n in range(CHUNKS))


async def test_full_disk_keeps_no_more_in_memory_than_the_overflow(tmp_path: Path) -> None:
    disk = FaultyDisk()
    async with bench(tmp_path, disk) as b:
        Evictor(b.pool, overflow_bytes=16 * CHUNK)
        disk.room_bytes = 0
        most = 0

        def look(_: Segment) -> None:
            nonlocal most
            most = max(most, b.pool.overflow.bytes)

        await b.fetch_all(look)
        assert b.pool.overflow.chunks >= REPOSITORIES * CHUNKS
        assert 0 < most <= 16 * CHUNK
        assert b.most_bytes <= LIMIT
        assert all(segment.presence.present_count() == 0 for segment in b.segments)


async def test_chunks_that_a_slow_sync_has_not_covered_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the page cache, not in ours, and still: a machine must not fill up with dirty pages."""
    monkeypatch.setattr("p2pgz.pool.commit.UNSYNCED_MAX_BYTES", 32 * CHUNK)
    assert UNSYNCED_MAX_BYTES <= 256 << 20
    disk, gate = FaultyDisk(), threading.Event()
    async with bench(tmp_path, disk) as b:
        disk.before_sync = lambda: gate.wait(SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.fetch_all)
            while b.pool.stats().unsynced_bytes < 32 * CHUNK:
                await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.5)
            written = sum(segment.presence.present_count() for segment in b.segments)
            assert written * CHUNK <= 2 * 32 * CHUNK + LIMIT
            assert written < REPOSITORIES * CHUNKS
            gate.set()
        assert all(segment.presence.present_count() == CHUNKS for segment in b.segments)
