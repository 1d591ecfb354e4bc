"""Segment files as pyfuse3 operations: what the kernel's EROFS reads when the page cache has nothing.

Runs in the segment host. One file per segment of any image that is mounted, under a name that is never used again for
another segment: a cached page can never be stale. Reads wait for every chunk that they cover and are answered in full, since
EROFS would take a short answer for the end of the device. Bytes are never touched by Python, see `tree`. No handler may
raise anything but FUSEError.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

import pyfuse3
import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.errors import StateError
from p2pgz.image.reader import patched
from p2pgz.mount.kernel import MAX_TASKS
from p2pgz.mount.link import NodeLink
from p2pgz.pool.presence import Presence

log = logging.getLogger("p2pgz.segments")

FOREVER_SECONDS: Final = 1e8  # a name never comes to mean another file
BLOCK_BYTES: Final = 4096
# Reads of one image that may wait at a time, so that a hung image leaves handlers to the others; further ones wait for a
# place among them, and fail when there is none for long: the kernel repeats failed read-ahead when a reader needs it
WAITING_READS_MAX: Final = MAX_TASKS // 4
PLACE_SECONDS: Final = 5.0
# A node that takes a mount over has it served again within seconds; one whose mount it cannot take over never does
EXPECTED_SECONDS: Final = 60.0
UNUSED_FILES_KEPT: Final = 512  # their cached pages serve the next mount of the same layers


class File(Protocol):
    """A file of this file system; `name` is its only one, in the root."""

    ino: int
    name: bytes
    size: int

    async def read(self, offset: int, size: int) -> Any:  # any buffer will do; pyfuse3 says bytes
        """The bytes of a range, all that lie before the end."""

    def released(self) -> None:
        """The kernel has closed one of its opens."""


class HostedLink(NodeLink):
    """The link of one image among those of a segment host."""

    def __init__(
        self,
        presences: list[Presence],
        *,
        read_deadline_seconds: float,
        set_read_ahead: Callable[[int], object],
        invalidate: Callable[[int, int, int], object] = lambda segment, first, count: None,
    ) -> None:
        super().__init__(
            presences,
            read_deadline_seconds=read_deadline_seconds,
            set_read_ahead=set_read_ahead,
            invalidate=invalidate,
        )
        self.ended = False
        """the mount is gone: nobody answers here any more"""
        self._places = trio.Semaphore(WAITING_READS_MAX)

    async def ensure_chunks(self, segment: int, chunks: Sequence[int], unkept: dict[int, bytes]) -> int:
        """See NodeLink; one image cannot take all handlers."""
        with trio.move_on_after(PLACE_SECONDS) as scope:
            await self._places.acquire()
        if scope.cancelled_caught:
            return errno.EIO
        try:
            return errno.EIO if self.ended else await super().ensure_chunks(segment, chunks, unkept)
        finally:
            self._places.release()

    def end(self) -> None:
        """The mount is gone; readers of a segment that it shared are to ask elsewhere."""
        self.ended = True
        self.abandon()


class User(NamedTuple):
    """An image that has a segment: through which link to ask, and the number it has there."""

    link: HostedLink
    segment: int


class SegmentFile:
    """One segment. `users` are the mounted images that have it."""

    def __init__(
        self,
        ino: int,
        table: SegmentTable,
        data: memoryview,
        identity: tuple[int, int],
        on_failed_read: Callable[[int, int, int], None],
    ) -> None:
        self.ino = ino
        self.name = b"s%d" % ino
        self.size = table.segment_bytes
        self.table = table
        self.identity = identity
        """device and inode of the pool file: another one under the same path is another segment"""
        self.users: list[User] = []
        self._data = data
        self._on_failed_read = on_failed_read
        self._order: array[int] | None = None  # chunks by place, where that is not by number
        self._starts: array[int] | memoryview | None = None

    async def read(self, offset: int, size: int) -> Any:
        """All bytes of a range, waiting for what is missing."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        for each in self.users:  # whose reader it is cannot be seen here
            if each.link.first_reads is not None:
                each.link.first_reads.note(each.segment, self.chunks(offset, end))
        while True:
            user = next((user for user in self.users if user.link.connected), None)
            if user is None:
                if not self.users:
                    raise pyfuse3.FUSEError(errno.EIO)
                user = self.users[0]
            user.link.reads += 1
            chunks = self.chunks(offset, end)
            if self._has(user.link.presences[user.segment], chunks):
                break
            unkept: dict[int, bytes] = {}
            code = await user.link.ensure_chunks(user.segment, chunks, unkept)
            if not code and unkept:
                return patched(self._data[offset:end], offset, self.table, unkept)
            if not code:
                break
            if not user.link.ended:
                self._on_failed_read(self.ino, offset, end - offset)
                raise pyfuse3.FUSEError(code)
        # nothing is awaited between the look at the bits and pyfuse3's reply: eviction relies on it (see `roster`)
        return self._data[offset:end]

    def released(self) -> None:
        """Files of segments stay."""

    def chunks(self, offset: int, end: int) -> Sequence[int]:
        """The chunks of a range, by place."""
        if self._starts is None:
            self._sort()
        assert self._starts is not None
        starts = self._starts
        low = max(0, bisect_right(starts, offset) - 1)
        high = bisect_left(starts, end, low)
        return range(low, high) if self._order is None else self._order[low:high]

    def _sort(self) -> None:
        """Needed when something is missing for the first time, or a bit is looked at; some ms per 100 000 chunks."""
        starts = self.table.segment_offset
        if all(a <= b for a, b in pairwise(starts)):
            self._starts = starts
            return
        order = sorted(range(len(starts)), key=starts.__getitem__)
        self._order = array("I", order)
        self._starts = array("Q", [starts[n] for n in order])

    def _has(self, presence: Presence, chunks: Sequence[int]) -> bool:
        if self._order is None:
            return not chunks or presence.has_range(chunks[0], len(chunks))
        return all(map(presence.has, chunks))


