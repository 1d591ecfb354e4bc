"""A record of everything that was done to a directory, from which the states that a power failure could leave are made.

`crash_disk` writes it, `crash_states` reads it. The model is more cruel than any one file system, so that what holds here
holds on all of them: until a file is synced any of its 512-byte sectors may be on the disk or not, in any order, across all
files; a name that was made, changed or removed may be either way until its directory is synced; only a single rename is
one step. Syncing a file covers what was written before the sync began, and says nothing of its name.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

SECTOR_BYTES: Final = 512  # what a disk writes as a whole, and what SQLite relies on
DIRECTORY: Final = -1
"""stands for a directory where a name usually leads to a file"""
TOP: Final = ""
"""the recorded directory itself; others by their path below it"""


class FileState:
    """The bytes of a file; sectors that are not there are holes."""

    __slots__ = ("sectors", "size")

    def __init__(self, sectors: dict[int, bytes] | None = None, size: int = 0) -> None:
        self.sectors = sectors if sectors is not None else {}
        self.size = size

    def copy(self) -> FileState:
        """One that can be changed on its own."""
        return FileState(dict(self.sectors), self.size)

    def changed_by_write(self, offset: int, data: memoryview) -> dict[int, bytes | None]:
        """The sectors that a write touches, as they are after it."""
        changed: dict[int, bytes | None] = {}
        at, end = offset, offset + len(data)
        while at < end:
            number, inside = divmod(at, SECTOR_BYTES)
            count = min(SECTOR_BYTES - inside, end - at)
            piece = bytes(data[at - offset : at - offset + count])
            if count < SECTOR_BYTES:
                old = self.sectors.get(number, b"").ljust(SECTOR_BYTES, b"\0")
                piece = old[:inside] + piece + old[inside + count :]
            changed[number] = piece
            at += count
        return changed

    def changed_by_hole(self, offset: int, count: int) -> dict[int, bytes | None]:
        """The sectors that punching a hole touches, as they are after it."""
        changed: dict[int, bytes | None] = {}
        end = offset + count
        for number in range(offset // SECTOR_BYTES, (end + SECTOR_BYTES - 1) // SECTOR_BYTES):
            start = number * SECTOR_BYTES
            if offset <= start and start + SECTOR_BYTES <= end:
                changed[number] = None
            elif number in self.sectors:
                low, high = max(0, offset - start), min(SECTOR_BYTES, end - start)
                old = self.sectors[number]
                changed[number] = old[:low] + bytes(high - low) + old[high:]
        return changed

    def apply(self, change: Change, only: set[int] | None = None) -> None:
        """Make a change, or just these sectors of it."""
        if change.truncates:
            self.size = change.size
            last, inside = divmod(change.size, SECTOR_BYTES)
            for number in [n for n in self.sectors if n > last or (n == last and not inside)]:
                del self.sectors[number]
            if inside and last in self.sectors:
                self.sectors[last] = self.sectors[last][:inside].ljust(SECTOR_BYTES, b"\0")
            return
        for number, content in change.sectors.items():
            if only is not None and number not in only:
                continue
            if content is None:
                self.sectors.pop(number, None)
            else:
                self.sectors[number] = content
        self.size = max(self.size, change.size)


@dataclass(frozen=True, slots=True)
class Change:
    """A write, a punched hole, or a change of size; durable with the file's next sync."""

    file: int
    sectors: dict[int, bytes | None]
    """as they are after it"""
    size: int
    """the file is at least so large after it; exactly so after a truncation"""
    truncates: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """Names that come to mean other files, or none, in one step; durable with the directory's next sync."""

    directory: str
    names: dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Synced:
    """A file's sync returned; it covers the entries before `begin`."""

    file: int
    begin: int
    at: float


@dataclass(frozen=True, slots=True)
class DirectorySynced:
    """A directory's sync returned; it covers the entries before `begin`."""

    directory: str
    begin: int


@dataclass(frozen=True, slots=True)
class Note:
    """What the workload has to say: time passed, or a fact that is to be checked after a crash."""

    at: float
    fact: object = None


Entry = Change | Naming | Synced | DirectorySynced | Note


@dataclass(slots=True)
class Image:
    """The content of a disk: files by number, and names by directory."""

    files: dict[int, FileState] = field(default_factory=dict)
    names: dict[str, dict[str, int]] = field(default_factory=lambda: {TOP: {}})

    def copy(self) -> Image:
        """A copy of which the names can be changed; the files are shared, so copy one before changing it."""
        return Image(dict(self.files), {directory: dict(names) for directory, names in self.names.items()})

    def rename(self, naming: Naming) -> None:
        """Let names mean what they mean after `naming`."""
        names = self.names.setdefault(naming.directory, {})
        for name, file in naming.names.items():
            if file is None:
                names.pop(name, None)
            else:
                names[name] = file


class CrashLog:
    """The record of one life of a directory, from the boot after a crash (`base`) on. Threads may write it."""

    def __init__(self, base: Image | None = None) -> None:
        self.base = base if base is not None else Image()
        self.live = self.base.copy()
        self.live.files = {number: state.copy() for number, state in self.base.files.items()}
        self.entries: list[Entry] = []
        self.lock = threading.RLock()
        """held while something is done and written down, so that a sync is never recorded before what it covers"""
        self.now = 0.0
        """the workload's clock, in seconds"""
        self._next_file = max(self.base.files, default=0) + 1

    def create(self, directory: str, name: str) -> int:
        """A new, empty file under this name; its number."""
        with self.lock:
            file = self._next_file
            self._next_file += 1
            self.live.files[file] = FileState()
            self.name(directory, {name: file})
            return file

    def write(self, file: int, offset: int, data: Buffer) -> None:
        """Bytes were written."""
        view = memoryview(data).cast("B")
        if view:
            state = self.live.files[file]
            self._change(Change(file, state.changed_by_write(offset, view), offset + len(view)))

    def punch(self, file: int, offset: int, count: int) -> None:
        """A hole was punched; the size stays."""
        self._change(Change(file, self.live.files[file].changed_by_hole(offset, count), 0))

    def truncate(self, file: int, size: int) -> None:
        """The size was set."""
        self._change(Change(file, {}, size, truncates=True))

    def name(self, directory: str, names: dict[str, int | None]) -> None:
        """Names changed in one step."""
        with self.lock:
            naming = Naming(directory, names)
            self.entries.append(naming)
            self.live.rename(naming)

    def begin_sync(self) -> int:
        """What is recorded now is covered by the sync that begins."""
        with self.lock:
            return len(self.entries)

    def synced(self, file: int, begin: int) -> None:
        """That sync returned without an error."""
        with self.lock:
            self.entries.append(Synced(file, begin, self.now))

    def directory_synced(self, directory: str, begin: int) -> None:
        """That sync of a directory returned without an error."""
        with self.lock:
            self.entries.append(DirectorySynced(directory, begin))

    def note(self, fact: object = None) -> None:
        """Write down a fact of the workload's, or just the time."""
        with self.lock:
            self.entries.append(Note(self.now, fact))

    def lookup(self, directory: str, name: str) -> int | None:
        """The file that has this name now."""
        return self.live.names.get(directory, {}).get(name)

    def _change(self, change: Change) -> None:
        with self.lock:
            self.live.files[change.file].apply(change)
            self.entries.append(change)
