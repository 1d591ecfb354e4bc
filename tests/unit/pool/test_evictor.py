"""A pool that has to shrink: what goes, in which order, who is asked before, and what becomes of chunks without room."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
import trio.testing

from p2pgz.core.digest import Digest
from p2pgz.errors import PoolFull, StateError
from p2pgz.pool import evictor as module
from p2pgz.pool.catalog import USER, ImageRecord
from p2pgz.pool.disk import RESERVE_BYTES
from p2pgz.pool.evictor import Evictor
from p2pgz.pool.index import Index
from p2pgz.pool.measure import allocated_bytes
from p2pgz.pool.overflow import Overflow
from p2pgz.pool.pool import Pool, Segment, SegmentMeta
from p2pgz.testing.conformance_pool import Layer, check_content
from p2pgz.testing.faulty_disk import FaultyDisk

pytestmark = pytest.mark.trio

CHUNK = 64 << 10
CHUNKS = 64
QUOTA = 1 << 20


def layer_of(seed: int, chunks: int = CHUNKS, size: int = CHUNK) -> Layer:
    rng = random.Random(seed)
    return Layer([[rng.randbytes(size)] for _ in range(chunks)])


class FakeUsers:
    """Whoever reads the files: `answers` is what becomes of a request for their word."""

    def __init__(self, *mounted: Segment) -> None:
        self.mounts: Collection[Segment] = mounted
        self.mapped = False
        self.strangers = False
        self.asked: list[tuple[str, int]] = []
        self.answers: Any = None

    def mounted(self) -> Collection[Segment]:
        return self.mounts

    def is_mapped(self, segment: Segment) -> bool:
        return self.mapped

    def may_punch(self) -> bool:
        return not self.strangers

    async def acknowledge(self, segment: Segment) -> None:
        self.asked.append((str(segment.id), segment.presence.present_count()))
        if self.answers is not None:
            await self.answers()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def pool_of(
    state: Path, disk: FaultyDisk | None = None, **options: Any
) -> AsyncIterator[tuple[Pool, Evictor, FakeUsers]]:
    """A pool and its evictor, whose task does not run: the tests say when."""
    async with Pool.open(state, boot_id="boot", disk=disk) as pool:
        users = FakeUsers()
        yield pool, Evictor(pool, users=users, **options), users


async def filled(pool: Pool, layer: Layer, **meta: Any) -> Segment:
    segment = await pool.open_segment(layer.layout, SegmentMeta(**meta))
    await pool.add_many(segment, layer.all_verified())
    await pool.flush()
    return segment


def make_old(segment: Segment, chunks: range | None = None) -> None:
    """Nobody has wanted these for a minute."""
    for n in chunks or range(segment.table.chunk_count):
        segment.used_at[n] = max(1, segment.used_at[n] - 600)


def here(segment: Segment) -> list[int]:
    return [n for n in range(segment.table.chunk_count) if segment.presence.has(n)]


async def test_quota_holds_while_more_than_it_comes_and_the_oldest_go(tmp_path: Path) -> None:
    layer = layer_of(1)
    async with pool_of(tmp_path, quota_bytes=QUOTA) as (pool, evictor, users):
        segment = await pool.open_segment(layer.layout)
        for n, chunk in layer.all_verified():
            await pool.add(segment, n, chunk)
            make_old(segment, range(n))
            assert segment.presence.has(n)
            assert evictor.used_bytes <= QUOTA
        assert allocated_bytes(pool.directory) <= QUOTA
        kept = here(segment)
        assert kept == list(range(kept[0], CHUNKS))
        assert len(kept) * CHUNK > 0.5 * QUOTA
        assert check_content(segment, layer) == len(kept)
        assert evictor.counts["evicted_chunks"] == CHUNKS - len(kept)
        assert users.asked
        assert evictor.status()["state"] == "keeping"
        await pool.flush()
    async with pool_of(tmp_path) as (pool, _, _):
        segment = pool.segment(layer.toc.digest)  # type: ignore[assignment]  # it is there
        assert here(segment) == kept


async def test_quota_holds_while_many_come_at_once(tmp_path: Path) -> None:
    layer, disk, most = layer_of(1, chunks=24, size=4 * CHUNK), WatchedDisk(), 0
    async with pool_of(tmp_path, disk, quota_bytes=QUOTA, overflow_bytes=1 << 30) as (pool, _, _):
        segment = await pool.open_segment(layer.layout)

        def measure() -> None:
            nonlocal most
            most = max(most, allocated_bytes(pool.directory))

        async def add(n: int) -> None:
            await pool.add(segment, n, layer.verified(n))
            assert segment.presence.has(n) or pool.unkept(segment, n) is not None

        disk.after_write = measure
        async with trio.open_nursery() as nursery:
            for n in range(24):
                nursery.start_soon(add, n)
        assert 0.5 * QUOTA < most <= QUOTA
        assert pool.admitted_bytes == 0


async def test_chunks_go_bit_first_and_hole_last(tmp_path: Path) -> None:
    layer, disk, order = layer_of(2), FaultyDisk(), []
    async with pool_of(tmp_path, disk) as (pool, evictor, users):
        segment = await filled(pool, layer)
        before = segment.table.segment_bytes

        async def answer() -> None:
            assert not any(segment.presence.has(n) for n in range(CHUNKS))
            assert all(segment.recorded(n) for n in range(CHUNKS))
            order.append("word")

        def punch() -> None:
            assert not any(segment.recorded(n) for n in range(CHUNKS))
            [(held,)] = pool._index.rows("SELECT held_chunks FROM segments")  # what a restart would believe
            assert held == 0
            order.append("hole")

        users.answers, disk.before_punch = answer, punch
        assert await evictor.evict(1 << 40) == CHUNKS * CHUNK
        assert order == ["word", "hole"]
        assert disk.punched == [(0, before)]
        assert evictor.used_bytes < CHUNK


async def test_reader_that_never_answers_keeps_its_chunks_and_others_are_taken(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stuck, free = layer_of(3), layer_of(4)
    async with pool_of(tmp_path) as (pool, evictor, users):
        first, second = await filled(pool, stuck), await filled(pool, free)

        async def answer() -> None:
            if users.asked[-1][0] == str(first.id):
                await trio.sleep_forever()

        users.answers = answer
        begin = trio.current_time()
        assert await evictor.evict(1 << 40) == CHUNKS * CHUNK
        assert trio.current_time() - begin <= module.ACKNOWLEDGE_SECONDS + 1
        assert check_content(first, stuck) == CHUNKS
        assert here(second) == []
        assert evictor.counts["eviction_failures"] == 1
        # it is left alone for a while, so that the next one in need of room does not wait for it again
        assert await evictor.evict(1 << 40) == 0
        assert len(users.asked) == 2
        await trio.sleep(module.ASIDE_SECONDS + 1)
        users.answers = None
        assert await evictor.evict(1 << 40) == CHUNKS * CHUNK


async def test_reader_that_breaks_while_it_is_asked_keeps_its_chunks(tmp_path: Path) -> None:
    layer = layer_of(5)
    async with pool_of(tmp_path) as (pool, evictor, users):
        segment = await filled(pool, layer)

        async def answer() -> None:
            raise StateError("its socket broke")

        users.answers = answer
        assert await evictor.evict(1 << 40) == 0
        assert check_content(segment, layer) == CHUNKS
        await pool.flush()
    async with pool_of(tmp_path) as (pool, _, _):
        segment = pool.segment(layer.toc.digest)  # type: ignore[assignment]
        assert check_content(segment, layer) == CHUNKS


async def test_nothing_is_punched_while_a_stranger_reads(tmp_path: Path) -> None:
    layer, disk = layer_of(6), FaultyDisk()
    async with pool_of(tmp_path, disk) as (pool, evictor, users):
        segment = await filled(pool, layer)
        users.strangers = True
        assert await evictor.evict(1 << 40) == 0
        assert disk.punched == []
        assert users.asked == []
        assert check_content(segment, layer) == CHUNKS


async def test_native_segment_goes_as_a_whole_into_a_new_file_and_only_unused(tmp_path: Path) -> None:
    layer, disk = layer_of(7), FaultyDisk()
    async with pool_of(tmp_path, disk) as (pool, evictor, users):
        segment = await filled(pool, layer)
        await pool.mark_native(segment)
        with segment.path.open("rb") as kernel:  # what a mount holds that does not ask us
            users.mounts = [segment]
            assert await evictor.evict(1 << 40) == 0
            users.mounts, users.mapped = [], True
            assert await evictor.evict(CHUNK) == 0
            evictor._aside.clear()
            users.mapped = False
            assert await evictor.evict(CHUNK) == CHUNKS * CHUNK
            assert disk.punched == []
            assert here(segment) == []
            assert kernel.read() == b"".join(layer.chunks)
            assert not any(segment.path.read_bytes())
            assert os.fstat(kernel.fileno()).st_ino != segment.path.stat().st_ino
        assert allocated_bytes(pool.directory) < QUOTA
        # and it is an ordinary one again
        await pool.add_many(segment, layer.all_verified())
        assert check_content(segment, layer) == CHUNKS
        make_old(segment)
        assert await evictor.evict(CHUNK) == CHUNK
        assert len(disk.punched) == 1


async def test_pinned_stays_unmounted_goes_before_mounted_and_last_copies_go_last(tmp_path: Path) -> None:
    layers = [layer_of(seed, chunks=8) for seed in range(10, 14)]
    last: list[Digest] = []

    def rarity(segment: Segment) -> Any:
        return (lambda n: 0) if segment.id in last else (lambda n: 3)

    async with pool_of(tmp_path, rarity=rarity) as (pool, evictor, users):
        pinned, mounted, only, plain = [await filled(pool, layer) for layer in layers]
        manifest = Digest.of(b"manifest")
        await pool.catalog.put_image(
            ImageRecord(manifest=manifest, reference="r", tree_path="", segments=(pinned.id,), created=0.0)
        )
        await pool.catalog.pin(manifest, "r", 0.0, owner=USER)
        users.mounts = [mounted]
        last.append(only.id)
        gone = []
        while await evictor.evict(CHUNK):
            gone += [s.id for s in (mounted, only, plain) if not here(s) and s.id not in gone]
        assert gone == [plain.id, mounted.id, only.id]
        assert check_content(pinned, layers[0]) == 8
        assert evictor.status()["pinned_bytes"] == 8 * CHUNK
        assert evictor.status()["evictable_bytes"] == 0


async def test_what_came_just_now_and_what_is_in_work_stays(tmp_path: Path) -> None:
    layer = layer_of(20, chunks=8)
    async with pool_of(tmp_path) as (pool, evictor, _):
        segment = await filled(pool, layer)
        assert await evictor.evict(1 << 40, grace_tenths=module.GRACE_TENTHS[0]) == 0
        make_old(segment, range(4))
        await segment.claim([1])
        assert await evictor.evict(1 << 40, grace_tenths=module.GRACE_TENTHS[0]) == 3 * CHUNK
        assert here(segment) == [1, 4, 5, 6, 7]
        segment.release([1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_without_anything_to_evict_chunks_are_served_and_not_kept_until_there_is_room(
    tmp_path: Path, code: int
) -> None:
    layer, disk = layer_of(21), FaultyDisk(room_bytes=10 * CHUNK)
    disk.errno = code
    async with pool_of(tmp_path, disk, overflow_bytes=4 * CHUNK) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        for n, chunk in layer.all_verified():
            await pool.add(segment, n, chunk)
            if segment.presence.has(n):
                continue
            assert pool.unkept(segment, n) == chunk
            assert not evictor.keeps
        # the ring is bounded: the oldest are forgotten
        assert pool.overflow.bytes == 4 * CHUNK
        waiting = [n for n in range(CHUNKS) if pool.unkept(segment, n) is not None]
        assert waiting == list(range(CHUNKS - 4, CHUNKS))
        status = evictor.status()
        assert (status["state"], status["full_periods"], status["unkept_bytes_now"]) == ("full", 1, 4 * CHUNK)
        assert status["unkept_chunks"] == CHUNKS - len(here(segment))
        kept = here(segment)
        assert check_content(segment, layer) == len(kept)
        await evictor._look()
        assert not evictor.keeps  # still full: the disk was asked
        disk.room_bytes = None
        await evictor._look()
        assert evictor.keeps
        # what still waited in memory is on the disk now
        assert here(segment) == sorted(kept + waiting)
        assert len(pool.overflow) == pool.overflow.bytes == 0
        assert check_content(segment, layer) == len(kept) + 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_full_disk_and_exceeded_quota_of_the_system_evict_first(tmp_path: Path, code: int) -> None:
    """A disk of 12 chunks that gives back what is punched; readers want 64."""
    layer, disk = layer_of(22), SmallDisk(12 * CHUNK, code)
    async with pool_of(tmp_path, disk) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        for n, chunk in layer.all_verified():
            await pool.add(segment, n, chunk)
            assert segment.presence.has(n)
            make_old(segment, range(n + 1))
        assert evictor.keeps
        assert evictor.counts["evicted_chunks"] == CHUNKS - len(here(segment))
        assert pool.stats().full_errors > 0
        assert pool.overflow.chunks == 0
        check_content(segment, layer)


class WatchedDisk(FaultyDisk):
    """Says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.after_write: Any = lambda: None

    def pwrite(self, fd: int, data: Any, offset: int) -> None:
        super().pwrite(fd, data, offset)
        self.after_write()


