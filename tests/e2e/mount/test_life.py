"""How mounts begin and end: unmounting, killed processes, nodes that go and come back, and files that are no image."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.mount.attach import move_mount
from p2pgz.mount.session import FsHost, FsSession, SessionOptions
from p2pgz.mount.setup import READ_AHEAD_COMPLETE_KB, SegmentFiles
from p2pgz.mount.umount import check_mount_point, find_mounts, unmount
from tests.e2e.mount.image_on_disk import CHUNK_BYTES, ImageOnDisk, Supplier, call, is_mounted, mounted, run

pytestmark = [pytest.mark.root, pytest.mark.trio]

CONTENT = b"p" * CHUNK_BYTES + b"q" * CHUNK_BYTES


@pytest.fixture
def image(tmp_path: Path) -> ImageOnDisk:
    image = ImageOnDisk(tmp_path / "image")
    image.add(b"here", "reg", CONTENT)
    image.add(b"missing", "reg", CONTENT[::-1])
    image.write()
    for n in image.chunks_of(b"here"):
        image.supply(n)
    return image


def attach(session: FsSession, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    descriptor = session.take_mount_fd()
    move_mount(descriptor, directory)
    os.close(descriptor)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_plain_umount_ends_the_process(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        [found] = [mount for mount in find_mounts() if mount.directory == str(m.directory)]
        assert (found.fs_type, found.source, found.device) == (
            "fuse.p2pgz",
            "registry.example/test:1",
            m.session.device,
        )
        assert {"ro", "nosuid", "nodev"} <= set(found.options.split(","))
        assert Path(f"/proc/{m.session.pid}/comm").read_text() == "p2pgz-fs\n"
        assert (await run("umount", m.directory)).returncode == 0
        with trio.fail_after(5):
            await m.session.wait_closed()
        assert m.session.exit_status == 0
        assert not exists(m.session.pid)


async def test_mounts_follow_and_stand_beside_each_other(image: ImageOnDisk, tmp_path: Path) -> None:
    async with FsHost.open() as host:
        for _ in range(2):
            sessions = []
            for name in ("a", "b", "c"):
                session = await host.start_session(image.options(), Supplier(image).ensure)
                attach(session, tmp_path / name)
                sessions.append(session)
            for name in ("a", "b", "c"):
                assert await call((tmp_path / name / "missing").read_bytes) == CONTENT[::-1]
            for name in ("a", "b", "c"):
                await call(unmount, tmp_path / name)
            with trio.fail_after(5):
                for session in sessions:
                    await session.wait_closed()
            assert len({session.pid for session in sessions}) == 3


async def test_mount_that_nobody_attaches_ends(image: ImageOnDisk) -> None:
    async with FsHost.open() as host:
        session = await host.start_session(image.options(), Supplier(image).ensure)
        session.drop_mount_fd()
        with pytest.raises(MountUnavailable):
            session.take_mount_fd()
        with trio.fail_after(5):
            await session.wait_closed()
        assert session.exit_status == 0


async def test_killed_process_leaves_a_mount_that_unmount_clears(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        os.kill(m.session.pid, signal.SIGKILL)
        with trio.fail_after(5):
            await m.session.wait_closed()
        assert m.session.exit_status == signal.SIGKILL
        with pytest.raises(OSError) as caught:
            await call(os.listdir, m.directory)
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(MountUnavailable, match="mounted there already"):
            check_mount_point(m.directory)
        await call(unmount, m.directory)
        assert not is_mounted(m.directory)


async def test_killed_process_fails_its_waiting_reader(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.supplier.hold()
        reader = await trio.lowlevel.open_process(
            ["cat", str(m.directory / "missing")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await m.supplier.asked.wait()
        os.kill(m.session.pid, signal.SIGKILL)
        with trio.fail_after(5):
            assert await reader.wait() != 0


async def test_busy_mount_says_who_uses_it(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        user = await trio.lowlevel.open_process(["sleep", "60"], cwd=m.directory)
        try:
            with pytest.raises(MountUnavailable, match=rf"in use by sleep \({user.pid}\)"):
                await call(unmount, m.directory)
            await call(lambda: unmount(m.directory, lazy=True))
            assert not is_mounted(m.directory)
            assert exists(m.session.pid)
        finally:
            user.kill()
            await user.wait()
        with trio.fail_after(5):
            await m.session.wait_closed()


async def test_mount_outlives_its_node_and_the_next_node_answers_its_readers(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    run_path, root = tmp_path / "run", tmp_path / "root"
    run_path.mkdir()
    supplier = Supplier(image)
    supplier.hold()
    async with FsHost.open(run_path) as first_host:
        session = await first_host.start_session(image.options(), supplier.ensure)
        attach(session, root)
        reader = await trio.lowlevel.open_process(["cat", str(root / "missing")], stdout=subprocess.PIPE)
        await supplier.asked.wait()
    # the first node is gone
    assert exists(session.pid)
    assert await call((root / "here").read_bytes) == CONTENT
    assert reader.poll() is None

    again = ImageOnDisk(tmp_path / "image")
    again.__dict__.update(image.__dict__)
    from p2pgz.pool.presence import Presence

    again.presence = Presence.create(image.presence.count)
    again.presence.load(image.presence.to_bytes())
    second = Supplier(again)
    told: list[SessionOptions] = []

    async def adopt(options: SessionOptions) -> list[SegmentFiles]:
        await trio.lowlevel.checkpoint()
        told.append(options)
        return [again.segment_files()]

    async with FsHost.open(run_path) as second_host:
        [socket_path] = second_host.orphans()
        taken = await second_host.reattach(socket_path, adopt, second.ensure)
        assert reader.stdout is not None
        output = b""
        with trio.fail_after(5):
            async for piece in reader.stdout:
                output += piece
            await reader.wait()
        assert output == CONTENT[::-1]
        assert second.requests
        with trio.fail_after(5):
            await taken.ping()
        assert taken.pid == session.pid
        assert told[0].source_name == "registry.example/test:1"
        assert told[0].tree_path == str(image.tree_path)
        await call(unmount, root)
        with trio.fail_after(5):
            await taken.wait_closed()
        assert second_host.orphans() == []
        for _ in range(100):
            if not exists(session.pid) or is_zombie(session.pid):
                break
            await trio.sleep(0.02)
        assert not exists(session.pid) or is_zombie(session.pid)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def test_without_a_node_missing_bytes_fail_at_the_deadline(image: ImageOnDisk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with FsHost.open() as host:
        session = await host.start_session(image.options(read_deadline_seconds=1.0), Supplier(image).ensure)
        attach(session, root)
    assert await call((root / "here").read_bytes) == CONTENT
    with pytest.raises(OSError) as caught:
        await call((root / "missing").read_bytes)
    assert caught.value.errno == errno.EIO
    await call(unmount, root)


async def test_stranger_is_turned_away_from_the_socket(image: ImageOnDisk, tmp_path: Path) -> None:
    run_path = tmp_path / "run"
    run_path.mkdir()
    async with FsHost.open(run_path) as host:
        session = await host.start_session(image.options(), Supplier(image).ensure)
        attach(session, tmp_path / "root")

    async def adopt_wrongly(options: SessionOptions) -> list[SegmentFiles]:
        await trio.lowlevel.checkpoint()
        return []

    async with FsHost.open(run_path) as host:
        [socket_path] = host.orphans()
        assert socket_path.stat().st_mode & 0o777 == 0o600
        refused = await host.reattach(socket_path, adopt_wrongly, Supplier(image).ensure)
        with trio.fail_after(5):
            await refused.wait_closed()
        assert await call((tmp_path / "root" / "here").read_bytes) == CONTENT
        await call(unmount, tmp_path / "root")
        with trio.fail_after(5):
            while host.orphans():
                await trio.sleep(0.01)
        (run_path / "fs-dead.sock").touch()
        with pytest.raises(MountUnavailable):
            await host.reattach(run_path / "fs-dead.sock", adopt_wrongly, Supplier(image).ensure)


async def test_killed_zygote_is_replaced(image: ImageOnDisk, tmp_path: Path) -> None:
    async with FsHost.open() as host:
        first = await host.start_session(image.options(), Supplier(image).ensure)
        attach(first, tmp_path / "a")
        parent = int(Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert Path(f"/proc/{parent}/comm").read_text() == "p2pgz-fs-zygote\n"
        os.kill(parent, signal.SIGKILL)
        second = await host.start_session(image.options(), Supplier(image).ensure)
        attach(second, tmp_path / "b")
        for name in ("a", "b"):
            assert await call((tmp_path / name / "here").read_bytes) == CONTENT
            await call(unmount, tmp_path / name)
        with trio.fail_after(10):
            await first.wait_closed()
            await second.wait_closed()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("tree cut short", StateError),
        ("tree is something else", StateError),
        ("tree is not there", StateError),
        ("table cut short", StateError),
        ("table of another segment", StateError),
        ("bytes cut short", StateError),
        ("bytes not there", StateError),
        ("presence of another size", StateError),
        ("no segments", StateError),
        ("unknown security context", MountUnavailable),
    ],
)
async def test_bad_input_is_a_named_error_and_leaves_nothing(
    image: ImageOnDisk, what: str, error: type[P2pgzError]
) -> None:
    options = image.options()
    match what:
        case "tree cut short":
            os.truncate(image.tree_path, 100)
        case "tree is something else":
            image.tree_path.write_bytes(os.urandom(5000))
        case "tree is not there":
            image.tree_path.unlink()
        case "table cut short":
            os.truncate(image.table_path, 60)
        case "table of another segment":
            raw = bytearray(image.table_path.read_bytes())
            raw[41] ^= 1
            image.table_path.write_bytes(raw)
        case "bytes cut short":
            os.truncate(image.data_path, 4096)
        case "bytes not there":
            image.data_path.unlink()
        case "presence of another size":
            files = SegmentFiles(
                table_path=image.table_path,
                data_path=image.data_path,
                presence_fd=image.presence.fd,
                presence_count=1,
            )
            options = image.options(segments=[files])
        case "no segments":
            options = image.options(segments=[])
        case "unknown security context":
            options = image.options(context="system_u:object_r:no_such_t:s0")
    async with FsHost.open() as host:
        with pytest.raises(error) as caught:
            await host.start_session(options, Supplier(image).ensure)
        print(caught.value)
        assert caught.value.what


async def test_mount_points_are_checked(image: ImageOnDisk, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    check_mount_point(empty)
    (tmp_path / "file").touch()
    for bad, text in [
        (tmp_path / "absent", "no such directory"),
        (tmp_path / "file", "not a directory"),
        (tmp_path, "not empty"),
        (Path("/proc"), "mounted there already"),
    ]:
        with pytest.raises(MountUnavailable, match=text):
            check_mount_point(bad)
    with pytest.raises(MountUnavailable, match="no p2pgz image is mounted there"):
        await call(unmount, empty)
    with pytest.raises(MountUnavailable, match="no p2pgz image is mounted there"):
        await call(unmount, Path("/proc"))


async def test_unmounting_through_a_symlink_and_odd_names(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "a dir\twith \\ odd\nname") as m:
        (tmp_path / "link").symlink_to(m.directory)
        assert is_mounted(m.directory)
        await call(unmount, tmp_path / "link")
        assert not is_mounted(m.directory)


async def test_garbage_on_the_channel_is_counted_and_harmless(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root") as m:
        m.session._socket.send(b"rubbish")
        m.session._socket.send(b"\xff" * 24)
        m.session._socket.send(b"\x02" * 240)
        with trio.fail_after(5):
            await m.session.ping()
        assert await call((m.directory / "missing").read_bytes) == CONTENT[::-1]


async def test_first_reads_are_reported_until_the_node_has_heard_enough(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def observe(segment: int, first: int, count: int) -> bool:
        assert segment == 0
        seen.extend((first, n) for n in range(first, first + count))
        return len({n for _, n in seen}) < 4

    async with FsHost.open() as host:
        session = await host.start_session(image.options(observe=True), Supplier(image).ensure, observe)
        attach(session, tmp_path / "root")
        for name in ("missing", "here", "missing"):
            await call((tmp_path / "root" / name).read_bytes)
        with trio.fail_after(5):
            await session.ping()
        await call(unmount, tmp_path / "root")
        await session.wait_closed()
    assert [n for _, n in seen] == [2, 3, 0, 1]


async def test_read_ahead_follows_what_the_node_says(image: ImageOnDisk, tmp_path: Path) -> None:
    async with mounted(image, tmp_path / "root", read_ahead_kb=64) as m:
        device = f"{os.major(m.session.device)}:{os.minor(m.session.device)}"
        knob = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
        assert knob.read_text() == "64\n"
        m.session.set_read_ahead(READ_AHEAD_COMPLETE_KB)
        with trio.fail_after(5):
            await m.session.ping()
        assert knob.read_text() == "1024\n"
