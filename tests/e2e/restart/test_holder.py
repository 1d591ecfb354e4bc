"""`fs` processes that die while the holder keeps their mounts: what readers see, and what becomes of the mount."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.errors import MountUnavailable, ResendUnavailable
from p2pgz.mount import kernel
from p2pgz.mount.attach import move_mount
from p2pgz.mount.held import HolderClient
from p2pgz.mount.session import FsHost, FsSession
from p2pgz.mount.umount import unmount
from tests.e2e.mount.image_on_disk import CHUNK_BYTES, ImageOnDisk, Supplier, call, is_mounted

pytestmark = [pytest.mark.root, pytest.mark.trio]

CONTENT = b"p" * CHUNK_BYTES + b"q" * CHUNK_BYTES
ID = "00ff"


@pytest.fixture
def image(tmp_path: Path) -> ImageOnDisk:
    image = ImageOnDisk(tmp_path / "image")
    image.add(b"here", "reg", CONTENT)
    image.add(b"missing", "reg", CONTENT[::-1])
    image.write()
    for n in image.chunks_of(b"here"):
        image.supply(n)
    return image


class Kept:
    """A held mount and what a node needs to give it a new process."""

    def __init__(self, image: ImageOnDisk, folder: Path, host: FsHost, holder: HolderClient) -> None:
        self.image, self.host, self.holder = image, host, holder
        self.root = folder / "root"
        self.supplier = Supplier(image)

    async def start(self, **options: object) -> FsSession:
        return await self.host.start_session(
            self.image.options(holder_path=self.holder.path, hold_id=ID, **options), self.supplier.ensure
        )


@asynccontextmanager
async def kept(image: ImageOnDisk, folder: Path, abandon_seconds: float = 60.0) -> AsyncIterator[Kept]:
    run_path = folder / "run"
    run_path.mkdir()
    async with (
        HolderClient.open(run_path, abandon_seconds=abandon_seconds) as holder,
        FsHost.open(run_path) as host,
    ):
        await holder.ensure()
        k = Kept(image, folder, host, holder)
        k.root.mkdir()
        try:
            yield k
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                if is_mounted(k.root):
                    await call(lambda: unmount(k.root, lazy=True))


def attach(session: FsSession, root: Path) -> None:
    descriptor = session.take_mount_fd()
    move_mount(descriptor, root)
    os.close(descriptor)


async def killed(session: FsSession, number: int = signal.SIGKILL) -> None:
    os.kill(session.pid, number)
    with trio.fail_after(5):
        await session.wait_closed()


async def until_nothing_is_held(holder: HolderClient, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        while holder.path.exists() and await _held(holder):
            await trio.sleep(0.02)


async def _held(holder: HolderClient) -> bool:
    with contextlib.suppress(MountUnavailable):
        return bool(await holder.held())
    return False


async def test_reader_of_a_killed_process_gets_the_right_bytes_from_the_next_one(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with kept(image, tmp_path) as k:
        first = await k.start()
        attach(first, k.root)
        assert list(await k.holder.held()) == [ID]
        k.supplier.hold()
        reader = await trio.lowlevel.open_process(["cat", str(k.root / "missing")], stdout=subprocess.PIPE)
        with trio.fail_after(5):
            await k.supplier.asked.wait()
        await killed(first)
        idle = await trio.lowlevel.open_process(["stat", "-f", str(k.root)], stdout=subprocess.DEVNULL)
        k.supplier.open.set()
        begin = time.monotonic()
        second = await k.start(resume=True)
        assert reader.stdout is not None
        with trio.fail_after(5):
            output = b"".join([piece async for piece in reader.stdout])
            assert await reader.wait() == 0
            assert await idle.wait() == 0
        print(f"waited {time.monotonic() - begin:.3f} s")
        assert output == CONTENT[::-1]
        assert second.pid != first.pid
        assert await call((k.root / "here").read_bytes) == CONTENT
        await call(unmount, k.root)
        with trio.fail_after(5):
            await second.wait_closed()
        assert second.exit_status == 0
        await until_nothing_is_held(k.holder)


async def test_file_opened_before_the_kill_is_read_after_it(image: ImageOnDisk, tmp_path: Path) -> None:
    async with kept(image, tmp_path) as k:
        session = await k.start()
        attach(session, k.root)
        for _ in range(5):
            fd = await call(os.open, k.root / "missing", os.O_RDONLY)
            assert isinstance(fd, int)
            assert await call(os.pread, fd, 100, 0) == CONTENT[::-1][:100]
            await killed(session)
            session = await k.start(resume=True)
            assert (
                await call(os.pread, fd, 100, CHUNK_BYTES + 50_000)
                == CONTENT[::-1][CHUNK_BYTES + 50_000 :][:100]
            )
            await call(os.close, fd)
        await call(unmount, k.root)
        await session.wait_closed()


async def test_drained_process_answers_what_it_read_while_the_next_one_serves(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with kept(image, tmp_path) as k:
        first = await k.start()
        attach(first, k.root)
        k.supplier.hold()
        reader = await trio.lowlevel.open_process(["cat", str(k.root / "missing")], stdout=subprocess.PIPE)
        with trio.fail_after(5):
            await k.supplier.asked.wait()
            await first.drain()
        second = await k.start(resume=True, resend=False)
        with trio.fail_after(5):
            assert await call((k.root / "here").read_bytes) == CONTENT
            assert reader.poll() is None
            k.supplier.open.set()
            assert reader.stdout is not None
            assert b"".join([piece async for piece in reader.stdout]) == CONTENT[::-1]
            assert await reader.wait() == 0
            await first.wait_closed()
        assert first.exit_status == 0
        assert list(await k.holder.held()) == [ID]
        await call(unmount, k.root)
        await second.wait_closed()


async def test_without_resend_a_mount_cannot_go_on(
    image: ImageOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "RESEND_SINCE", (99, 0, 0))
    with pytest.raises(ResendUnavailable, match="cannot send requests again"):
        kernel.resend(-1)
    async with kept(image, tmp_path) as k:
        first = await k.start()
        attach(first, k.root)
        k.supplier.hold()
        reader = await trio.lowlevel.open_process(
            ["cat", str(k.root / "missing")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with trio.fail_after(5):
            await k.supplier.asked.wait()
        await killed(first)
        await k.holder.abort(ID)
        assert reader.stderr is not None
        with trio.fail_after(5):
            said = b"".join([piece async for piece in reader.stderr])
            assert await reader.wait() != 0
        assert b"not connected" in said or b"abort" in said
        await call(unmount, k.root)


async def test_mount_that_nobody_serves_is_given_up(image: ImageOnDisk, tmp_path: Path) -> None:
    async with kept(image, tmp_path, abandon_seconds=2.0) as k:
        session = await k.start()
        attach(session, k.root)
        await trio.sleep(3.5)  # a living process is never given up
        assert await call((k.root / "here").read_bytes) == CONTENT
        await killed(session)
        begin = time.monotonic()
        with trio.fail_after(8), pytest.raises(OSError) as caught:
            await call(os.statvfs, k.root)
        assert caught.value.errno in {errno.ENOTCONN, errno.ECONNABORTED}
        assert 1.0 < time.monotonic() - begin < 5.0
        await call(unmount, k.root)


async def test_stopped_process_is_given_up_too(image: ImageOnDisk, tmp_path: Path) -> None:
    async with kept(image, tmp_path, abandon_seconds=1.0) as k:
        session = await k.start()
        attach(session, k.root)
        os.kill(session.pid, signal.SIGSTOP)
        with trio.fail_after(8), pytest.raises(OSError):
            await call(os.statvfs, k.root)
        with trio.fail_after(5):
            await session.wait_closed()
        await call(unmount, k.root)


async def test_killed_holder_is_replaced_and_keeps_the_mounts_again(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with kept(image, tmp_path) as k:
        session = await k.start()
        attach(session, k.root)
        os.kill((await k.holder._ask({"op": "list"}))["pid"], signal.SIGKILL)
        assert await call((k.root / "here").read_bytes) == CONTENT
        with trio.fail_after(8):
            while not await _held(k.holder):
                await trio.sleep(0.05)
        assert k.holder.losses == 1
        await killed(session)
        session = await k.start(resume=True)
        assert await call((k.root / "missing").read_bytes) == CONTENT[::-1]
        await call(unmount, k.root)
        await session.wait_closed()


async def test_holder_and_process_killed_together_leave_a_dead_mount(
    image: ImageOnDisk, tmp_path: Path
) -> None:
    async with kept(image, tmp_path) as k:
        session = await k.start()
        attach(session, k.root)
        os.kill((await k.holder._ask({"op": "list"}))["pid"], signal.SIGKILL)
        await killed(session)
        with pytest.raises(OSError) as caught:
            await call(os.listdir, k.root)
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(MountUnavailable):
            await k.start(resume=True)
        await call(unmount, k.root)


async def test_told_to_shut_down_the_holder_fails_all_readers(image: ImageOnDisk, tmp_path: Path) -> None:
    async with kept(image, tmp_path) as k:
        session = await k.start()
        attach(session, k.root)
        k.supplier.hold()
        reader = await trio.lowlevel.open_process(
            ["cat", str(k.root / "missing")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with trio.fail_after(5):
            await k.supplier.asked.wait()
        os.kill((await k.holder._ask({"op": "list"}))["pid"], signal.SIGTERM)
        with trio.fail_after(5):
            assert await reader.wait() != 0
            await session.wait_closed()
        await call(unmount, k.root)


async def test_garbage_does_not_hurt_the_holder(image: ImageOnDisk, tmp_path: Path) -> None:
    async with kept(image, tmp_path) as k:
        session = await k.start()
        attach(session, k.root)
        for garbage in (
            b"\xff",
            b"[]",
            b"{}",
            b'{"op":"hold","id":"x","device":1}',
            b'{"op":"take"}',
            b'{"op":7}',
            b"1",
        ):
            with await k.holder._connect() as channel:
                await channel.send(garbage)
                assert b"error" in await channel.recv(4096)
        with pytest.raises(MountUnavailable):
            await k.holder._ask({"op": "take", "id": "nothing"})
        assert list(await k.holder.held()) == [ID]
        assert await call((k.root / "here").read_bytes) == CONTENT
        await call(unmount, k.root)
        await session.wait_closed()
