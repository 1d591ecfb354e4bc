"""What the pool asks of the operating system: chunk bytes in and out, durability, and whether a place is fit.

`Disk` is a port, and all that the pool changes on the disk goes through it: tests pass one that fails on
purpose, or that keeps the record from which crashes are made. Its calls block; the pool decides what runs in
a thread. Errors of the system leave as OSError; the pool gives them their names.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2pgz.errors import PoolFull, StateError, StateInUse

if TYPE_CHECKING:
    from typing_extensions import Buffer

# linux/falloc.h
_FALLOC_FL_KEEP_SIZE: Final = 0x01
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
# linux/fs.h; the request numbers of x86_64 and arm64
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NODUMP_FL: Final = 0x40
# linux/magic.h and the file systems' own headers. Memory-backed and overlay file systems lose the pool with
# the machine or the container; the network ones give no coherent mmap, no hole punching, or locks that lie.
_UNFIT_FILE_SYSTEMS: Final = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlayfs",
    0x6969: "NFS",
    0x0BD00BD0: "Lustre",
    0x517B: "SMB",
    0xFF534D42: "SMB",
    0xFE534D42: "SMB",
    0x00C36400: "CephFS",
    0x47504653: "GPFS",
    0x5346414F: "AFS",
    0x01021997: "9p",
}
# https://bford.info/cachedir/: backup programs skip directories that hold a file starting with this
_CACHEDIR_TAG: Final = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Chunks of container images, kept by p2pgz. All of it can be fetched again.\n"
)
_NO_PUNCHING: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})
_ELSEWHERE: Final = "choose a directory on a local disk with --state-dir, for example below /var/tmp"
_HINTS: Final = {
    errno.EROFS: "mount its file system read-write, or choose another directory with --state-dir",
    errno.EACCES: "see its owner and mode, or choose another directory with --state-dir",
    errno.EPERM: "see its owner, mode and attributes, or choose another directory with --state-dir",
    errno.ENOTDIR: "choose another directory with --state-dir",
    errno.EEXIST: "choose another directory with --state-dir",
}
_FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_PROBE_BYTES: Final = 8192
# Copying file systems set aside many times what a new name takes
_SHARE_BYTES: Final = 256 << 10
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_libc.statfs.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


class Disk:
    """The real thing."""

    sqlite_vfs: str = "unix-excl"
    """what SQLite does its own changes through. This one keeps the map of the log in memory, for one process: in a mapped
    file, a page for which a copying file system finds no room would end us (SIGBUS)"""

    def create(self, path: Path) -> int:
        """A new file in place of what has this name, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def mkdir(self, path: Path) -> None:
        """Make a directory for its owner only, unless it is there."""
        path.mkdir(mode=0o700, exist_ok=True)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of what has that name; durable with the directory's sync."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Take a name away, if it is there; durable with the directory's sync."""
        path.unlink(missing_ok=True)

    def truncate(self, fd: int, size: int) -> None:
        """Give a file this size."""
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        """Make what was written durable, and what the inode says."""
        os.fsync(fd)

    def sync_directory(self, directory: Path) -> None:
        """Make creations, renames and removals in it durable."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def stamp(self, fd: int) -> str:
        """Tells whether a file is the one it was, untouched."""
        status = os.fstat(fd)
        return f"{status.st_ino}.{status.st_size}.{status.st_mtime_ns}"

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written

    def fdatasync(self, fd: int) -> None:
        """Make what was written durable. After a failure nothing written before may be taken as durable."""
        os.fdatasync(fd)

    def copy(self, source_fd: int, source_offset: int, fd: int, offset: int, count: int) -> None:
        """Copy between files, by reflink where the file system can."""
        while count:
            try:
                copied = os.copy_file_range(source_fd, fd, count, source_offset, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                data = os.pread(source_fd, min(count, 1 << 20), source_offset)
                self.pwrite(fd, data, offset)
                copied = len(data)
            if copied == 0:
                raise OSError(errno.ENODATA, "the source file ends inside the chunk")
            source_offset += copied
            offset += copied
            count -= copied

    def punch(self, fd: int, offset: int, count: int) -> None:
        """Give the space of a range back; it reads as zeros afterwards."""
        if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, count) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


_REAL_DISK: Final = Disk()