class WatchFile:
    """A device without content: when the kernel closes it, the last user of a mount is gone."""

    size = BLOCK_BYTES

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.name = b"w%d" % ino
        self.gone = trio.Event()
        self.on_gone: Callable[[], object] = lambda: None
        """called before the kernel hears that its word was taken: a host that is killed after that has done this"""

    async def read(self, offset: int, size: int) -> Any:
        """Zeros; nothing points here."""
        await trio.lowlevel.checkpoint()
        return bytes(max(0, min(size, self.size - offset)))

    def released(self) -> None:
        """The mount has ended."""
        if not self.gone.is_set():
            self.on_gone()
            self.gone.set()


class SegmentOperations(pyfuse3.Operations):
    """A flat directory of files."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, *, on_init: Callable[[], None], resumes: bool = False) -> None:
        """`resumes`: the kernel has files open of which this process will be told one after the other."""
        super().__init__()
        self._on_init = on_init
        self._resumes = resumes
        self._files: dict[int, File] = {}
        self._inos: dict[bytes, int] = {}
        # no number of an earlier process on the same connection comes again: neither lives longer than the boot
        self._last_ino = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._added = trio.Event()
        self._released_early: set[int] = set()
        self.faults = 0

    def next_ino(self) -> int:
        """A number that no file had before."""
        self._last_ino += 1
        return self._last_ino

    def add(self, file: File) -> None:
        """From now on the kernel finds it."""
        self._files[file.ino] = file
        self._inos[file.name] = file.ino
        self._added.set()
        self._added = trio.Event()
        if file.ino in self._released_early:
            self._released_early.discard(file.ino)
            file.released()

    def get(self, ino: int) -> File | None:
        """The file of that number."""
        return self._files.get(ino)

    def remove(self, file: File) -> None:
        """Nothing has it open any more."""
        self._files.pop(file.ino, None)
        self._inos.pop(file.name, None)

    def init(self) -> None:
        """libfuse has read the greeting."""
        self._on_init()

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        file = self._files.get(ino)
        if file is None and ino != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.entry_timeout = entry.attr_timeout = FOREVER_SECONDS
        entry.st_mode = stat.S_IFDIR | 0o500 if file is None else stat.S_IFREG | 0o400
        entry.st_nlink = 1
        entry.st_size = 0 if file is None else file.size
        entry.st_blksize = BLOCK_BYTES
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Asked by mounts only."""
        return self._entry(self._inos.get(name, 0))

    async def getattr(self, ino: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """Sizes and little else."""
        return self._entry(ino)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Numbers are never used again."""

    async def opendir(self, ino: int, ctx: Any) -> int:
        """There is nothing to list for anybody."""
        return ino

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Empty."""

    async def open(self, ino: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """EROFS opens each device once, at mount."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        return pyfuse3.FileInfo(fh=ino, keep_cache=True)

    async def release(self, fh: int) -> None:
        """EROFS closes it when its superblock goes."""
        file = self._files.get(fh)
        if file is not None:
            file.released()
        elif self._resumes:
            self._released_early.add(fh)

    async def flush(self, fh: int) -> None:
        """Nothing is written."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def read(self, fh: int, off: int, size: int) -> Any:
        """See the file."""
        file = self._files.get(fh)
        if file is None and self._resumes:
            file = await self._expect(fh)
        if file is None:
            raise pyfuse3.FUSEError(errno.EIO)
        try:
            return await file.read(off, size)
        except pyfuse3.FUSEError:
            raise
        except Exception:
            self.faults += 1
            log.exception("a read of %s failed", file.name)
            raise pyfuse3.FUSEError(errno.EIO) from None

    async def _expect(self, ino: int) -> File | None:
        """Wait until this process is told of a file that the kernel has open."""
        with trio.move_on_after(EXPECTED_SECONDS):
            while ino not in self._files:
                await self._added.wait()
        return self._files.get(ino)

    async def access(self, ino: int, mode: int, ctx: Any) -> bool:
        """Only our own mounts come here."""
        return True


def map_file(path: str, need_bytes: int | None = None) -> tuple[memoryview, tuple[int, int]]:
    """Map a file for reading, of a segment its whole address range; returns the map and which file it is of."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        length = status.st_size if need_bytes is None else need_bytes
        if status.st_size < length:
            raise StateError(
                f"{path}: {status.st_size} bytes instead of {length}", hint="the pool was damaged"
            )
        view = (
            memoryview(mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)) if length else memoryview(b"")
        )
        return view, (status.st_dev, status.st_ino)
    finally:
        os.close(fd)
