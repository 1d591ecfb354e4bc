"""What disks, crashes and other processes do to a pool: nothing but chunks may be lost, and no wrong byte is shown."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
import trio

from p2pgz.core.content import content_key
from p2pgz.core.digest import Digest
from p2pgz.errors import ChunkMissing, PoolFull, StateError, StateInUse
from p2pgz.pool.disk import Disk, Reserve, locked, refuse_unfit_file_system
from p2pgz.pool.pool import Pool, SegmentMeta
from p2pgz.testing.conformance_pool import Layer, check_content
from p2pgz.testing.faulty_disk import FaultyDisk

pytestmark = pytest.mark.trio


def opened(state, **options):
    return Pool.open(state, boot_id="boot", **options)


def crash(state):
    """Make a cleanly stopped state look as after kill -9: the flag is down, as it is while a node runs."""
    connection = apsw.Connection(str(state / "index.db"))
    connection.execute("UPDATE facts SET value = 0 WHERE name = 'clean'")
    connection.close()


async def fill(state, layer, meta=None):
    async with opened(state) as pool:
        segment = await pool.open_segment(layer.layout, meta or SegmentMeta())
        await pool.add_many(segment, layer.all_verified())
        return segment.path, segment.table_path


async def done():
    pass


async def test_a_clean_stop_keeps_everything_verified(tmp_path):
    layer = Layer.random(1)
    await fill(tmp_path, layer)
    async with opened(tmp_path) as pool:
        segment = pool.segment(layer.toc.digest)
        assert check_content(segment, layer) == len(layer.chunks)
        assert set(pool.lookup_files("shared", layer.file_keys())) == set(layer.file_keys())
        assert segment.file_of(0) == layer.layout.extents[0]
        assert pool.stats().revived_chunks == 0


async def test_after_a_crash_chunks_are_hashed_before_use(tmp_path):
    layer = Layer.random(2)
    path, _ = await fill(tmp_path, layer)
    crash(tmp_path)
    everything = range(len(layer.chunks))
    async with opened(tmp_path) as pool:
        segment = pool.segment(layer.toc.digest)
        assert segment.presence.present_count() == 0
        assert all(segment.recorded(n) for n in everything)
        with path.open("r+b") as file:
            file.seek(segment.table.segment_offset[3])
            file.write(b"\x00" if layer.chunks[3][0] else b"\x01")
        assert not (tmp_path / "index.db.damaged").exists()
        alive = await pool.revive(segment, everything)
        assert alive == [n for n in everything if n != 3]
        assert not segment.recorded(3)
        assert check_content(segment, layer) == len(layer.chunks) - 1
        assert pool.find("shared", hashlib.sha256(layer.chunks[3]).digest()) is None
        await pool.add(segment, 3, layer.verified(3))
        assert check_content(segment, layer) == len(layer.chunks)


async def test_what_was_not_revived_is_not_verified_after_the_next_clean_stop(tmp_path):
    layer = Layer.random(3)
    await fill(tmp_path, layer)
    crash(tmp_path)
    async with opened(tmp_path) as pool:
        await pool.revive(pool.segment(layer.toc.digest), [0, 1])
    async with opened(tmp_path) as pool:
        segment = pool.segment(layer.toc.digest)
        assert check_content(segment, layer) == 2
        assert len(await pool.revive(segment, range(len(layer.chunks)))) == len(layer.chunks) - 2


async def test_segments_that_nobody_opened_survive_a_clean_run_but_not_a_crash(tmp_path):
    layer = Layer.random(4)
    await fill(tmp_path, layer)
    async with opened(tmp_path):
        pass
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)
    crash(tmp_path)
    async with opened(tmp_path):
        pass
    async with opened(tmp_path) as pool:
        assert pool.segment(layer.toc.digest).presence.present_count() == 0


async def test_a_file_changed_between_clean_runs_is_hashed_again(tmp_path):
    layer = Layer.random(5)
    path, _ = await fill(tmp_path, layer)
    os.utime(path)
    async with opened(tmp_path) as pool:
        assert pool.segment(layer.toc.digest).presence.present_count() == 0


async def test_a_truncated_segment_file_loses_its_end_only(tmp_path):
    layer = Layer.random(6)
    path, _ = await fill(tmp_path, layer)
    os.truncate(path, 30_000)
    async with opened(tmp_path) as pool:
        segment = pool.segment(layer.toc.digest)
        alive = await pool.revive(segment, range(len(layer.chunks)))
        offset, size = segment.table.segment_offset, segment.table.size
        assert alive == [n for n in range(len(layer.chunks)) if offset[n] + size[n] <= 30_000]
        await pool.add_many(segment, layer.all_verified())
        assert check_content(segment, layer) == len(layer.chunks)
        os.truncate(path, 30_000)
        with pytest.raises(ChunkMissing):
            check_content(segment, layer)


async def test_a_missing_segment_file_is_made_again(tmp_path):
    layer = Layer.random(7)
    path, _ = await fill(tmp_path, layer)
    path.unlink()
    async with opened(tmp_path) as pool:
        assert pool.segment(layer.toc.digest) is None
        assert pool.find("shared", hashlib.sha256(layer.chunks[0]).digest()) is None
        segment = await pool.open_segment(layer.layout)
        assert await pool.revive(segment, range(len(layer.chunks))) == []
        await pool.add_many(segment, layer.all_verified())
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone"])
async def test_a_damaged_table_is_made_again_and_the_bytes_kept(tmp_path, damage):
    layer = Layer.random(8)
    _, table_path = await fill(tmp_path, layer)
    content = table_path.read_bytes()
    if damage == "gone":
        table_path.unlink()
    else:
        flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        table_path.write_bytes({"cut": content[:-5], "empty": b"", "flipped": flipped}[damage])
    async with opened(tmp_path) as pool:
        assert pool.segment(layer.toc.digest) is None
        segment = await pool.open_segment(layer.layout)
        assert segment.presence.present_count() == 0
        assert len(await pool.revive(segment, range(len(layer.chunks)))) == len(layer.chunks)
        assert check_content(segment, layer) == len(layer.chunks)
    assert table_path.read_bytes() == content


async def test_another_layout_version_starts_an_empty_file(tmp_path):
    layer = Layer.random(9)
    path, table_path = await fill(tmp_path, layer)
    content = table_path.read_bytes()
    table_path.write_bytes(content[:7] + b"\x7f" + content[8:])
    async with opened(tmp_path) as pool:
        segment = await pool.open_segment(layer.layout)
        assert await pool.revive(segment, range(len(layer.chunks))) == []
        assert not any(path.read_bytes())


@pytest.mark.parametrize("how", ["gone", "garbage", "cut", "zeroed page"])
async def test_a_lost_index_is_begun_anew_and_the_files_adopted(tmp_path, how):
    layer = Layer.random(10)
    secret = Layer.random(11)
    await fill(tmp_path, layer)
    await fill(tmp_path, secret, SegmentMeta(domain="secret"))
    path = tmp_path / "index.db"
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "zeroed page":
        crash(tmp_path)
        content = path.read_bytes()
        path.write_bytes(content[:8192] + bytes(4096) + content[12288:])
    else:
        path.write_bytes(b"garbage" * 1000 if how == "garbage" else content[:5000])
    async with opened(tmp_path) as pool:
        assert len(pool.orphans()) == 4
        segment = await pool.open_segment(layer.layout)
        assert segment.presence.present_count() == 0
        assert len(await pool.revive(segment, range(len(layer.chunks)))) == len(layer.chunks)
        await pool.flush()
        assert set(pool.lookup_files("shared", layer.file_keys())) == set(layer.file_keys())
        hidden = await pool.open_segment(secret.layout, SegmentMeta(domain="secret"))
        assert len(await pool.revive(hidden, range(len(secret.chunks)))) == len(secret.chunks)
        assert pool.orphans() == {}
    assert (tmp_path / "index.db.damaged").exists() == (how != "gone")
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)


async def test_orphans_can_be_deleted_and_a_bad_table_of_one_is_not_trusted(tmp_path):
    layer, other = Layer.random(18), Layer.random(19)
    _, table_path = await fill(tmp_path, layer)
    path, _ = await fill(tmp_path, other)
    (tmp_path / "index.db").unlink()
    content = bytearray(table_path.read_bytes())
    content[200] ^= 0x40
    table_path.write_bytes(content)
    (tmp_path / "pool" / "half.seg.tmp").write_bytes(b"x")
    async with opened(tmp_path) as pool:
        segment = await pool.open_segment(layer.layout)
        assert len(await pool.revive(segment, range(len(layer.chunks)))) == len(layer.chunks)
        assert check_content(segment, layer) == len(layer.chunks)
        assert await pool.remove_orphans() > 0
        assert not path.exists()
        assert not (tmp_path / "pool" / "half.seg.tmp").exists()
        with pytest.raises(StateError):
            await pool.open_segment(b"garbage")


async def test_an_index_of_a_newer_version_is_left_alone(tmp_path):
    async with opened(tmp_path):
        pass
    connection = apsw.Connection(str(tmp_path / "index.db"))
    connection.pragma("user_version", 99)
    connection.close()
    before = (tmp_path / "index.db").read_bytes()
    with pytest.raises(StateError, match="newer p2pgz"):
        async with opened(tmp_path):
            pass
    assert (tmp_path / "index.db").read_bytes() == before


async def test_a_second_node_is_refused_and_told_who_holds_it(tmp_path):
    async with opened(tmp_path):
        with pytest.raises(StateError, match=f"process {os.getpid()}"):
            async with opened(tmp_path):
                pass
    async with opened(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
async def test_tmpfs_is_refused_unless_told_otherwise():
    state = Path(f"/dev/shm/p2pgz-test-{os.getpid()}")
    try:
        with pytest.raises(StateError, match="tmpfs"):
            async with opened(state):
                pass
        async with opened(state, check_filesystem=False):
            pass
    finally:
        subprocess.run(["rm", "-r", state], check=True)


@pytest.mark.parametrize(
    ("magic", "name"), [(0x6969, "NFS"), (0x0BD00BD0, "Lustre"), (0xFF534D42, "SMB"), (0x01021997, "9p")]
)
async def test_network_file_systems_are_refused_by_their_kind(tmp_path, monkeypatch, magic, name):
    """statfs(2) is asked on a local one here; what it says is the only thing that is looked at."""
    monkeypatch.setattr("p2pgz.pool.disk.file_system_type", lambda _: magic)
    with pytest.raises(StateError, match=f"is on {name}"):
        async with opened(tmp_path / "state"):
            pass
    assert list((tmp_path / "state").iterdir()) == []


async def test_a_directory_that_others_may_write_is_taken_from_them(tmp_path):
    state = tmp_path / "state"
    async with opened(state):
        pass
    state.chmod(0o777)
    (state / "pool").chmod(0o770)
    async with opened(state):
        assert (state.stat().st_mode & 0o777, (state / "pool").stat().st_mode & 0o777) == (0o755, 0o750)


async def test_a_place_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        async with opened(blocker / "state"):
            pass


async def test_the_bodys_own_error_leaves_unwrapped_and_the_stop_is_clean(tmp_path):
    layer = Layer.random(12)
    with pytest.raises(KeyError):  # noqa: PT012  # the error has to come from inside
        async with opened(tmp_path) as pool:
            segment = await pool.open_segment(layer.layout)
            await pool.add_many(segment, layer.all_verified())
            raise KeyError("bug")
    with trio.CancelScope() as scope:
        async with opened(tmp_path) as pool:
            assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)
            scope.cancel()
            await trio.sleep_forever()
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)
    with pytest.raises(StateError, match="closed"):
        await pool.open_segment(layer.layout)


async def test_readers_of_segments_need_no_database():
    code = "import sys, p2pgz.pool.segment; sys.exit('apsw' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_it_looks_like_a_cache_to_backups(tmp_path):
    async with opened(tmp_path) as pool:
        tag = (pool.directory / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert (tmp_path / "index.db").stat().st_mode & 0o777 == 0o600


async def test_a_failed_sync_makes_its_batch_absent_whatever_the_next_one_says(tmp_path):
    layer, disk = Layer.random(13), FaultyDisk()
    async with opened(tmp_path, disk=disk) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified()[:4])
        await pool.flush()
        disk.fail_syncs = 1
        await pool.add_many(segment, layer.all_verified()[4:9])
        await pool.flush()
        assert pool.stats().sync_failures == 1
        assert [n for n in range(len(layer.chunks)) if segment.presence.has(n)] == [0, 1, 2, 3]
        await pool.flush()
        assert pool.find("shared", segment.table.digest(5)) is None
        await pool.add_many(segment, layer.all_verified()[4:6])
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == 6


async def test_what_is_written_while_a_sync_fails_is_not_trusted(tmp_path):
    layer, disk = Layer.random(14), FaultyDisk(fail_syncs=1)
    async with opened(tmp_path, disk=disk) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add(segment, 0, layer.verified(0))
        disk.before_sync = lambda: trio.from_thread.run(pool.add, segment, 1, layer.verified(1))
        await pool.flush()
        disk.before_sync = lambda: None
        assert segment.presence.present_count() == 0
        assert pool.stats().unsynced_bytes == 0


async def test_a_full_disk_keeps_what_fits_and_says_so(tmp_path):
    layer, disk = Layer.random(15), FaultyDisk(room_bytes=50_000)
    async with opened(tmp_path, disk=disk) as pool:
        segment = await pool.open_segment(layer.layout)
        with pytest.raises(PoolFull, match="No space"):
            await pool.add_many(segment, layer.all_verified())
        kept = check_content(segment, layer)
        assert 0 < kept < len(layer.chunks)
        assert pool.stats().full_errors == 1
        disk.room_bytes = None
        await pool.add_many(segment, layer.all_verified())
        assert check_content(segment, layer) == len(layer.chunks)
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)


async def test_a_file_size_limit_is_a_full_pool(tmp_path):
    layer = Layer([[b"x" * 3_000_000]])
    async with opened(tmp_path) as pool:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            with pytest.raises(PoolFull, match="cannot be made"):
                await pool.open_segment(layer.layout)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        assert check_content(segment, layer) == 1


async def test_an_index_that_may_not_grow_is_full_and_not_broken(tmp_path):
    """SQLite takes a used-up quota (here: a limit on file sizes) for a broken disk; what is reserved helps against both."""
    async with opened(tmp_path) as pool:
        log = tmp_path / "index.db-wal"
        await pool.set_facts({"a": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 4096, limits[1]))
        try:
            with pytest.raises(PoolFull):
                await pool.set_facts({f"name {n}": "value" * 100 for n in range(100)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "index.reserve").exists()  # it was tried with the room that is reserved
        await pool.set_facts({"a": 2})
        assert pool.fact("a") == 2
        assert pool.fact("name 1") is None


async def test_changes_that_needed_the_reserve_are_counted_once(tmp_path, monkeypatch):
    layer = Layer.random(31)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    released = []

    def release(_):
        released.append(True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return True

    monkeypatch.setattr(Reserve, "release", release)
    async with opened(tmp_path) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        for change, held in (
            (pool.flush, sum(map(len, layer.chunks))),
            (lambda: pool.remove_chunks(segment, range(len(layer.chunks)), done), 0),
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
            try:
                await change()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert pool.stats().bytes == segment.held_bytes == held
        assert len(released) == 2


async def test_a_state_directory_without_a_free_byte_can_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    async with opened(tmp_path):
        pass
    monkeypatch.setattr(os, "ftruncate", refuse)
    with locked(tmp_path / "lock"), pytest.raises(StateInUse), locked(tmp_path / "lock"):
        pass
    monkeypatch.setattr(Disk, "create", refuse)
    refuse_unfit_file_system(Path("/var/tmp"))


@pytest.mark.root
async def test_a_really_full_file_system_keeps_what_fits(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    image, directory = tmp_path / "image", tmp_path / "mounted"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, directory], check=False).returncode != 0:
        pytest.skip("no loop device")
    layer = Layer.random(17, files=40, chunk_max_bytes=300_000)
    try:
        async with opened(directory / "state") as pool:
            segment = await pool.open_segment(layer.layout)
            for n, chunk in layer.all_verified():
                try:
                    await pool.add(segment, n, chunk)
                except PoolFull:
                    break
            kept = check_content(segment, layer)
            assert 0 < kept < len(layer.chunks)
        async with opened(directory / "state") as pool:
            segment = pool.segment(layer.toc.digest)
            await pool.revive(segment, range(len(layer.chunks)))
            check_content(segment, layer)
            present = [n for n in range(len(layer.chunks)) if segment.presence.has(n)]
            await pool.remove_chunks(segment, present[: len(present) // 2], done)
            left = len(present) - len(present) // 2
            assert check_content(segment, layer) == left
            await pool.add(segment, present[0], layer.verified(present[0]))
            assert (directory / "state" / "index.reserve").exists()
        async with opened(directory / "state") as pool:
            assert check_content(pool.segment(layer.toc.digest), layer) == left + 1
    finally:
        subprocess.run(["umount", "-l", directory], check=True)  # `segment` still maps a file


async def test_a_removal_waits_for_writers_and_holds_back_new_ones(tmp_path):
    layer, disk = Layer.random(16), FaultyDisk()
    async with opened(tmp_path, disk=disk) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        acknowledged, order = trio.Event(), []

        async def acknowledge():
            order.append("bits cleared")
            await acknowledged.wait()

        async def add_again():
            await pool.add(segment, 2, layer.verified(2))
            order.append("added")

        def before_punch():
            connection = apsw.Connection(str(tmp_path / "index.db"))
            rows = list(connection.execute("SELECT count(*) FROM chunks WHERE n = 2"))
            connection.close()
            order.append(("punch", rows[0][0], segment.presence.has(2)))

        disk.before_punch = before_punch
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.remove_chunks, segment, [2], acknowledge)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(add_again)
            await trio.testing.wait_all_tasks_blocked()
            acknowledged.set()
        assert order == ["bits cleared", ("punch", 0, False), "added"]
        assert check_content(segment, layer) == len(layer.chunks)
    async with opened(tmp_path) as pool:
        assert check_content(pool.segment(layer.toc.digest), layer) == len(layer.chunks)


async def test_removed_space_comes_back(tmp_path):
    layer = Layer([[b"a" * 400_000, b"b" * 400_001], [b"c" * 100_000]])
    async with opened(tmp_path) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        await pool.flush()
        before = segment.path.stat().st_blocks * 512
        await pool.remove_chunks(segment, [0, 1], done)
        assert before - segment.path.stat().st_blocks * 512 >= 790_000
        assert segment.path.stat().st_size == segment.table.segment_bytes
        assert check_content(segment, layer) == 1


async def test_copies_come_from_the_file_and_unverified_sources_are_hashed(tmp_path):
    a, b = Layer([[b"same" * 50_000]], name=b"a"), Layer([[b"x"], [b"same" * 50_000]], name=b"b")
    await fill(tmp_path, a)
    crash(tmp_path)
    disk = FaultyDisk()
    async with opened(tmp_path, disk=disk) as pool:
        segment = await pool.open_segment(b.layout)
        assert await pool.copy_from(segment, 1)
        assert (pool.stats().copied_chunks, pool.stats().revived_chunks, disk.copies) == (1, 1, 1)
        assert check_content(segment, b) == 1
    path = tmp_path / "pool" / (a.toc.digest.hex + ".seg")
    with path.open("r+b") as file:
        file.write(b"rot")
    crash(tmp_path)
    c = Layer([[b"same" * 50_000]], name=b"c")
    async with opened(tmp_path) as pool:
        first = pool.segment(b.toc.digest)
        await pool.remove_chunks(first, [1], done)
        assert not await pool.copy_from(await pool.open_segment(c.layout), 0)
        assert pool.stats().lost_chunks == 1


async def test_a_damaged_object_is_dropped(tmp_path):
    data = b'{"a": 1}' * 5000
    async with opened(tmp_path) as pool:
        await pool.put_object(Digest.of(data), data)
    connection = apsw.Connection(str(tmp_path / "index.db"))
    connection.execute("UPDATE objects SET data = x'28b52ffd00'")
    connection.close()
    async with opened(tmp_path) as pool:
        assert await pool.get_object(Digest.of(data)) is None
        await pool.put_object(Digest.of(data), data)
        assert await pool.get_object(Digest.of(data)) == data


async def test_a_file_that_is_a_list_of_chunks_does_not_pass_for_their_file(tmp_path):
    victim = Layer([[b"first chunk", b"second chunk"]])
    rows = [len(c).to_bytes(8, "little") + hashlib.sha256(c).digest() for c in victim.chunks]
    attacker = Layer([[b"".join(rows)], [b"harmless" * 10]])
    async with opened(tmp_path) as pool:
        segment = await pool.open_segment(attacker.layout)
        await pool.add_many(segment, attacker.all_verified())
        await pool.flush()
        assert pool.lookup_files("shared", victim.file_keys()) == {}
        assert attacker.file_keys()[1] in pool.lookup_files("shared", attacker.file_keys())


async def test_thirty_thousand_keys_are_looked_up_quickly(tmp_path):
    layer = Layer([[b"%d" % n] for n in range(5000)])
    keys = [content_key(entry.chunks) for entry in layer.toc.entries]
    others = [hashlib.sha256(b"other %d" % n).digest() for n in range(25_000)]
    async with opened(tmp_path) as pool:
        started = trio.current_time()
        assert pool.lookup_files("shared", keys + others) == {}
        assert trio.current_time() - started < 0.02
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(segment, layer.all_verified())
        await pool.flush()
        best = 1e9
        for _ in range(3):
            started = trio.current_time()
            assert len(pool.lookup_files("shared", keys + others)) == 5000
            best = min(best, trio.current_time() - started)
        print(f"30000 keys, 5000 hits: {best * 1000:.1f} ms")
        assert best < 0.5  # 60 ms is the goal; a loaded machine must not fail the suite


KILLED_WRITER = """
import random, sys
from pathlib import Path
import trio
from p2pgz.pool.pool import Pool
from p2pgz.testing.conformance_pool import Layer

