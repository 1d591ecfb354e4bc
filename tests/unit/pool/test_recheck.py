"""What a crash has left is looked at without anybody asking for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from p2pgz.pool import recheck as module
from p2pgz.pool.pool import Pool
from p2pgz.pool.recheck import recheck
from p2pgz.testing.conformance_pool import Layer, check_content

pytestmark = pytest.mark.trio


def opened(state: Path) -> Any:
    return Pool.open(state, boot_id="boot", check_filesystem=False)


async def crashed(state: Path, *layers: Layer) -> None:
    """A pool that was filled and then killed."""
    async with opened(state) as pool:
        for layer in layers:
            segment = await pool.open_segment(layer.layout)
            await pool.add_many(segment, layer.all_verified())
    connection = apsw.Connection(str(state / "index.db"))
    connection.execute("UPDATE facts SET value = 0 WHERE name = 'clean'")
    connection.close()


async def test_what_is_right_is_present_and_what_is_not_is_gone(tmp_path: Path) -> None:
    layer = Layer.random(1)
    await crashed(tmp_path, layer)
    async with opened(tmp_path) as pool:
        segment = pool.segment(layer.toc.digest)
        os.pwrite(segment.data_fd, b"?", segment.table.segment_offset[3])
        assert await recheck(pool, tuple, lambda: False) == len(layer.chunks) - 1
        assert check_content(segment, layer) == len(layer.chunks) - 1
        assert not segment.recorded(3)
        assert not any(segment.used_at)  # nobody used them
        assert await recheck(pool, tuple, lambda: False) == 0


async def test_mounted_images_come_first_then_what_was_mounted_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [Layer.random(seed) for seed in range(4)]
    await crashed(tmp_path, *layers)
    async with opened(tmp_path) as pool:
        segments = [pool.segment(layer.toc.digest) for layer in layers]
        await pool.catalog.note_mounted([segments[2]], 2000.0)
        await pool.catalog.note_mounted([segments[0]], 1000.0)
        seen: list[int] = []
        revive = pool.revive

        async def spy(segment: Any, chunks: Any) -> Any:
            seen.append(segments.index(segment))
            return await revive(segment, chunks)

        monkeypatch.setattr(pool, "revive", spy)
        await recheck(pool, lambda: [segments[3]], lambda: False)
        assert list(dict.fromkeys(seen)) == [3, 2, 0, 1]


async def test_it_takes_its_time_and_more_while_others_are_served(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_BYTES", 50_000)
    monkeypatch.setattr(module, "BYTES_PER_SECOND", 1000)
    monkeypatch.setattr(module, "BUSY_BYTES_PER_SECOND", 100)
    layer = Layer.random(5)
    size = sum(map(len, layer.chunks))
    for busy, rate in ((False, 1000), (True, 100)):
        await crashed(tmp_path, layer)
        async with opened(tmp_path) as pool:
            begin = trio.current_time()
            await recheck(pool, tuple, lambda busy=busy: busy)  # type: ignore[misc]  # bound, since the loop goes on
            assert trio.current_time() - begin == pytest.approx(size / rate, rel=0.01)


async def test_a_reader_need_not_wait_for_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    layer = Layer.random(6)
    await crashed(tmp_path, layer)
    async with opened(tmp_path) as pool, trio.open_nursery() as nursery:
        segment = pool.segment(layer.toc.digest)
        nursery.start_soon(recheck, pool, tuple, lambda: True)
        assert await pool.revive(segment, [len(layer.chunks) - 1]) == [len(layer.chunks) - 1]