class SmallDisk(FaultyDisk):
    """A disk, or a project's quota on one, of this size."""

    def __init__(self, size_bytes: int, code: int) -> None:
        super().__init__()
        self.left_bytes = size_bytes
        self.code = code

    def pwrite(self, fd: int, data: Any, offset: int) -> None:
        size = memoryview(data).nbytes
        if size > self.left_bytes:
            raise OSError(self.code, os.strerror(self.code))
        self.left_bytes -= size
        super().pwrite(fd, data, offset)

    def punch(self, fd: int, offset: int, count: int) -> None:
        self.left_bytes += count
        super().punch(fd, offset, count)


async def test_index_without_room_does_not_end_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks stay readable and are recorded later; eviction frees first and says so then."""
    layer = layer_of(23)
    async with pool_of(tmp_path) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        write, full = pool._index.write, True

        async def no_room(change: Any, *, durable: bool = False, **_: Any) -> Any:
            if full:
                await trio.lowlevel.checkpoint()
                raise PoolFull("the index cannot grow")
            return await write(change, durable=durable)

        monkeypatch.setattr(pool._index, "write", no_room)
        with pytest.raises(PoolFull):
            await pool.flush()
        assert check_content(segment, layer) == CHUNKS
        full = False
        await pool.flush()
        assert pool.stats().chunks == CHUNKS
        attempts = 0

        async def no_room_at_first(change: Any, *, durable: bool = False, **_: Any) -> Any:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                await trio.lowlevel.checkpoint()
                raise PoolFull("the index cannot grow")
            return await write(change, durable=durable)

        monkeypatch.setattr(pool._index, "write", no_room_at_first)
        assert await evictor.evict(1 << 40) == CHUNKS * CHUNK
        assert attempts == 2
        assert allocated_bytes(pool.directory) < CHUNK
    async with pool_of(tmp_path) as (pool, _, _):
        assert pool.stats().chunks == 0


async def test_space_of_pages_that_two_chunks_share_comes_back(tmp_path: Path) -> None:
    """Chunks of odd sizes, taken one by one: without care each pair would leave its common page behind."""
    rng = random.Random(24)
    layer = Layer([[rng.randbytes(5000) for _ in range(60)], [rng.randbytes(300) for _ in range(40)]])
    async with pool_of(tmp_path) as (pool, _, _):
        segment = await filled(pool, layer)
        order = list(range(100))
        rng.shuffle(order)
        for n in order:
            await pool.remove_chunks(segment, [n], trio.lowlevel.checkpoint)
            check_content(segment, layer)
        assert segment.path.stat().st_blocks == 0
        # and what is written beside a removal is not hit by it
        await pool.add_many(segment, layer.all_verified())
        async with trio.open_nursery() as nursery:
            for n in range(0, 100, 2):
                nursery.start_soon(pool.remove_chunks, segment, [n], trio.lowlevel.checkpoint)
            await trio.lowlevel.checkpoint()
            for n in range(0, 100, 4):
                nursery.start_soon(pool.add, segment, n, layer.verified(n))
        assert check_content(segment, layer) >= 50


async def test_evictor_runs_by_itself_when_the_floor_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, free = layer_of(25), 1 << 40
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        found = list(real(path))
        found[4] = free // found[1]  # f_bavail, f_frsize
        return os.statvfs_result(found)

    monkeypatch.setattr(module.os, "statvfs", statvfs)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    async with pool_of(tmp_path, free_floor_bytes=1 << 30) as (pool, evictor, _):
        segment = await filled(pool, layer)
        make_old(segment)
        await evictor._look()
        assert len(here(segment)) == CHUNKS
        async with trio.open_nursery() as nursery:
            nursery.start_soon(evictor.run)
            free = (1 << 30) - 10 * CHUNK  # somebody else fills the disk; nothing that we punch changes that
            with trio.fail_after(10):
                while evictor.keeps:
                    await trio.sleep(0.05)
            assert here(segment) == []
            assert not pool.has_slack
            free = 1 << 40
            with trio.fail_after(10):
                while not evictor.keeps:
                    await trio.sleep(0.05)
            await pool.add_many(segment, layer.all_verified())
            assert len(here(segment)) == CHUNKS
            nursery.cancel_scope.cancel()


async def test_overflow_never_exceeds_its_limit_but_for_one_large_chunk(tmp_path: Path) -> None:
    layer = Layer([[b"a" * 1000], [b"b" * 1000], [b"c" * 5000], [b"d" * 10]])
    async with pool_of(tmp_path) as (pool, _, _):
        segment = await pool.open_segment(layer.layout)
        other = await pool.open_segment(layer_of(1).layout)
    ring = Overflow(2500)
    assert ring.put(segment, 0, layer.verified(0))
    assert ring.put(segment, 0, layer.verified(0))
    assert (ring.bytes, len(ring), ring.chunks) == (1000, 1, 2)
    assert ring.put(segment, 1, layer.verified(1))
    assert ring.put(segment, 2, layer.verified(2))
    assert (ring.bytes, len(ring)) == (5000, 1)
    assert ring.put(segment, 3, layer.verified(3))
    assert (ring.bytes, len(ring)) == (10, 1)
    assert ring.get(segment, 0) is None
    other.row = segment.row  # another segment in the place of the first
    assert ring.get(other, 3) is None
    ring.drop(segment, 3)
    assert (ring.bytes, ring.oldest()) == (0, None)
    assert ring.put(segment, 0, layer.verified(0))
    ring.drop_all(other)
    assert ring.bytes == 1000
    ring.drop_all(segment)
    assert ring.bytes == len(ring) == 0
    assert not Overflow(0).put(segment, 0, layer.verified(0))


async def test_what_waits_in_memory_at_the_edge_of_the_quota_is_written_or_forgotten_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping begins again with room for some of it: the rest must not stay until the node ends."""
    layer = layer_of(33)
    async with pool_of(tmp_path, quota_bytes=QUOTA) as (pool, evictor, users):
        segment = await pool.open_segment(layer.layout)
        users.strangers = True  # nothing may be evicted for now
        for n in range(32):
            await pool.add(segment, n, layer.verified(n))
        assert not evictor.keeps
        waiting = len(pool.overflow)
        assert waiting >= 16
        users.strangers = False
        evictor._aside.clear()  # it would try that segment again in half a minute
        await evictor._look()
        assert evictor.keeps
        assert len(pool.overflow) == waiting  # there was room for less than a chunk
        assert await evictor.evict(4 * CHUNK)
        await evictor._look()
        assert 0 < len(pool.overflow) < waiting
        while len(pool.overflow):
            assert await evictor.evict(4 * CHUNK)
            await evictor._look()
        assert pool.overflow.bytes == 0
        assert evictor.used_bytes <= QUOTA
        assert check_content(segment, layer) == len(here(segment)) > 8


