"""One layer's chunk bytes: a sparse file with the layout of its segment table, mapped for reading.

`pool.Pool` opens segments and is the only one to write them; the mount and `cat` read slices of the map,
without a copy. Addresses never change their meaning, a file is never shrunk, and chunks of zeros stay holes.
Nothing here decides what is present: that is the bitmap, and who sets its bits is the pool.

Must not import apsw (the `fs` process reads segments too). Design, section 3.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import FileExtent, SegmentLayout, SegmentTable
from p2pgz.core.model import ChunkKind
from p2pgz.errors import ChunkMissing, StateError
from p2pgz.pool.disk import Disk, write_durably
from p2pgz.pool.presence import Presence, iterate_bits

SHARED_DOMAIN = "shared"
DATA_SUFFIX = ".seg"
TABLE_SUFFIX = ".chunks"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentMeta:
    """What the index keeps about a segment besides its table."""

    domain: str = SHARED_DOMAIN
    blob_digest: Digest | None = None
    blob_bytes: int = 0
    source: str = ""
    """which kind of layer: estargz, zstd:chunked, plain, …"""


class Segment:
    """An open segment. Made by the pool; stays valid until the pool closes.

    `presence` says what may be read now. `file_starts` has the first chunk of every file, ascending; it is
    empty for a segment that was found on disk and whose TOC has not been opened since.
    """

    def __init__(
        self,
        table_buffer: mmap.mmap | bytes,
        *,
        data_fd: int,
        path: Path,
        table_path: Path,
        meta: SegmentMeta,
        row: int = 0,
        file_starts: array[int] | None = None,
    ) -> None:
        self.table = SegmentTable(table_buffer)
        self.id = self.table.id
        self.meta = meta
        self.domain = meta.domain
        self.data_fd = data_fd
        self.path = path
        self.table_path = table_path
        self.row = row
        self.table_fd = -1
        """a descriptor of the table to close with the segment, if it has no file of its own"""
        self.native_served = False
        self.adopted = False
        """found on disk without a row: the index may know more or less than the file has"""
        self.file_starts = file_starts if file_starts is not None else array("I")
        self.presence = Presence.create(self.table.chunk_count)
        self.on_record = Presence.private(self.table.chunk_count)
        self.held_bytes = 0
        self.unsynced: set[int] = set()
        self.unsynced_bytes = 0
        self.used_at = array("I", bytes(4 * self.table.chunk_count))
        """when each chunk came or was asked for, in tenths of a second of the monotonic clock; 0: in an earlier run"""
        self.lost_syncs = 0
        """how often a sync failed: what was written before it and is not yet synced cannot be trusted"""
        self._table_buffer = table_buffer
        self._bytes = self.table.segment_bytes
        self._map = mmap.mmap(data_fd, self._bytes, mmap.MAP_SHARED, mmap.PROT_READ) if self._bytes else None
        self._view = memoryview(self._map) if self._map is not None else memoryview(b"")
        self._busy: Counter[int] = Counter()
        self._removing: set[int] = set()
        self._changed = trio.Event()
        self._counted_bits, self._counted_bytes = 0, 0

    @cached_property
    def all_bytes(self) -> int:
        """Uncompressed bytes of all chunks."""
        return self.bytes_of(range(self.table.chunk_count))

    def present_bytes(self) -> int:
        """How many of them are here. Asked each second by whoever watches: looks only at what has changed since."""
        bits = int.from_bytes(self.presence.to_bytes(), "little")
        for now, then, sign in ((bits, self._counted_bits, 1), (self._counted_bits, bits, -1)):
            changed = now & ~then
            changed_bytes = changed.to_bytes((changed.bit_length() + 7) // 8, "little")
            self._counted_bytes += sign * self.bytes_of(iterate_bits(changed_bytes))
        self._counted_bits = bits
        return self._counted_bytes

    def has_table(self, content: bytes) -> bool:
        """Whether these are the bytes of its table."""
        return self._table_buffer[:] == content  # comparing memoryviews goes item by item

    def recorded(self, n: int) -> bool:
        """Whether the index has chunk `n` here. Without its presence bit, `Pool.revive` it first."""
        return self.on_record.has(n)

    def holds(self, first: int, count: int) -> bool:
        """Whether these chunks exist and all of them are on record."""
        return first + count <= self.table.chunk_count and self.on_record.has_range(first, count)

    def view(self, n: int) -> memoryview:
        """The bytes of chunk `n`, not copied; raises ChunkMissing when it is not present."""
        if not self.presence.has(n):
            raise ChunkMissing(f"chunk {n} of segment {self.id} is not in the pool")
        return self.file_view(self.table.segment_offset[n], self.table.size[n])

    def file_view(self, offset: int, size: int) -> memoryview:
        """Bytes of the segment; the caller has asked `presence`. Raises ChunkMissing past the file's end.

        Looks at the size first, since touching a page past the end of a mapped file kills the process.
        """
        end = offset + size
        if offset < 0 or size < 0 or end > self._bytes or os.fstat(self.data_fd).st_size < end:
            raise ChunkMissing(
                f"{self.path}: the file is shorter than its table says",
                hint="something else than p2pgz changed it; its chunks are fetched again after a restart",
            )
        return self._view[offset:end]

    def file_of(self, n: int) -> FileExtent | None:
        """The file that chunk `n` belongs to, if the files are known."""
        starts = self.file_starts
        if not starts:
            return None
        index = bisect_right(starts, n) - 1
        first = starts[index]
        end = starts[index + 1] if index + 1 < len(starts) else self.table.chunk_count
        return FileExtent(self.table.segment_offset[first], first, end - first)

    def bytes_of(self, chunks: Iterable[int]) -> int:
        """Their sizes added up, as the disk sees it: chunks of zeros take no space."""
        size, kind = self.table.size, self.table.kind
        return sum(size[n] for n in chunks if kind[n] != ChunkKind.ZEROS)

    def touch(self, chunks: Iterable[int]) -> None:
        """Note that these were needed just now."""
        now = tenths_now()
        for n in chunks:
            self.used_at[n] = now

    def take_record(self, bitmap: bytes, held_bytes: int) -> None:
        """Set what the index says is here."""
        self.on_record.load(bitmap)
        self.held_bytes = held_bytes

    def is_busy(self, n: int) -> bool:
        """Whether somebody writes, copies, reads or removes a chunk just now."""
        return n in self._busy or n in self._removing

    async def claim(self, chunks: Collection[int]) -> None:
        """Keep chunks from being removed until `release`; waits while one of them is."""
        while not self._removing.isdisjoint(chunks):
            await self._changed.wait()
        for n in chunks:
            self._busy[n] += 1

    def release(self, chunks: Iterable[int]) -> None:
        """Undo `claim`."""
        for n in chunks:
            self._busy[n] -= 1
            if self._busy[n] == 0:
                del self._busy[n]
        self._wake()

    async def begin_removal(self, chunks: Collection[int]) -> list[int]:
        """Clear bits once nobody writes or copies the chunks; nobody starts to until `end_removal`. Returns those
        that were set."""
        while not self._removing.isdisjoint(chunks):
            await self._changed.wait()
        self._removing.update(chunks)
        try:
            while any(n in self._busy for n in chunks):
                await self._changed.wait()
        except BaseException:
            self.end_removal(chunks)
            raise
        cleared = [n for n in chunks if self.presence.has(n)]
        for n in cleared:
            self.presence.clear(n)
        return cleared

    def end_removal(self, chunks: Iterable[int]) -> None:
        """Undo `begin_removal`, except for the bits."""
        self._removing.difference_update(chunks)
        self._wake()

    def _wake(self) -> None:
        if self._changed.statistics().tasks_waiting:
            self._changed.set()
            self._changed = trio.Event()

    def take_file(self, data_fd: int) -> None:
        """Go on with another, empty file; nothing is present. Slices that somebody still holds keep the old one."""
        old_fd, old_map, old_view = self.data_fd, self._map, self._view
        self._map = mmap.mmap(data_fd, self._bytes, mmap.MAP_SHARED, mmap.PROT_READ) if self._bytes else None
        self._view = memoryview(self._map) if self._map is not None else memoryview(b"")
        self.data_fd = data_fd
        old_view.release()
        with contextlib.suppress(BufferError):
            if old_map is not None:
                old_map.close()
        os.close(old_fd)

    def close(self) -> None:
        """Close descriptors and unmap; slices that somebody still holds keep the map until they are gone."""
        if self.data_fd < 0:
            return
        self._view.release()
        with contextlib.suppress(BufferError):
            if self._map is not None:
                self._map.close()
        os.close(self.data_fd)
        self.data_fd = -1
        if self.table_fd >= 0:
            os.close(self.table_fd)
            self.table_fd = -1
        self.presence.close()


def tenths_now() -> int:
    """The clock of `Segment.used_at`."""
    return int(time.monotonic() * 10)


def starts_of(layout: SegmentLayout) -> array[int]:
    """The first chunk of each file of a layout, ascending."""
    return array("I", sorted(extent.first_chunk for extent in layout.extents.values()))


def checked_starts(raw: bytes, chunk_count: int) -> array[int]:
    """The same as the index keeps it; empty when it cannot be of a segment with so many chunks."""
    starts = array("I")
    if len(raw) % starts.itemsize == 0:
        starts.frombytes(raw)
    ascending = all(a < b for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] >= chunk_count or not ascending:
        return array("I")
    return starts


def map_table(path: Path) -> mmap.mmap | bytes:
    """A segment table file, mapped; raises StateError when it is empty, OSError when it cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise StateError(f"{path} is empty", hint="it is made again from the TOC")
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)


