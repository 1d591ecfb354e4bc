"""A disk that fails on purpose, for the pool's tests."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from p2pgz.pool.disk import Disk

if TYPE_CHECKING:
    from typing_extensions import Buffer

STUCK_SECONDS = 30


class FaultyDisk(Disk):
    """`room_bytes` bytes can be written, then the disk is full. `fail_syncs` syncs fail with EIO, then they work.

    `before_sync` and `before_punch` are called at the start of those; `punched` lists what was given back.
    """

    def __init__(self, *, room_bytes: int | None = None, fail_syncs: int = 0) -> None:
        self.room_bytes = room_bytes
        self.errno = errno.ENOSPC
        """what it says when it is full"""
        self.fail_syncs = fail_syncs
        self.before_sync: Callable[[], None] = lambda: None
        self.before_punch: Callable[[], None] = lambda: None
        self.syncs = 0
        self.copies = 0
        self.punched: list[tuple[int, int]] = []

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write what there is room for, then fail, as a real disk does."""
        view = memoryview(data).cast("B")
        if self.room_bytes is not None and len(view) > self.room_bytes:
            super().pwrite(fd, view[: self.room_bytes], offset)
            self.room_bytes = 0
            raise OSError(self.errno, os.strerror(self.errno))
        super().pwrite(fd, view, offset)
        if self.room_bytes is not None:
            self.room_bytes -= len(view)

    def fdatasync(self, fd: int) -> None:
        """Sync, or fail as often as told."""
        self.before_sync()
        self.syncs += 1
        if self.fail_syncs:
            self.fail_syncs -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)

    def copy(self, source_fd: int, source_offset: int, fd: int, offset: int, count: int) -> None:
        """Copy and count."""
        self.copies += 1
        super().copy(source_fd, source_offset, fd, offset, count)

    def punch(self, fd: int, offset: int, count: int) -> None:
        """Punch and remember."""
        self.before_punch()
        self.punched.append((offset, count))
        super().punch(fd, offset, count)


class StuckDisk(FaultyDisk):
    """Its writes hang until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Wait for the gate, for half a minute at most; then write."""
        assert self.gate.wait(STUCK_SECONDS), "nobody opened the gate"
        super().pwrite(fd, data, offset)