class QuotaDisk(FaultyDisk):
    """Of whose limit only its refusals tell, and that is given back what is punched."""

    def punch(self, fd: int, offset: int, count: int) -> None:
        super().punch(fd, offset, count)
        if self.room_bytes is not None:
            self.room_bytes += count


async def test_disk_that_has_room_and_refuses_is_given_some_back(tmp_path: Path) -> None:
    layer, disk = layer_of(35), QuotaDisk(room_bytes=10 * CHUNK)
    disk.errno = errno.EDQUOT
    async with pool_of(tmp_path, disk) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        for n in range(12):
            await pool.add(segment, n, layer.verified(n))
        assert (evictor.keeps, len(pool.overflow) > 0) == (False, True)
        make_old(segment)
        await evictor._look()
        assert not evictor.keeps
        assert not here(segment)
        await evictor._look()
        assert evictor.keeps
        assert pool.overflow.bytes == 0
        await pool.add(segment, 20, layer.verified(20))
        assert segment.presence.has(20)
        assert check_content(segment, layer) == len(here(segment))


async def test_freeing_room_that_takes_some_gets_it_from_the_reserve(tmp_path: Path) -> None:
    layer, disk = layer_of(37), FaultyDisk()
    async with pool_of(tmp_path, disk) as (pool, _, _):
        segment = await filled(pool, layer)
        reserve = tmp_path / "index.reserve"

        def refuse() -> None:
            if reserve.exists():
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        disk.before_punch = refuse
        before = allocated_bytes(pool.directory)
        await pool.remove_chunks(segment, range(CHUNKS), trio.lowlevel.checkpoint)
        assert allocated_bytes(pool.directory) <= before - CHUNKS * CHUNK
        assert reserve.stat().st_size == RESERVE_BYTES  # there is room for it again


