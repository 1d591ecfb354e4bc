"""An ordinary user's mount, through fusermount3.

The process becomes that user, with a /dev/fuse that everybody may open (as distributions have it), in a mount namespace
of its own, so that nothing of this is seen outside.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2pgz.errors import MountUnavailable
from p2pgz.mount.session import FsHost, FsSession
from tests.e2e.mount.image_on_disk import CHUNK_BYTES, ImageOnDisk, Supplier, run

pytestmark = [pytest.mark.root, pytest.mark.trio, pytest.mark.tools("fusermount3", "nsenter")]

NOBODY = 65534
CONTENT = b"z" * (3 * CHUNK_BYTES)
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


# Everything is imported before the user changes: root's Python may be unreadable for others, hence no zygote here.
BECOME_NOBODY = f"""
import ctypes, os, socket, sys
from p2pgz.mount import fs
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare({CLONE_NEWNS}) == 0
assert libc.mount(b"none", b"/", None, {MS_REC | MS_PRIVATE}, None) == 0
assert libc.mount(os.fsencode(sys.argv[2]), b"/dev/fuse", None, {MS_BIND}, None) == 0
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
os._exit(fs.run(socket.socket(fileno=int(sys.argv[1]))))
"""


class UnprivilegedSpawner:
    """Stands in for the zygote: starts a process that gives up everything before it becomes an `fs`."""

    def __init__(self, device: Path) -> None:
        self.device = device
        self.processes: list[subprocess.Popen[bytes]] = []

    async def fork(self, channel: socket.socket) -> None:
        command = [sys.executable, "-c", BECOME_NOBODY, str(channel.fileno()), str(self.device)]
        await trio.lowlevel.checkpoint()
        self.processes.append(subprocess.Popen(command, pass_fds=(channel.fileno(),)))

    def stop(self) -> None:
        for process in self.processes:
            process.wait(10)


@pytest.fixture
def spawner(tmp_path: Path) -> UnprivilegedSpawner:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    device = tmp_path / "fuse"
    os.mknod(device, 0o020666, os.makedev(10, 229))
    device.chmod(0o666)
    return UnprivilegedSpawner(device)


@pytest.fixture
def image(tmp_path: Path) -> ImageOnDisk:
    image = ImageOnDisk(tmp_path / "image")
    image.add(b"file", "reg", CONTENT)
    image.add(b"setuid", "reg", b"", mode=0o4755)
    return image.write()


async def test_ordinary_user_mounts_reads_and_unmounts(
    spawner: UnprivilegedSpawner, image: ImageOnDisk, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, NOBODY, NOBODY)
    async with FsHost.open() as host:
        host.spawner = spawner  # type: ignore[assignment]
        session: FsSession = await host.start_session(
            image.options(directory=str(root)), Supplier(image).ensure
        )
        assert session.mount_fd == -1
        inside = (
            "nsenter",
            f"--mount=/proc/{session.pid}/ns/mnt",
            f"--setuid={NOBODY}",
            f"--setgid={NOBODY}",
        )
        done = await run(*inside, "cat", root / "file")
        assert done.stdout == CONTENT
        done = await run(*inside, "grep", "fuse.p2pgz", "/proc/self/mountinfo")
        assert b"ro,nosuid,nodev" in done.stdout
        assert b"registry.example/test:1" in done.stdout
        done = await run(*inside, "fusermount3", "-u", root)
        assert done.returncode == 0, done.stderr
        with trio.fail_after(5):
            await session.wait_closed()


@pytest.mark.parametrize("what", ["not the user's directory", "no directory", "suid"])
async def test_what_a_user_may_not_do_is_said(
    spawner: UnprivilegedSpawner, image: ImageOnDisk, tmp_path: Path, what: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if what == "suid":
        os.chown(root, NOBODY, NOBODY)
    async with FsHost.open() as host:
        host.spawner = spawner  # type: ignore[assignment]
        options = image.options(directory="" if what == "no directory" else str(root), suid=what == "suid")
        with pytest.raises(MountUnavailable) as caught:
            await host.start_session(options, Supplier(image).ensure)
        print(caught.value)
        assert caught.value.hint


async def test_host_without_fuse_says_what_to_do(
    spawner: UnprivilegedSpawner, image: ImageOnDisk, tmp_path: Path
) -> None:
    spawner.device.chmod(0o600)
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, NOBODY, NOBODY)
    async with FsHost.open() as host:
        host.spawner = spawner  # type: ignore[assignment]
        with pytest.raises(MountUnavailable) as caught:
            await host.start_session(image.options(directory=str(root)), Supplier(image).ensure)
        assert "/dev/fuse" in str(caught.value)
        assert "p2pgz cat" in str(caught.value)