async def main():
    layer = Layer.random(int(sys.argv[2]), files=60)
    rng = random.Random(int(sys.argv[2]))
    async with Pool.open(Path(sys.argv[1]), boot_id="boot") as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.revive(segment, range(len(layer.chunks)))
        async def removed(): pass
        while True:
            for n in rng.sample(range(len(layer.chunks)), len(layer.chunks)):
                await pool.add(segment, n, layer.verified(n))
                if rng.random() < 0.05:
                    await pool.flush()
                    durable = [k for k in range(len(layer.chunks)) if segment.presence.has(k)]
                    print(*durable, flush=True)
                if rng.random() < 0.02:
                    gone = rng.sample(range(len(layer.chunks)), 10)
                    print("removing", *gone, flush=True)
                    await pool.remove_chunks(segment, gone, removed)
trio.run(main)
"""


@pytest.mark.parametrize("seed", [101, 102, 103, 104])
async def test_kill_at_any_instant_shows_no_wrong_byte_and_keeps_what_was_committed(tmp_path, seed):
    layer = Layer.random(seed, files=60)
    committed: set[int] = set()
    for round_number in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path), str(seed)], stdout=subprocess.PIPE, text=True
        )
        lines = [child.stdout.readline() for _ in range(2 + 7 * round_number + seed % 5)]
        child.kill()
        lines += child.stdout.read().splitlines()
        child.stdout.close()
        child.wait()
        for line in lines:
            words = line.split()
            if words[:1] == ["removing"]:
                committed -= set(map(int, words[1:]))
            elif words and line != lines[-1]:  # the last one may be cut short by the kill
                committed = set(map(int, words))
        async with opened(tmp_path) as pool:
            segment = pool.segment(layer.toc.digest)
            assert segment.presence.present_count() == 0
            alive = set(await pool.revive(segment, range(len(layer.chunks))))
            assert check_content(segment, layer) == len(alive)
            assert committed <= alive
            assert pool.stats().lost_chunks == 0
            assert not (tmp_path / "index.db.damaged").exists()
        async with opened(tmp_path) as pool:
            assert check_content(pool.segment(layer.toc.digest), layer) == len(alive)
    assert committed
