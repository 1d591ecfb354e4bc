"""Reads of what is not there yet: who is asked, how often, who waits, and what becomes of readers when things go wrong."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import trio

from tests.e2e.mount.image_on_disk import CHUNK_BYTES, ImageOnDisk, call, mounted, run

pytestmark = [pytest.mark.root, pytest.mark.trio]

PAGE_BYTES = 4096
SMALL = random.Random(2).randbytes(CHUNK_BYTES)
LARGE = random.Random(3).randbytes(40 * CHUNK_BYTES + 777)
OTHER = random.Random(4).randbytes(10 * CHUNK_BYTES)


@pytest.fixture
def image(tmp_path: Path) -> ImageOnDisk:
    image = ImageOnDisk(tmp_path / "image")
    image.add(b"small", "reg", SMALL)
    image.add(b"large", "reg", LARGE)
    image.add(b"other", "reg", OTHER)
    return image.write()


def read_direct(path: Path, size: int = PAGE_BYTES, offset: int = 0) -> bytes:
    """Read past the page cache: every call is a request to the file system."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, size)
        return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        os.close(fd)


async def test_missing_chunks_arrive_on_demand(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        assert await call((m.directory / "large").read_bytes) == LARGE
        assert await call((m.directory / "small").read_bytes) == SMALL
        asked = [n for _, first, count, _ in m.supplier.requests for n in range(first, first + count)]
        assert sorted(asked) == [*image.chunks_of(b"small"), *image.chunks_of(b"large")]
        assert m.session.stats.garbage == 0


async def test_only_the_chunks_of_a_read_are_asked_for(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        offset = 5 * CHUNK_BYTES - PAGE_BYTES
        found = await call(read_direct, m.directory / "large", 3 * CHUNK_BYTES, offset)
        assert found == LARGE[offset : offset + 3 * CHUNK_BYTES]
        first = image.chunks_of(b"large")[4]
        assert sorted(m.supplier.requests) == [
            (0, first, 1, 0),
            (0, first + 1, 3, 1),
        ]  # tasks run in any order


async def test_twenty_readers_of_one_chunk_ask_once(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.hold()
        results: list[object] = []

        async def read() -> None:
            results.append(await call(read_direct, m.directory / "small"))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
            await m.supplier.asked.wait()
            await trio.sleep(
                0.3
            )  # all of them are in the kernel by now; a slow one only makes the test weaker
            m.supplier.open.set()
        assert results == [SMALL[:PAGE_BYTES]] * 20
        assert m.supplier.requests == [(0, image.chunks_of(b"small")[0], 1, 0)]


async def test_read_ahead_that_becomes_urgent_is_asked_for_again_with_the_higher_class(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.hold()
        first = image.chunks_of(b"large")[0]
        results: list[object] = []

        async def read(size: int, offset: int) -> None:
            results.append(await call(read_direct, m.directory / "large", size, offset))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 2 * CHUNK_BYTES, 0)
            while len(m.supplier.requests) < 2:
                await trio.sleep(0.01)
            nursery.start_soon(read, PAGE_BYTES, CHUNK_BYTES)
            while len(m.supplier.requests) < 3:
                await trio.sleep(0.01)
            m.supplier.open.set()
        assert sorted(m.supplier.requests) == [(0, first, 1, 0), (0, first + 1, 1, 0), (0, first + 1, 1, 1)]
        assert sorted(results, key=len) == [
            LARGE[CHUNK_BYTES : CHUNK_BYTES + PAGE_BYTES],
            LARGE[: 2 * CHUNK_BYTES],
        ]


async def test_killed_reader_is_gone_at_once(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.hold()
        reader = await trio.lowlevel.open_process(
            ["cat", str(m.directory / "large")], stdout=subprocess.DEVNULL
        )
        await m.supplier.asked.wait()
        start = time.monotonic()
        reader.kill()
        await reader.wait()
        took = time.monotonic() - start
        print(f"killed reader gone after {took * 1000:.1f} ms")
        assert reader.returncode == -signal.SIGKILL
        assert took < 1
        m.supplier.open.set()
        assert await call((m.directory / "large").read_bytes) == LARGE


async def test_refused_read_is_an_error_once_and_works_when_asked_again(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.failing = True
        with pytest.raises(OSError) as caught:
            await call((m.directory / "large").read_bytes)
        assert caught.value.errno == errno.EIO
        assert m.session.stats.failed >= 1
        m.supplier.failing = False
        assert await call((m.directory / "large").read_bytes) == LARGE


async def test_kernel_goes_back_to_large_reads_after_an_error(image: ImageOnDisk, tmp_path: Path) -> None:
    """After EIO the kernel re-reads that range page by page, unless it is told to forget it."""
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.failing = True
        with pytest.raises(OSError, match="Input/output error"):
            await call((m.directory / "large").read_bytes)
        await trio.sleep(0.2)  # the invalidation runs in a thread of the other process
        m.supplier.failing = False
        image.supply_all()
        await m.session.ping()
        before = m.session.stats.reads
        assert await call((m.directory / "large").read_bytes) == LARGE
        await m.session.ping()
        requests = m.session.stats.reads - before
        print(f"{requests} reads for {len(LARGE) // PAGE_BYTES} pages")
        assert requests < 30  # 21 of 128 KiB; 52 without the invalidation


async def test_deadline_ends_a_read_and_the_next_one_asks_anew(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root", read_deadline_seconds=1.0) as m:
        m.supplier.hold()
        start = time.monotonic()
        with pytest.raises(OSError) as caught:
            await call((m.directory / "small").read_bytes)
        took = time.monotonic() - start
        assert caught.value.errno == errno.EIO
        assert 0.9 < took < 1.9
        with trio.fail_after(2):
            while m.supplier.cancelled != len(m.supplier.requests):
                await trio.sleep(0.01)
        assert m.session.stats.cancelled == m.supplier.cancelled
        m.supplier.open.set()
        await trio.sleep(0.6)  # the kernel's own repetitions fail at once for a moment
        assert await call((m.directory / "small").read_bytes) == SMALL


async def test_many_stuck_readers_do_not_stop_others(image: ImageOnDisk, tmp_path: Path) -> None:
    """The kernel's own limit is 12 stuck read-aheads per mount."""
    for n in image.chunks_of(b"other"):
        image.supply(n)
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.hold()
        readers = [
            await trio.lowlevel.open_process(
                [
                    "dd",
                    f"if={m.directory / 'large'}",
                    f"bs={CHUNK_BYTES}",
                    "count=1",
                    f"skip={n}",
                    "status=none",
                ],
                stdout=subprocess.DEVNULL,
            )
            for n in range(40)
        ]
        with trio.fail_after(10):
            while m.session.stats.requests < 40:
                await trio.sleep(0.01)
        start = time.monotonic()
        with trio.fail_after(5):
            assert (await run("cat", m.directory / "other")).stdout == OTHER
        print(f"other file read in {(time.monotonic() - start) * 1000:.0f} ms beside 40 stuck readers")
        m.supplier.open.set()
        for reader in readers:
            assert await reader.wait() == 0


async def test_node_that_says_present_of_an_absent_chunk_is_not_believed(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with mounted(image, tmp_path / "root", read_deadline_seconds=1.0) as m:
        calls = 0

        async def lie(*_: int) -> None:
            nonlocal calls
            calls += 1
            await trio.lowlevel.checkpoint()

        m.session._ensure = lie
        with pytest.raises(OSError) as caught:
            await call(read_direct, m.directory / "small")
        assert caught.value.errno == errno.EIO
        assert 1 < calls < 20


async def test_bug_in_the_supplier_is_an_error_for_the_reader_only(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with mounted(image, tmp_path / "root") as m:

        async def stumble(*_: int) -> None:
            await trio.lowlevel.checkpoint()
            raise ZeroDivisionError

        good, m.session._ensure = m.session._ensure, stumble
        with pytest.raises(OSError, match="Input/output error"):
            await call(read_direct, m.directory / "small")
        m.session._ensure = good
        assert await call(read_direct, m.directory / "small") == SMALL[:PAGE_BYTES]


async def test_damaged_pool_file_costs_one_read_not_the_process(image: ImageOnDisk, tmp_path: Path) -> None:
    image.supply_all()
    async with mounted(image, tmp_path / "root") as m:
        os.truncate(image.data_path, PAGE_BYTES)
        with pytest.raises(OSError) as caught:
            await call(read_direct, m.directory / "large", PAGE_BYTES, CHUNK_BYTES)
        assert caught.value.errno == errno.EIO
        assert await call(os.listdir, m.directory) != []
        with trio.fail_after(5):
            await m.session.ping()


async def test_concurrent_readers_of_random_places_get_the_right_bytes(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    async with mounted(image, tmp_path / "root") as m:

        def read(own_seed: int) -> None:
            choose = random.Random(own_seed)
            with (m.directory / "large").open("rb", buffering=0) as file:
                for _ in range(60):
                    offset, size = choose.randrange(len(LARGE)), choose.randrange(1, 200_000)
                    file.seek(offset)
                    assert file.read(size) == LARGE[offset : offset + size]

        async def reader(own_seed: int) -> None:
            await call(read, own_seed)

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(reader, seed + n)
        asked = [n for _, first, count, _ in m.supplier.requests for n in range(first, first + count)]
        urgent = [
            n
            for _, first, count, priority in m.supplier.requests
            if not priority
            for n in range(first, first + count)
        ]
        assert len(urgent) == len(set(urgent))
        assert len(asked) <= 2 * len(set(asked))