async def test_node_that_starts_on_a_full_disk_gives_the_reserve_up_for_its_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def full_but_for_the_reserve(fd: int, offset: int, count: int) -> None:
        if count < RESERVE_BYTES:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        allocate(fd, offset, count)

    async with pool_of(tmp_path) as (pool, _, _):
        assert not pool.lacks_reserve
    monkeypatch.setattr(os, "posix_fallocate", full_but_for_the_reserve)
    async with pool_of(tmp_path) as (pool, evictor, _):
        assert pool.lacks_reserve
        assert not (tmp_path / "index.reserve").exists()
        assert not (tmp_path / "room.tmp").exists()
        await evictor._look()
        assert not pool.lacks_reserve


async def test_nothing_is_kept_while_the_index_has_no_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(36)
    async with pool_of(tmp_path) as (pool, evictor, _):
        segment = await filled(pool, layer)
        make_old(segment)
        reserve = pool._index._reserve
        assert reserve is not None
        assert not pool.lacks_reserve
        reserve.release()
        assert pool.lacks_reserve
        await pool.remove_chunks(segment, [0, 1], trio.lowlevel.checkpoint)  # which reserves again
        assert not pool.lacks_reserve
        monkeypatch.setattr(type(reserve), "fill", lambda _: None)
        reserve.release()
        await pool.add(segment, 0, layer.verified(0))
        assert pool.unkept(segment, 0) is not None
        await evictor._look()
        assert len(here(segment)) == 0  # whatever is freed is the index's
        monkeypatch.undo()
        await evictor._look()
        assert not pool.lacks_reserve
        await evictor._look()
        await pool.add(segment, 1, layer.verified(1))
        assert {0, 1} <= set(here(segment))


