"""May this kernel be trusted with EROFS whose devices can fail? A test by experiment, run in the segment host.

Kernels from 6.12 on, until a fix that stable trees took at different times, mark pages of a read that ended short as read:
they then hold zeros. A version number says nothing about distributions' kernels, so a small image is mounted whose device
fails half way (EIO), and whose reader is killed half way. One zero byte among the answers, then or later, and erofs mode is
off on this host. That the scratch file lies where real metadata does also finds out whether this disk can hold them.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final, Protocol

import pyfuse3
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import FileExtent
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.errors import P2pgzError
from p2pgz.image.erofs import write_metadata
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree
from p2pgz.mount.erofs_mount import ErofsMount
from p2pgz.mount.hosting import SelfTested
from p2pgz.mount.segments import SegmentOperations, WatchFile

log = logging.getLogger("p2pgz.segments")

FILE_BYTES: Final = 512 << 10
HALF_BYTES: Final = FILE_BYTES // 2
PAGE_BYTES: Final = 4096
FILL: Final = 0xA5
ROUNDS: Final = 2
STEP_SECONDS: Final = 5.0
_BROKEN, _KILLED = b"broken", b"killed"
_READER: Final = "import sys; open(sys.argv[1], 'rb', 0).read()"  # where there is no dd


class Host(Protocol):
    """What is used of `SegmentHost`."""

    operations: SegmentOperations

    def make_mount(self, metadata_path: str, devices: list[str]) -> Awaitable[ErofsMount]:
        """Mount EROFS."""

    def path_of(self, name: bytes) -> str:
        """Where to find a file of ours."""


class FaultyFile:
    """A device of two files of which the second halves fail: of the first with EIO, of the second by silence."""

    size = 2 * FILE_BYTES

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.name = b"t%d" % ino
        self.asked = trio.Event()
        self.healed = trio.Event()

    async def read(self, offset: int, size: int) -> Any:
        """Right bytes, or a failure."""
        end = min(offset + size, self.size)
        if not self.healed.is_set():
            if offset < FILE_BYTES and end > HALF_BYTES:
                raise pyfuse3.FUSEError(errno.EIO)
            if end > FILE_BYTES + HALF_BYTES:
                self.asked.set()
                await self.healed.wait()
        return bytes([FILL]) * max(0, end - offset)

    def released(self) -> None:
        """It goes with the test."""


async def run(host: Host, folder: str) -> SelfTested:
    """Make the experiment; never raises but on cancellation."""
    try:
        for _ in range(ROUNDS):
            fault = await _round(host, folder)
            if fault:
                return SelfTested(False, fault)
    except trio.TooSlowError:
        return SelfTested(False, f"the self-test of EROFS was not done in {STEP_SECONDS:g} s", False)
    except P2pgzError as error:
        return SelfTested(False, error.what)
    except OSError as error:
        return SelfTested(False, f"the self-test of EROFS could not be made: {error}", False)
    return SelfTested(True, "")


async def _round(host: Host, folder: str) -> str:
    """One mount of the image; returns what is wrong, or nothing."""
    path = os.path.join(folder, f"self-test-{os.getpid()}.p2pgz-erofs")  # noqa: PTH118
    operations = host.operations
    device, watch = FaultyFile(operations.next_ino()), WatchFile(operations.next_ino())
    operations.add(device)
    operations.add(watch)
    try:
        with open(path, "wb") as file:  # noqa: ASYNC230, PTH123  # a few KiB, before anything is mounted
            file.write(_metadata())
        mount = await host.make_mount(path, [host.path_of(device.name), host.path_of(watch.name)])
        try:
            return await _experiment(device, f"/proc/{os.getpid()}/fd/{mount.mount_fd}")
        finally:
            device.healed.set()
            os.close(mount.mount_fd)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STEP_SECONDS):
                await watch.gone.wait()
    finally:
        with suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        operations.remove(device)
        operations.remove(watch)


async def _experiment(device: FaultyFile, root: str) -> str:
    broken, killed = f"{root}/{_BROKEN.decode()}", f"{root}/{_KILLED.decode()}"
    with trio.fail_after(STEP_SECONDS):
        if not await _call(_never_zero, broken):
            return "this kernel shows zeros where the device of an EROFS mount fails"
        reader = await trio.lowlevel.open_process(
            _reader(killed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            await device.asked.wait()
        finally:
            reader.send_signal(signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await reader.wait()
        device.healed.set()
        for path in (broken, killed):
            if not await _call(_is_right, path):
                return "this kernel keeps zeros where a read of an EROFS mount was cut short"
    return ""


def _reader(path: str) -> list[str]:
    """A program that reads all of a file at once; an interpreter takes ten times as long to start as dd does."""
    dd = shutil.which("dd")
    return [dd, f"if={path}", f"bs={FILE_BYTES}"] if dd else [sys.executable, "-I", "-S", "-c", _READER, path]


async def _call(function: Any, path: str) -> bool:
    """In a thread: this loop answers the reads."""
    return bool(await trio.to_thread.run_sync(function, path, abandon_on_cancel=True))


def _never_zero(path: str) -> bool:
    """Errors are as they should be; bytes that come must be right."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for size in (FILE_BYTES, PAGE_BYTES):
            for offset in range(0, FILE_BYTES, size):
                try:
                    found = os.pread(fd, size, offset)
                except OSError:
                    continue
                if found.strip(bytes([FILL])):
                    return False
    finally:
        os.close(fd)
    return True


def _is_right(path: str) -> bool:
    """The device is well again: every byte must be there, by every way of reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = b"".join(os.pread(fd, PAGE_BYTES, offset) for offset in range(0, FILE_BYTES, PAGE_BYTES))
    finally:
        os.close(fd)
    return found == bytes([FILL]) * FILE_BYTES


def _metadata() -> bytearray:
    digest = Digest.of(b"self-test")
    entries = [
        Entry(
            name=name,
            kind="reg",
            mode=0o400,
            size=FILE_BYTES,
            chunks=(Chunk(Digest.of(name).raw, 0, FILE_BYTES, n * FILE_BYTES, (n + 1) * FILE_BYTES, 0),),
        )
        for n, name in enumerate((_BROKEN, _KILLED))
    ]
    extents = {n: FileExtent(n * FILE_BYTES, n, 1) for n in range(len(entries))}
    tree = TreeFile(build_tree(merge_layers([LayerInput(Toc(digest, entries), extents, digest)])))
    return write_metadata(tree)
