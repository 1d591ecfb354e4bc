"""The segment host: many images in one process, hung and healthy ones, its end and the node's, native devices, faults."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.mount.attach import move_mount
from p2pgz.mount.held import HolderClient
from p2pgz.mount.hosting import ErofsPart
from p2pgz.mount.segment_client import SegmentClient
from p2pgz.mount.session import FsHost, FsSession, SessionOptions
from p2pgz.mount.setup import SegmentFiles
from p2pgz.mount.umount import check_mount_point, find_mounts, unmount
from p2pgz.pool.presence import Presence
from tests.e2e.mount.image_on_disk import CHUNK_BYTES, ImageOnDisk, Supplier, call, is_mounted, run

pytestmark = [pytest.mark.root, pytest.mark.trio]

PAGE_BYTES = 4096
SMALL = random.Random(2).randbytes(CHUNK_BYTES)
LARGE = random.Random(3).randbytes(40 * CHUNK_BYTES + 777)
OTHER = random.Random(4).randbytes(10 * CHUNK_BYTES)


# in a process of its own: a fault does not let go of the interpreter, and this one answers it
FAULT = """
import mmap, sys
file = open(sys.argv[1], "rb")
view = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
sys.stdout.buffer.write(bytes(view[int(at)] for at in sys.argv[2:]))
"""


def make_image(folder: Path, chunk_bytes: int = CHUNK_BYTES) -> ImageOnDisk:
    image = ImageOnDisk(folder, chunk_bytes=chunk_bytes)
    image.add(b"small", "reg", SMALL)
    image.add(b"large", "reg", LARGE)
    image.add(b"other", "reg", OTHER)
    image.add(b"directory")
    image.add(b"directory/link", "symlink", link=b"../small")
    return image.write()


@pytest.fixture
def image(tmp_path: Path) -> ImageOnDisk:
    return make_image(tmp_path / "image")


@dataclass
class Host:
    """A client and what was mounted through it."""

    client: SegmentClient
    folder: Path

    async def mount(
        self,
        image: ImageOnDisk,
        name: str,
        supplier: Supplier | None = None,
        native: bool = False,
        **options: object,
    ) -> FsSession:
        directory = self.folder / name
        directory.mkdir(exist_ok=True)
        opening = ErofsPart(bytes(image.metadata_path), [0] if native else [], native)
        session = await self.client.start_session(
            opening, image.options(**options), (supplier or Supplier(image)).ensure
        )
        descriptor = session.take_mount_fd()
        move_mount(descriptor, directory)
        os.close(descriptor)
        return session


@asynccontextmanager
async def hosting(folder: Path, run_path: Path | None = None) -> AsyncIterator[Host]:
    async with SegmentClient.open(run_path) as client:
        try:
            yield Host(client, folder)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                for mount in find_mounts():
                    if mount.directory.startswith(f"{folder}/"):
                        await call(lambda mount=mount: unmount(mount.directory, lazy=True))


async def ended(session: FsSession) -> None:
    with trio.fail_after(5):
        await session.wait_closed()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until_dead(pid: int) -> None:
    with trio.fail_after(5):
        while alive(pid):
            await trio.sleep(0.02)


async def test_bytes_arrive_on_demand_and_umount_ends_the_mount(image: ImageOnDisk, tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        supplier = Supplier(image)
        session = await host.mount(image, "root", supplier)
        root = tmp_path / "root"
        [found] = [mount for mount in find_mounts() if mount.directory == str(root)]
        assert (found.fs_type, found.source, found.device) == (
            "erofs",
            str(image.metadata_path),
            session.device,
        )
        assert {"ro", "nosuid", "nodev"} <= set(found.options.split(","))
        with pytest.raises(MountUnavailable, match="p2pgz umount"):
            check_mount_point(root)
        assert await call((root / "directory" / "link").read_bytes) == SMALL
        assert await call((root / "large").read_bytes) == LARGE
        asked = {n for _, first, count, _ in supplier.requests for n in range(first, first + count)}
        assert {*image.chunks_of(b"small"), *image.chunks_of(b"large")} <= asked
        urgent = [n for _, first, _, priority in supplier.requests if not priority for n in (first,)]
        assert len(urgent) == len(set(urgent))
        assert (await run("umount", root)).returncode == 0
        await ended(session)
        assert session.exit_status == 0
        assert alive(host.client.pid)
    await until_dead(host.client.pid)


async def test_file_system_size_is_the_images_own(tmp_path: Path) -> None:
    image = ImageOnDisk(tmp_path / "image", chunk_bytes=8 << 20)
    image.add(b"big", "reg", bytes(8 << 20))
    image.write()
    async with hosting(tmp_path) as host:
        await host.mount(image, "root")
        answer = await call(os.statvfs, tmp_path / "root")
        assert answer.f_blocks * answer.f_frsize == 8 << 20
        assert (answer.f_bsize, answer.f_bavail, answer.f_namemax) == (4096, 0, 255)


async def test_hung_image_does_not_stop_a_healthy_one(image: ImageOnDisk, tmp_path: Path) -> None:
    """Nor its own metadata. What it has may wait, as read-ahead that covers a missing neighbour is answered as a whole."""
    healthy = make_image(tmp_path / "healthy")
    async with hosting(tmp_path) as host:
        stuck = Supplier(image)
        stuck.hold()
        await host.mount(image, "hung", stuck)
        await host.mount(healthy, "root")
        readers = [
            await trio.lowlevel.open_process(
                [
                    "dd",
                    f"if={tmp_path / 'hung' / 'large'}",
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
            while len(stuck.requests) < 20:
                await trio.sleep(0.01)
        start = time.monotonic()
        with trio.fail_after(5):
            assert (await run("cat", tmp_path / "root" / "large")).stdout == LARGE
            assert (await run("find", tmp_path / "hung")).stdout.count(b"\n") == 6
            await call(os.statvfs, tmp_path / "hung")
        print(f"healthy image read in {(time.monotonic() - start) * 1000:.0f} ms beside 40 stuck readers")
        stuck.open.set()
        for reader in readers:
            assert await reader.wait() == 0


async def test_random_faults_in_a_cold_image_fetch_little_else(tmp_path: Path) -> None:
    """30 faults of a page each: as much as the read-around of 32 KiB makes of them, and no more."""
    image = make_image(tmp_path / "image", chunk_bytes=PAGE_BYTES)
    choose = random.Random(7)
    async with hosting(tmp_path) as host:
        supplier = Supplier(image)
        await host.mount(image, "root", supplier)

        places = [choose.randrange(len(LARGE) // PAGE_BYTES) * PAGE_BYTES for _ in range(30)]
        done = await run(sys.executable, "-c", FAULT, tmp_path / "root" / "large", *map(str, places))
        assert done.stdout == bytes(LARGE[at] for at in places), done.stderr
        asked = {n for _, first, count, _ in supplier.requests for n in range(first, first + count)}
        fetched = len(asked) * PAGE_BYTES
        print(f"30 faults fetched {fetched / 1e6:.2f} MB, {fetched / 30 / PAGE_BYTES:.1f} pages each")
        assert fetched <= 30 * (32 << 10) + (64 << 10)


async def test_read_ahead_grows_when_the_image_is_complete(image: ImageOnDisk, tmp_path: Path) -> None:
    def knobs() -> dict[str, str]:
        return {
            path.name: (path / "read_ahead_kb").read_text().strip()
            for path in Path("/sys/class/bdi").glob("erofs-*")
        }

    before = knobs()
    async with hosting(tmp_path) as host:
        session = await host.mount(image, "root")
        [new] = knobs().keys() - before.keys()
        assert knobs()[new] == "32"
        session.set_read_ahead(1024)
        with trio.fail_after(5):
            await session.ping()
        assert knobs()[new] == "128"
        image.supply_all()
        complete = await host.mount(image, "native", native=True)
        [other] = knobs().keys() - before.keys() - {new}
        assert knobs()[other] == "128"
        assert complete.device != session.device


async def test_killed_host_leaves_metadata_and_what_is_cached_and_native_mounts_whole(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    whole = make_image(tmp_path / "whole").supply_all()
    async with hosting(tmp_path) as host:
        lazy = await host.mount(image, "lazy")
        native = await host.mount(whole, "native", native=True)
        assert await call((tmp_path / "lazy" / "small").read_bytes) == SMALL
        os.kill(host.client.pid, signal.SIGKILL)
        await ended(lazy)
        await ended(native)
        assert (await run("find", tmp_path / "lazy")).stdout.count(b"\n") == 6
        assert await call((tmp_path / "lazy" / "small").read_bytes) == SMALL
        with pytest.raises(OSError) as caught:
            await call((tmp_path / "lazy" / "other").read_bytes)
        assert caught.value.errno in {errno.EIO, errno.ENOTCONN}
        for name, content in whole.contents.items():
            assert await call((tmp_path / "native" / os.fsdecode(name)).read_bytes) == content
        first_pid = host.client.pid
        again = await host.mount(image, "again")
        assert host.client.pid != first_pid
        assert await call((tmp_path / "again" / "other").read_bytes) == OTHER
        for name in ("lazy", "native", "again"):
            await call(unmount, tmp_path / name)
        await ended(again)
        assert not is_mounted(tmp_path / "lazy")


async def test_killed_host_fails_its_waiting_reader(image: ImageOnDisk, tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        supplier = Supplier(image)
        supplier.hold()
        await host.mount(image, "root", supplier)
        reader = await trio.lowlevel.open_process(
            ["cat", str(tmp_path / "root" / "large")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await supplier.asked.wait()
        os.kill(host.client.pid, signal.SIGKILL)
        with trio.fail_after(5):
            assert await reader.wait() != 0


@asynccontextmanager
async def held_hosting(folder: Path) -> AsyncIterator[tuple[Host, HolderClient]]:
    """With a holder, as a node has it."""
    run_path = folder / "run"
    run_path.mkdir()
    async with HolderClient.open(run_path) as holder, SegmentClient.open(run_path, holder) as client:
        try:
            yield Host(client, folder), holder
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                for mount in find_mounts():
                    if mount.directory.startswith(f"{folder}/"):
                        await call(lambda mount=mount: unmount(mount.directory, lazy=True))


async def resumed(host: Host, image: ImageOnDisk, mount_id: str, supplier: Supplier) -> FsSession:
    record = host.client.record_of(mount_id)
    assert record is not None
    return await host.client.resume_session(record, image.options(hold_id=mount_id), supplier.ensure)


async def test_readers_of_a_killed_host_get_the_right_bytes_from_its_heir(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    """Two mounts of the same segment; the second is named to the heir while the kernel waits for its files already."""
    supplier = Supplier(image)
    supplier.hold()
    async with held_hosting(tmp_path) as (host, holder):
        sessions = [await host.mount(image, f"m{n}", supplier, hold_id=f"0{n}") for n in range(2)]
        readers = [
            await trio.lowlevel.open_process(["cat", str(tmp_path / f"m{n}" / name)], stdout=subprocess.PIPE)
            for n, name in enumerate(("small", "large"))
        ]
        await supplier.asked.wait()
        old = host.client.pid
        for kill in range(2):  # the heir of the heir, too
            os.kill(host.client.pid, signal.SIGKILL)
            for session in sessions:
                await ended(session)
                assert session.exit_status == signal.SIGKILL
            sessions = [await resumed(host, image, f"0{n}", supplier) for n in range(2)]
            assert len(await holder.held()) == 1, kill
        assert {session.pid for session in sessions} == {host.client.pid}
        assert host.client.pid != old
        supplier.open.set()
        for reader, content in zip(readers, (SMALL, LARGE), strict=True):
            with trio.fail_after(10):
                assert reader.stdout is not None
                assert b"".join([piece async for piece in reader.stdout]) == content
                assert await reader.wait() == 0
        heir = host.client.pid
        other = make_image(tmp_path / "other")
        new = await host.mount(other, "new", hold_id="02")
        assert new.pid != heir
        assert await call((tmp_path / "new" / "other").read_bytes) == OTHER
        for n, session in enumerate(sessions):
            await call(unmount, tmp_path / f"m{n}")
            await ended(session)
            assert session.exit_status == 0
        assert set(host.client.records()) == {"02"}
        await until_dead(heir)


async def test_mount_that_is_unmounted_while_nobody_serves_it_has_ended_for_the_heir(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with held_hosting(tmp_path) as (host, holder):
        first, second = [await host.mount(image, f"m{n}", hold_id=f"0{n}") for n in range(2)]
        os.kill(host.client.pid, signal.SIGKILL)
        await ended(first)
        await ended(second)
        await call(unmount, tmp_path / "m0")
        second = await resumed(host, image, "01", Supplier(image))
        assert await call((tmp_path / "m1" / "small").read_bytes) == SMALL
        first = await resumed(host, image, "00", Supplier(image))
        await ended(first)
        assert first.exit_status == 0
        assert set(host.client.records()) == {"01"}
        # and one whose end is that of the connection: then there is nothing that could be taken over
        os.kill(host.client.pid, signal.SIGKILL)
        await ended(second)
        await call(unmount, tmp_path / "m1")
        with trio.fail_after(5):
            while await holder.held():
                await trio.sleep(0.02)
        with pytest.raises(MountUnavailable):
            await resumed(host, image, "01", Supplier(image))


async def test_what_is_written_down_of_another_mount_is_refused(image: ImageOnDisk, tmp_path: Path) -> None:
    async with held_hosting(tmp_path) as (host, _):
        session = await host.mount(image, "m0", hold_id="00")
        record = host.client.record_of("00")
        assert record is not None
        os.kill(host.client.pid, signal.SIGKILL)
        await ended(session)
        options = image.options(hold_id="00", segments=[image.segment_files()] * 2)
        with pytest.raises(StateError, match="not how"):
            await host.client.resume_session(record, options, Supplier(image).ensure)
        (tmp_path / "run" / "hosted-01.json").write_bytes(b"{")
        assert set(host.client.records()) == {"00"}
        assert host.client.record_of("01") is None
        await resumed(host, image, "00", Supplier(image))
        assert await call((tmp_path / "m0" / "small").read_bytes) == SMALL


async def test_reader_of_a_shared_segment_goes_on_when_the_other_image_is_unmounted(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    """Both mounts have the segment; the request went out through the first, which ends."""
    async with hosting(tmp_path) as host:
        first, second = Supplier(image), Supplier(image)
        first.hold()
        gone = await host.mount(image, "first", first)
        await host.mount(image, "second", second)
        reader = await trio.lowlevel.open_process(
            ["cat", str(tmp_path / "second" / "small")], stdout=subprocess.PIPE
        )
        await first.asked.wait()
        await call(unmount, tmp_path / "first")
        await ended(gone)
        assert reader.stdout is not None
        output = b""
        with trio.fail_after(5):
            async for piece in reader.stdout:
                output += piece
            await reader.wait()
        assert output == SMALL
        assert second.requests


async def test_mount_that_nobody_attaches_ends(image: ImageOnDisk, tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        opening = ErofsPart(bytes(image.metadata_path), [])
        session = await host.client.start_session(opening, image.options(), Supplier(image).ensure)
        session.drop_mount_fd()
        await ended(session)
        assert session.exit_status == 0


async def test_busy_mount_is_detached_lazily_and_ends_with_its_user(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with hosting(tmp_path) as host:
        session = await host.mount(image, "root")
        user = await trio.lowlevel.open_process(["sleep", "60"], cwd=tmp_path / "root")
        try:
            with pytest.raises(MountUnavailable, match="in use"):
                await call(unmount, tmp_path / "root")
            await call(lambda: unmount(tmp_path / "root", lazy=True))
            with trio.fail_after(5):
                await session.ping()
        finally:
            user.kill()
            await user.wait()
        await ended(session)


async def test_mount_outlives_its_node_and_the_next_node_answers_its_readers(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    run_path, root = tmp_path / "run", tmp_path / "root"
    run_path.mkdir()
    supplier = Supplier(image)
    supplier.hold()
    async with SegmentClient.open(run_path) as client:
        await Host(client, tmp_path).mount(image, "root", supplier)
        reader = await trio.lowlevel.open_process(["cat", str(root / "small")], stdout=subprocess.PIPE)
        await supplier.asked.wait()
        pid = client.pid
    # the first node is gone
    assert alive(pid)
    assert reader.poll() is None
    old, image.presence = image.presence, Presence.create(image.presence.count)
    image.presence.load(old.to_bytes())
    second = Supplier(image)

    async def adopt(options: SessionOptions) -> list[SegmentFiles]:
        await trio.lowlevel.checkpoint()
        assert options.source_name == "registry.example/test:1"
        return [image.segment_files()]

    async with FsHost.open(run_path) as next_host:
        [socket_path] = next_host.orphans()
        taken = await next_host.reattach(socket_path, adopt, second.ensure)
        assert reader.stdout is not None
        output = b""
        with trio.fail_after(5):
            async for piece in reader.stdout:
                output += piece
            await reader.wait()
        assert output == SMALL
        assert await call((root / "large").read_bytes) == LARGE
        assert second.requests
        await call(unmount, root)
        await ended(taken)
        assert next_host.orphans() == []
    await until_dead(pid)


async def test_damaged_pool_file_costs_its_reader_only(image: ImageOnDisk, tmp_path: Path) -> None:
    image.supply_all()
    async with hosting(tmp_path) as host:
        session = await host.mount(image, "root")
        os.truncate(image.data_path, PAGE_BYTES)
        with pytest.raises(OSError) as caught:
            await call((tmp_path / "root" / "large").read_bytes)
        assert caught.value.errno == errno.EIO
        with trio.fail_after(5):
            await session.ping()


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("metadata is not there", MountUnavailable),
        ("metadata is something else", MountUnavailable),
        ("metadata is cut short", MountUnavailable),
        ("a device too many", MountUnavailable),
        ("table cut short", StateError),
        ("bytes cut short", StateError),
        ("bytes not there", StateError),
        ("presence of another size", StateError),
        ("unknown security context", MountUnavailable),
    ],
)
async def test_bad_input_is_a_named_error_and_leaves_nothing(
    image: ImageOnDisk, tmp_path: Path, what: str, error: type[P2pgzError]
) -> None:
    options = image.options()
    match what:
        case "metadata is not there":
            image.metadata_path.unlink()
        case "metadata is something else":
            image.metadata_path.write_bytes(random.Random(1).randbytes(8192))
        case "metadata is cut short":
            os.truncate(image.metadata_path, 1100)
        case "a device too many":
            options = image.options(segments=[image.segment_files()] * 2)
        case "table cut short":
            os.truncate(image.table_path, 60)
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
        case "unknown security context":
            options = image.options(context="system_u:object_r:no_such_t:s0")
    async with hosting(tmp_path) as host:
        with pytest.raises(error) as caught:
            await host.client.start_session(
                ErofsPart(bytes(image.metadata_path), []), options, Supplier(image).ensure
            )
        print(caught.value)
        healthy = make_image(tmp_path / "healthy")
        session = await host.mount(healthy, "root")
        assert await call((tmp_path / "root" / "small").read_bytes) == SMALL
        await call(unmount, tmp_path / "root")
        await ended(session)
        assert alive(host.client.pid)


async def test_host_keeps_nothing_of_mounts_that_ended(image: ImageOnDisk, tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        await host.client.prepare()
        counts = []
        for _ in range(3):
            sessions = [await host.mount(image, f"root{n}") for n in range(5)]
            for n in range(5):
                assert await call((tmp_path / f"root{n}" / "small").read_bytes) == SMALL
                await call(unmount, tmp_path / f"root{n}")
            for session in sessions:
                await ended(session)
            counts.append(len(os.listdir(f"/proc/{host.client.pid}/fd")))
        assert len(set(counts)) == 1, counts


async def test_long_paths(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 60) / ("longer" * 35)
    folder.mkdir(parents=True)
    image = make_image(folder / "image").supply_all()
    async with hosting(tmp_path) as host:
        await host.mount(image, "root", native=True)
        assert await call((tmp_path / "root" / "small").read_bytes) == SMALL


async def test_self_test_answers_and_leaves_nothing(tmp_path: Path) -> None:
    async with hosting(tmp_path) as host:
        tested = await host.client.self_test(tmp_path)
        print(tested)
        assert tested.passed == (not tested.reason)
        refused = await host.client.self_test(Path("/proc"))
        assert not refused.passed
        assert refused.reason
    assert list(tmp_path.glob("*.p2pgz-erofs")) == []


async def test_folder_whose_files_cannot_be_devices_fails_the_self_test(tmp_path: Path) -> None:
    """The kernel takes no file on overlayfs as an EROFS device: a state directory there is served in tree mode."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounted = await run("mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged")
    if mounted.returncode:
        pytest.skip(f"no overlayfs here: {mounted.stderr.decode()}")
    try:
        async with hosting(tmp_path) as host:
            tested = await host.client.self_test(tmp_path / "merged")
            assert not tested.passed
            assert "EROFS" in tested.reason
            assert (await host.client.self_test(tmp_path)).passed
    finally:
        with trio.CancelScope(shield=True):
            await run("umount", tmp_path / "merged")