async def test_what_waits_in_memory_and_is_not_asked_for_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNKEPT_UNUSED_SECONDS", 0)
    layer, disk = layer_of(34), FaultyDisk()
    async with pool_of(tmp_path, disk) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        disk.room_bytes = 0
        for n in range(4):
            await pool.add(segment, n, layer.verified(n))
        await evictor._look()
        assert len(pool.overflow) == 4  # it has only just come
        wanted = pool.unkept(segment, 2)
        assert wanted is not None
        await evictor._look()
        assert pool.overflow.oldest() == (segment, 2, wanted)
        assert pool.overflow.bytes == CHUNK
        await evictor._look()
        assert pool.overflow.bytes == len(pool.overflow) == 0


async def test_room_that_the_index_gave_up_is_taken_back_in_part_and_before_chunks_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, disk, room = layer_of(26), FaultyDisk(room_bytes=10 * CHUNK), 5 << 20
    allocate = os.posix_fallocate

    def limited(fd: int, offset: int, count: int) -> None:
        if count > room:
            allocate(fd, offset, room)  # a real one may have found a part as well
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, count)

    reserve = tmp_path / "index.reserve"
    async with pool_of(tmp_path, disk) as (pool, evictor, _):
        assert reserve.stat().st_size == RESERVE_BYTES
        segment = await pool.open_segment(layer.layout)
        for n, chunk in layer.all_verified():
            await pool.add(segment, n, chunk)
        assert not evictor.keeps
        reserve.unlink()  # as a write does that finds no room
        monkeypatch.setattr(os, "posix_fallocate", limited)
        await evictor._look()
        assert reserve.stat().st_size == RESERVE_BYTES // 2
        room = 1000
        await evictor._look()
        assert reserve.stat().st_size == RESERVE_BYTES // 2
        reserve.unlink()
        await evictor._look()
        assert not reserve.exists()
        room = 1 << 30
        disk.room_bytes = None
        await evictor._look()
        assert evictor.keeps
        assert reserve.stat().st_size == RESERVE_BYTES


