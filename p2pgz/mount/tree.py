"""A merged tree as pyfuse3 operations: names and attributes from the mapped tree file, bytes from mapped segments.

Runs in the `fs` process. Bytes of a segment are never touched by Python, only handed to the kernel as slices of the map,
so a damaged pool file costs its reader an EIO and never this process its life (SIGBUS). No handler may raise anything but
FUSEError: pyfuse3 would end the whole session.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

import pyfuse3

from p2pgz.core.layout import SegmentTable
from p2pgz.image.reader import patched
from p2pgz.image.treefile import TreeFile
from p2pgz.mount.link import NodeLink

log = logging.getLogger("p2pgz.fs")

FOREVER_SECONDS: Final = 1e8  # names and attributes never change
BLOCK_BYTES: Final = 4096
# An entry costs 223 B (pyfuse3's struct); a `find` over a large tree must not leave all of them behind
ENTRIES_KEPT: Final = 4096
NAME_MAX_BYTES: Final = 255
_DOT, _DOTDOT = 0, 1  # the first two positions of every directory listing
_FIRST_NAME: Final = 2

P = ParamSpec("P")
R = TypeVar("R")


class Segment(NamedTuple):
    """What is needed of a segment to answer reads."""

    table: SegmentTable
    data: memoryview


class _OpenFile:
    """What a read needs to know of its file."""

    __slots__ = ("base", "chunk_count", "first_chunk", "opened", "segment", "size", "view")

    def __init__(
        self, segment: int, base: int, size: int, first_chunk: int, chunk_count: int, view: memoryview
    ) -> None:
        self.segment = segment
        self.base = base
        self.size = size
        self.first_chunk = first_chunk
        self.chunk_count = chunk_count
        self.view = view
        self.opened = 0


def _guarded(
    handler: Callable[Concatenate[TreeOperations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[TreeOperations, P], Coroutine[Any, Any, R]]:
    """Turn a bug, or a damaged tree file, into EIO for one caller."""

    async def guard(self: TreeOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception:
            self.faults += 1
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    functools.update_wrapper(guard, handler)
    return guard


class TreeOperations(pyfuse3.Operations):
    """Read-only: pyfuse3's defaults refuse the rest, and the kernel refuses it before (the mount is ro)."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        tree: TreeFile,
        segments: Sequence[Segment],
        link: NodeLink,
        *,
        on_init: Callable[[], None],
        on_failed_read: Callable[[int, int, int], None],
    ) -> None:
        super().__init__()
        self._tree = tree
        self._segments = segments
        self._link = link
        self._on_init = on_init
        self._on_failed_read = on_failed_read
        self._entries: dict[int, pyfuse3.EntryAttributes] = {}
        self._files: dict[int, _OpenFile] = {}
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = FOREVER_SECONDS
        self._absent.attr_timeout = FOREVER_SECONDS
        self.faults = 0

    def init(self) -> None:
        """libfuse has read the greeting."""
        self._on_init()

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = self._entries.get(ino)
        if entry is not None:
            return entry
        inode = self._tree.inode(ino)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.entry_timeout = FOREVER_SECONDS
        entry.attr_timeout = FOREVER_SECONDS
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blksize = BLOCK_BYTES
        entry.st_blocks = (inode.size + 511) // 512
        entry.st_atime_ns = entry.st_ctime_ns = entry.st_mtime_ns = inode.mtime_ns
        if len(self._entries) >= ENTRIES_KEPT:
            self._entries.clear()  # cheaper than keeping an order, and as good: the kernel caches what is used
        self._entries[ino] = entry
        return entry

    @_guarded
    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        self._link.lookups += 1
        ino = self._tree.lookup(parent, name)
        return self._entry(ino) if ino else self._absent

    @_guarded
    async def getattr(self, ino: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(ino)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inodes are permanent."""

    @_guarded
    async def readlink(self, ino: int, ctx: Any) -> bytes:
        return self._tree.readlink(ino)

    @_guarded
    async def opendir(self, ino: int, ctx: Any) -> int:
        return ino

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        reply = pyfuse3.readdir_reply
        if start_id <= _DOT and not reply(token, b".", self._entry(fh), _DOT + 1):
            return
        if start_id <= _DOTDOT and not reply(token, b"..", self._entry(self._tree.parent(fh)), _DOTDOT + 1):
            return
        for name, ino, position in self._tree.entries(fh, max(0, start_id - _FIRST_NAME)):
            if not reply(token, name, self._entry(ino), position + _FIRST_NAME):
                return

    async def releasedir(self, fh: int) -> None:
        """Nothing was kept."""

    @_guarded
    async def open(self, ino: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EROFS)
        self._file(ino).opened += 1
        return pyfuse3.FileInfo(fh=ino, keep_cache=True)

    @_guarded
    async def release(self, fh: int) -> None:
        file = self._files.get(fh)
        if file is not None:
            file.opened -= 1
            if file.opened <= 0:
                del self._files[fh]

    async def flush(self, fh: int) -> None:
        """Nothing is written. ENOSYS stops the kernel from asking at every close."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    def _file(self, ino: int) -> _OpenFile:
        file = self._files.get(ino)
        if file is None:
            extent = self._tree.extent(ino)
            if extent is None:
                file = _OpenFile(0, 0, 0, 0, 0, memoryview(b""))
            else:
                size = self._tree.inode(ino).size
                segment = self._segments[extent.segment]
                end = extent.segment_offset + size
                if (
                    end > len(segment.data)
                    or extent.first_chunk + extent.chunk_count > segment.table.chunk_count
                ):
                    raise ValueError(f"inode {ino} is beyond the end of its segment")
                view = segment.data[extent.segment_offset : end]
                file = _OpenFile(
                    extent.segment, extent.segment_offset, size, extent.first_chunk, extent.chunk_count, view
                )
            self._files[ino] = file
        return file

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> Any:  # any buffer will do; pyfuse3 says bytes
        self._link.reads += 1
        file = self._files.get(fh) or self._file(fh)
        end = min(off + size, file.size)
        if off >= end:
            return b""
        first, count = file.first_chunk, file.chunk_count
        if count > 1:
            starts = self._segments[file.segment].table.segment_offset
            stop = first + count
            low = bisect_right(starts, file.base + off, first, stop) - 1
            high = bisect_right(starts, file.base + end - 1, low, stop)
            first, count = low, high - low
        if self._link.first_reads is not None:
            self._link.first_reads.note(file.segment, range(first, first + count))
        if not self._link.presences[file.segment].has_range(first, count):
            unkept: dict[int, bytes] = {}
            code = await self._link.ensure(file.segment, first, count, unkept)
            if code:
                self._on_failed_read(fh, off, end - off)
                raise pyfuse3.FUSEError(code)
            if unkept:
                segment = self._segments[file.segment]
                start = file.base + off
                return patched(segment.data[start : file.base + end], start, segment.table, unkept)
        # nothing is awaited between the look at the bits and pyfuse3's reply: eviction relies on it (see `roster`)
        return file.view[off:end]

    @_guarded
    async def getxattr(self, ino: int, name: bytes, ctx: Any) -> bytes:
        value = self._tree.xattrs(ino).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @_guarded
    async def listxattr(self, ino: int, ctx: Any) -> Sequence[bytes]:
        return list(self._tree.xattrs(ino))

    @_guarded
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_BYTES
        answer.f_blocks = (self._tree.total_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = self._tree.inode_count
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = NAME_MAX_BYTES
        return answer

    async def access(self, ino: int, mode: int, ctx: Any) -> bool:
        """The kernel checks by itself (default_permissions)."""
        return True
