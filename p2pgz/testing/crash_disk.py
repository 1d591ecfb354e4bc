"""A disk that writes everything done to a state directory into a `CrashLog`: the pool's own calls and SQLite's.

Given to `Pool.open(disk=…)`. Syncs are recorded, not done: what they mean is up to the log, and the tests are fast. The
shared-memory file of SQLite's log is never synced and made anew by whoever comes first, so it is not recorded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from p2pgz.pool.disk import Disk
from p2pgz.testing.crash_log import DIRECTORY, TOP, CrashLog

if TYPE_CHECKING:
    from typing_extensions import Buffer

_numbers = itertools.count()
_JOURNALS = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL


class RecordingDisk(Disk):
    """The disk below `root`, which has what `log.live` says. Use it as long as `recording` lasts."""

    def __init__(self, root: Path, log: CrashLog) -> None:
        self.root = root
        self.log = log
        self.during_sync: Callable[[], None] = lambda: None
        """called, in its thread, between the begin and the end of a file's sync"""
        self.is_full = False
        """SQLite's files do not grow until some space is given back"""
        self._by_inode: dict[int, int] = {}
        for directory, names in log.live.names.items():
            for name, file in names.items():
                if file != DIRECTORY:
                    self._by_inode[(root / directory / name).stat().st_ino] = file
        self.vfs = RecordingVfs(self, f"crash-{next(_numbers)}")
        self.sqlite_vfs = self.vfs.name

    def place(self, path: Path) -> tuple[str, str]:
        """Directory and name of a path, as the log knows them."""
        directory = path.parent.relative_to(self.root).as_posix()
        return (TOP if directory == "." else directory), path.name

    def file(self, fd: int) -> int:
        """The number of an open file."""
        return self._by_inode[os.fstat(fd).st_ino]

    def create(self, path: Path) -> int:
        """Create and record."""
        with self.log.lock:
            fd = super().create(path)
            self._by_inode[os.fstat(fd).st_ino] = self.log.create(*self.place(path))
            return fd

    def mkdir(self, path: Path) -> None:
        """Make and record, if it is not there."""
        with self.log.lock:
            if not path.exists():
                super().mkdir(path)
                directory, name = self.place(path)
                self.log.name(directory, {name: DIRECTORY})

    def replace(self, source: Path, target: Path) -> None:
        """Rename and record."""
        with self.log.lock:
            super().replace(source, target)
            directory, old = self.place(source)
            same, new = self.place(target)
            assert directory == same, "the log knows renames inside a directory only"
            self.log.name(directory, {old: None, new: self.log.lookup(directory, old)})

    def unlink(self, path: Path) -> None:
        """Unlink and record."""
        with self.log.lock:
            directory, name = self.place(path)
            super().unlink(path)
            if self.log.lookup(directory, name) is not None:
                self.log.name(directory, {name: None})

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write and record."""
        with self.log.lock:
            super().pwrite(fd, data, offset)
            self.log.write(self.file(fd), offset, data)

    def copy(self, source_fd: int, source_offset: int, fd: int, offset: int, count: int) -> None:
        """Copy, and record what was written."""
        with self.log.lock:
            super().copy(source_fd, source_offset, fd, offset, count)
            self.log.write(self.file(fd), offset, os.pread(fd, count, offset))

    def truncate(self, fd: int, size: int) -> None:
        """Truncate and record."""
        with self.log.lock:
            super().truncate(fd, size)
            self.log.truncate(self.file(fd), size)

    def punch(self, fd: int, offset: int, count: int) -> None:
        """Punch and record."""
        with self.log.lock:
            super().punch(fd, offset, count)
            self.is_full = False
            self.log.punch(self.file(fd), offset, count)

    def fsync(self, fd: int) -> None:
        """Record only."""
        begin = self.log.begin_sync()
        self.during_sync()
        self.log.synced(self.file(fd), begin)

    def fdatasync(self, fd: int) -> None:
        """Record only."""
        self.fsync(fd)

    def sync_directory(self, directory: Path) -> None:
        """Record only."""
        begin = self.log.begin_sync()
        self.log.directory_synced(self.place(directory / "any")[0], begin)

    def stamp(self, fd: int) -> str:
        """Always the same for a file: the worst that times and inode numbers can do is to hide a change."""
        return f"{self.file(fd)}.{os.fstat(fd).st_size}"


@contextmanager
def recording(
    root: Path, log: CrashLog, kind: type[RecordingDisk] = RecordingDisk
) -> Iterator[RecordingDisk]:
    """A disk that records."""
    disk = kind(root, log)
    try:
        yield disk
    finally:
        disk.vfs.unregister()


class RecordingVfs(apsw.VFS):
    """SQLite's own VFS, recorded."""

    def __init__(self, disk: RecordingDisk, name: str) -> None:
        super().__init__(name, "")
        self.name = name
        self.disk = disk

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        """Files of the state directory are recorded, SQLite's temporary ones are not."""
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is None:
            return apsw.VFSFile("", name, flags)
        with self.disk.log.lock:
            directory, leaf = self.disk.place(Path(path))
            file = self.disk.log.lookup(directory, leaf)
            opened = RecordedFile(self.disk, name, flags, directory)
            if file is None:
                file = self.disk.log.create(directory, leaf)
                opened.syncs_name = bool(flags[0] & _JOURNALS)
            opened.file = file
            return opened

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802
        """Unlink and record."""
        with self.disk.log.lock:
            super().xDelete(name, sync_directory)
            directory, leaf = self.disk.place(Path(name))
            if self.disk.log.lookup(directory, leaf) is not None:
                self.disk.log.name(directory, {leaf: None})
            if sync_directory:
                self.disk.log.directory_synced(directory, self.disk.log.begin_sync())


class RecordedFile(apsw.VFSFile):
    """A database, its log or its journal."""

    def __init__(
        self, disk: RecordingDisk, name: str | apsw.URIFilename | None, flags: list[int], directory: str
    ) -> None:
        super().__init__("", name, flags)
        self._disk = disk
        self._log = disk.log
        self._directory = directory
        self.file = 0
        self.syncs_name = False
        """its first sync is of its directory too: SQLite does so for the journals it makes"""

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        """Write and record."""
        if self._disk.is_full:
            raise apsw.FullError("no room, says the test")
        with self._log.lock:
            super().xWrite(data, offset)
            self._log.write(self.file, offset, data)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        """Truncate and record."""
        with self._log.lock:
            super().xTruncate(size)
            self._log.truncate(self.file, size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        """Record only."""
        with self._log.lock:
            begin = self._log.begin_sync()
            self._log.synced(self.file, begin)
            if self.syncs_name:
                self.syncs_name = False
                self._log.directory_synced(self._directory, begin)