async def test_documents_are_no_reason_to_give_up_the_reserve(tmp_path: Path) -> None:
    async with Pool.open(tmp_path, boot_id="boot") as pool:
        document = random.Random(27).randbytes(1 << 20)
        pages = pool._index.rows("PRAGMA page_count")[0][0]
        pool._index._writer.pragma("max_page_count", pages + 4)  # that is SQLite's own full disk
        with pytest.raises(PoolFull):
            await pool.put_object(Digest.of(document), document)
        assert (tmp_path / "index.reserve").exists()
        assert await pool.get_object(Digest.of(document)) is None
        with pytest.raises(PoolFull):  # in the midst of a change, and SQLite has rolled it back by itself
            await pool.set_facts({"x": "x" * 1_000_000})
        assert not (tmp_path / "index.reserve").exists()
        await pool.set_facts({"y": 1})
        assert (pool.fact("x"), pool.fact("y")) == (None, 1)


async def test_node_that_was_killed_starts_on_a_full_disk_and_believes_no_bitmap_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, unseen = layer_of(28), layer_of(29)
    async with pool_of(tmp_path) as (pool, _, _):
        for layer in (seen, unseen):
            await filled(pool, layer)
    index = apsw.Connection(str(tmp_path / "index.db"))
    index.execute("UPDATE facts SET value = 0 WHERE name = 'clean'")  # as while a node runs
    index.close()
    write, full = Index._write, True

    async def no_room(self: Index, change: Any, **options: bool) -> Any:
        if full:
            await trio.lowlevel.checkpoint()
            raise PoolFull("the index cannot grow")
        return await write(self, change, **options)

    monkeypatch.setattr(Index, "_write", no_room)
    async with pool_of(tmp_path) as (pool, _, _):
        segment = pool.segment(seen.toc.digest)
        assert segment is not None
        assert here(segment) == []
        assert len(await pool.revive(segment, range(CHUNKS))) == CHUNKS
        assert check_content(segment, seen) == CHUNKS
        full = False
    async with pool_of(tmp_path) as (pool, _, _):  # that was a clean stop, but nobody had looked at this one
        assert len(here(pool.segment(seen.toc.digest))) == CHUNKS  # type: ignore[arg-type]
        assert here(pool.segment(unseen.toc.digest)) == []  # type: ignore[arg-type]
    full = True
    with pytest.raises(PoolFull):  # the flag of a clean stop has to be taken down first
        async with pool_of(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
async def test_disk_that_refuses_writes_costs_no_reader_anything_and_is_tried_again(
    tmp_path: Path, code: int
) -> None:
    layer, disk = layer_of(30, chunks=8), FaultyDisk()
    disk.errno = code
    async with pool_of(tmp_path, disk) as (pool, evictor, _):
        segment = await pool.open_segment(layer.layout)
        disk.room_bytes = 0
        for n, chunk in layer.all_verified():
            await pool.add(segment, n, chunk)
            assert pool.unkept(segment, n) == chunk
        status = evictor.status()
        assert status["state"] == "failing"
        assert os.strerror(code) in status["error"]
        assert not pool.keeps
        assert not pool.has_slack
        with pytest.raises(StateError):
            await evictor._look()
        disk.room_bytes = None
        await evictor._look()  # nobody reads: it finds out by itself
        assert (evictor.status()["state"], evictor.status()["error"]) == ("keeping", "")
        assert len(here(segment)) == 1
        await pool.add_many(segment, layer.all_verified())
        assert check_content(segment, layer) == 8
        assert len(pool.overflow) == 0


async def test_what_a_failing_index_could_not_record_is_recorded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(31, chunks=8)
    async with pool_of(tmp_path) as (pool, _, _):
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        write, failing = Index._write, True

        async def fail(self: Index, change: Any, **options: bool) -> Any:
            if failing:
                await trio.lowlevel.checkpoint()
                raise StateError("the index cannot be used: disk I/O error")
            return await write(self, change, **options)

        monkeypatch.setattr(Index, "_write", fail)
        with pytest.raises(StateError):
            await pool.flush()
        failing = False
        await pool.flush()
        assert pool.stats().chunks == 8
    async with pool_of(tmp_path) as (pool, _, _):
        assert len(here(pool.segment(layer.toc.digest))) == 8  # type: ignore[arg-type]