def create_files(
    table_path: Path, data_path: Path, table: bytes | None, segment_bytes: int, disk: Disk
) -> None:
    """Write a segment's files where needed; `table` is None when the one on disk is right. Blocks on fsync.

    The data file gets its full size at once and never another one.
    """
    if not data_path.exists():
        write_durably(data_path, b"", disk)
    fd = os.open(data_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != segment_bytes:
            disk.truncate(fd, segment_bytes)
            disk.fsync(fd)
    finally:
        os.close(fd)
    if table is not None:
        write_durably(table_path, table, disk)
    disk.sync_directory(table_path.parent)


def chunks_with_data(data_fd: int, table: SegmentTable) -> bytes:
    """A bitmap of the chunks that have allocated bytes: the most that a file of unknown history can hold."""
    found = Presence.private(table.chunk_count)
    order = sorted(range(table.chunk_count), key=table.segment_offset.__getitem__)
    end = os.fstat(data_fd).st_size
    index, at = 0, 0
    while at < end and index < len(order):
        try:
            start = os.lseek(data_fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole follows
            break
        at = os.lseek(data_fd, start, os.SEEK_HOLE)
        while index < len(order) and table.segment_offset[order[index]] < at:
            n = order[index]
            chunk_end = table.segment_offset[n] + table.size[n]
            if chunk_end > start and chunk_end <= end:
                found.set(n)
            index += 1
    return found.to_bytes()