def read_fully(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes at `offset`; fewer only at the end of the file."""
    data = os.pread(fd, count, offset)
    if len(data) == count or not data:
        return data
    parts = [data]
    got = len(data)
    while got < count and (data := os.pread(fd, count - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def is_full(error: OSError) -> bool:
    """Whether the disk, a quota or a file size limit had no room."""
    return means_full(error.errno)


def means_full(code: int | None) -> bool:
    """Whether an errno says so."""
    return code in _FULL_ERRNOS


def named(error: OSError, what: str) -> PoolFull | StateError:
    """The error of ours for one of the system's."""
    if is_full(error):
        hint = "free some space, or raise the disk quota or the limit on file sizes of the node"
        return PoolFull(f"{what}: {error.strerror}", hint=hint)
    hint = _HINTS.get(error.errno or 0, "see the kernel log; the disk may be failing")
    return StateError(f"{what}: {error.strerror}", hint=hint)


def file_system_type(directory: Path) -> int:
    """`f_type` of statfs(2)."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes on 64-bit Linux
    if _libc.statfs(os.fsencode(directory), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(directory))
    return int(struct.unpack_from("=q", buffer)[0]) & 0xFFFFFFFF


def refuse_unfit_file_system(directory: Path) -> None:
    """Raise StateError when the pool would be lost, or wrong, or could never shrink, on the file system of `directory`."""
    name = _UNFIT_FILE_SYSTEMS.get(file_system_type(directory))
    if name is not None:
        raise StateError(f"{directory} is on {name}, which cannot hold the pool", hint=_ELSEWHERE)
    path = directory / ("holes" + TEMPORARY_SUFFIX)
    disk = Disk()
    try:
        fd = disk.create(path)
    except OSError as error:
        if is_full(error):  # it cannot tell, and was asked when it was not full
            return
        raise
    try:
        disk.unlink(path)
        disk.pwrite(fd, bytes(_PROBE_BYTES), 0)
        disk.punch(fd, 0, _PROBE_BYTES // 2)
    except OSError as error:
        if error.errno in _NO_PUNCHING:
            raise StateError(
                f"{directory} is on a file system that punches no holes, so nothing could be evicted",
                hint=_ELSEWHERE,
            ) from error
        if not is_full(error):
            raise
    finally:
        os.close(fd)


def keep_others_out(directory: Path) -> bool:
    """Take others' right to write from a directory, so that nobody changes bytes after they were verified; returns whether
    they had it. Raises StateError when it is another user's."""
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise StateError(
            f"{directory} belongs to user {status.st_uid}, and this node runs as user {os.geteuid()}",
            hint="change its owner, or choose another directory with --state-dir",
        )
    if not status.st_mode & _OTHERS_WRITE:
        return False
    directory.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
    return True


def mark_as_cache(directory: Path, disk: Disk) -> None:
    """Tell backup and dump programs to leave the pool alone; best effort."""
    tag = directory / "CACHEDIR.TAG"
    with contextlib.suppress(OSError):
        if not tag.exists():
            write_durably(tag, _CACHEDIR_TAG, disk)
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = bytearray(8)
            fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
            value = struct.unpack_from("=I", flags)[0] | _FS_NODUMP_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=Q", value))
        finally:
            os.close(fd)


def write_durably(path: Path, data: Buffer, disk: Disk = _REAL_DISK) -> None:
    """Create or replace a file so that after a crash it has the old bytes or the new, never a part."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    fd = disk.create(temporary)
    try:
        disk.pwrite(fd, data, 0)
        disk.fsync(fd)
    finally:
        os.close(fd)
    disk.replace(temporary, path)


TEMPORARY_SUFFIX: Final = ".tmp"


class Reserve:
    """Room kept on the disk for the index, so that a pool that filled the disk can still restart and shrink."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.is_there = False
        """whether some of it is reserved now"""

    def fill(self) -> None:
        """Take the room, or the half or a quarter of it that there is; best effort. Blocks."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self.is_there = _allocate(fd)
                if not self.is_there:
                    self._path.unlink()
            finally:
                os.close(fd)

    def share(self) -> None:
        """Give the room up when there is none besides: a node that starts has sockets to make. Blocks."""
        probe = self._path.with_name("room" + TEMPORARY_SUFFIX)
        try:
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _SHARE_BYTES)
            finally:
                os.close(fd)
                probe.unlink()
        except OSError as error:
            if is_full(error):
                self.release()

    def release(self) -> bool:
        """Give the room up; false when it was given up before."""
        self.is_there = False
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True


# The log of a restart and some removals; SQLite's log stays below 4 MiB (1000 pages) in between
RESERVE_BYTES: Final = 8 << 20
# What was given up is used by and by, and others may take the rest: whatever is left of it is worth having
RESERVE_SIZES: Final = (RESERVE_BYTES, RESERVE_BYTES // 2, RESERVE_BYTES // 4, RESERVE_BYTES // 8)


def _allocate(fd: int) -> bool:
    """Give the file the largest of the reserve's sizes for which there is room; false when there is none."""
    for size in RESERVE_SIZES:
        had = os.fstat(fd).st_size
        if had >= size:
            return True
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.ftruncate(fd, had)  # part of it may have been found
        else:
            return True
    return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file of a state directory; raises StateError naming the process that holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StateInUse(
                f"{path.parent} is in use by another node (process {holder})",
                hint="stop that node, or give this one its own --state-dir",
            ) from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if not is_full(error):  # the lock is what counts; the number is for people
                raise
        yield
    finally:
        os.close(fd)
