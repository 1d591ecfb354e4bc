"""The segments of a pool: finds them in the index and on the disk, opens and makes them, repairs what is damaged.

Owned by `pool.Pool`. What the disk has lost against the index (a truncated or missing file) is absent; what
the index has lost (a new or older index) is adopted from the files, to be checked when first used. A damaged
table is written again when its TOC is opened. Must never set a presence bit that is not covered by a clean
stop.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import apsw
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.errors import P2pgzError, StateError
from p2pgz.pool.commit import complete_files, erase
from p2pgz.pool.disk import TEMPORARY_SUFFIX, Disk, named
from p2pgz.pool.index import Index, SegmentRow
from p2pgz.pool.presence import Presence, is_bitmap, iterate_bits
from p2pgz.pool.segment import (
    DATA_SUFFIX,
    SHARED_DOMAIN,
    TABLE_SUFFIX,
    Segment,
    SegmentMeta,
    checked_starts,
    chunks_with_data,
    create_files,
    map_table,
    starts_of,
)

log = structlog.get_logger(component="pool")

# The largest file of ext4 with 4 KiB blocks; segments are sparse, so a hostile TOC can ask for much
MAX_SEGMENT_BYTES = 16 << 40
# the 8 bytes a table begins with: kind and version of the layout
_MAGIC_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment of the index that is not open."""

    row: int
    domain: str
    id: Digest


class Shelf:
    """All segments, open or not. Opening one that exists is synchronous (about 0.1 ms and 1 ms/MB of table)."""

    def __init__(self, directory: Path, index: Index, committing: trio.Lock, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._index = index
        self._committing = committing
        self._open: dict[int, Segment] = {}
        self._rows: dict[tuple[str, Digest], int] = {}
        self._making = trio.Lock()
        self._broken: set[int] = set()
        for row in index.segments():
            self._rows[row.domain, Digest(row.id)] = row.row

    def __len__(self) -> int:
        return len(self._rows)

    def opened(self) -> list[Segment]:
        """The open ones."""
        return list(self._open.values())

    def get(self, domain: str, segment_id: Digest) -> Segment | None:
        """A segment of this pool by name, opened if need be."""
        row = self._rows.get((domain, segment_id))
        return None if row is None else self.by_row(row)

    def by_row(self, row: int) -> Segment | None:
        """The same by its row in the index; None for one that cannot be opened (logged once)."""
        segment = self._open.get(row)
        if segment is None and row not in self._broken:
            try:
                segment = self._load(row)
            except (P2pgzError, OSError) as error:
                self._broken.add(row)
                log.error("pool.segment_unusable", row=row, reason=str(error))
        return segment

    async def open(self, source: SegmentLayout | bytes, meta: SegmentMeta) -> Segment:
        """Open or make the segment of a layout or of a segment table's bytes."""
        if isinstance(source, SegmentLayout):
            content = await trio.to_thread.run_sync(source.to_bytes)
            starts = await trio.to_thread.run_sync(starts_of, source)
        else:
            content, starts = bytes(source), array("I")
        table = SegmentTable(content)
        if table.segment_bytes > MAX_SEGMENT_BYTES:
            raise StateError(
                f"segment {table.id} would have {table.segment_bytes} bytes: too many for a file"
            )
        async with self._making:
            segment = self.get(meta.domain, table.id)
            if segment is None:
                return await self._make(content, table, starts, meta)
            if not segment.has_table(content):
                raise StateError(
                    f"segment {table.id} exists with another table",
                    hint="two documents claim one digest; delete the one in the pool while no node runs, mount again",
                )
            if starts and not segment.file_starts:
                await self._learn_files(segment, starts)
            return segment

    def _paths(self, domain: str, segment_id: Digest) -> tuple[Path, Path]:
        name = segment_id.hex
        if domain != SHARED_DOMAIN:
            name += "-" + hashlib.sha256(domain.encode()).hexdigest()[:16]
        return self._directory / (name + TABLE_SUFFIX), self._directory / (name + DATA_SUFFIX)

    def _load(self, row: int) -> Segment:
        known = self._index.segment(row)
        if known is None:
            raise StateError(f"segment {row} is not in the index")
        table_path, data_path = self._paths(known.domain, Digest(known.id))
        buffer = map_table(table_path)
        if hashlib.sha256(buffer).digest() != known.table_digest:
            raise StateError(f"{table_path} is damaged", hint="it is made again from the TOC")
        meta = SegmentMeta(
            domain=known.domain,
            blob_digest=Digest(known.blob_digest) if known.blob_digest is not None else None,
            blob_bytes=known.blob_bytes,
            source=known.source,
        )
        data_fd = os.open(data_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            table = SegmentTable(buffer)
            size = os.fstat(data_fd).st_size
            if size < table.segment_bytes:  # the map below must not reach past the end of the file
                log.error(
                    "pool.segment_truncated", file=str(data_path), size=size, expected=table.segment_bytes
                )
                self._disk.truncate(data_fd, table.segment_bytes)
            starts = checked_starts(known.file_starts, table.chunk_count)
            segment = Segment(
                buffer,
                data_fd=data_fd,
                path=data_path,
                table_path=table_path,
                meta=meta,
                row=row,
                file_starts=starts,
            )
        except BaseException:
            os.close(data_fd)
            raise
        self._recall(segment, known, size)
        self._open[row] = segment
        return segment

    def _recall(self, segment: Segment, known: SegmentRow, size: int) -> None:
        """Take over what the index remembers, as far as the data file reaches."""
        segment.native_served = bool(known.native_served)
        if not is_bitmap(known.present, segment.table.chunk_count):
            return
        segment.take_record(known.present, known.held_bytes)
        if size < segment.table.segment_bytes:
            self._cut(segment, size)
        elif self._index.distrusts_bitmaps:
            pass
        elif known.verified is not None and known.stamp == self._disk.stamp(segment.data_fd):
            both = int.from_bytes(known.verified, "little") & int.from_bytes(known.present, "little")
            segment.presence.load(both.to_bytes(len(known.present), "little"))

    def _cut(self, segment: Segment, size: int) -> None:
        """Chunks that lie past the end of what was left of a data file are absent."""
        table = segment.table
        for n in iterate_bits(segment.on_record.to_bytes()):
            if table.segment_offset[n] + table.size[n] > size:
                segment.on_record.clear(n)
        segment.held_bytes = segment.bytes_of(iterate_bits(segment.on_record.to_bytes()))

    async def _make(
        self, content: bytes, table: SegmentTable, starts: array[int], meta: SegmentMeta
    ) -> Segment:
        """Make a segment's files and row, or make whole what of them is missing or damaged."""
        table_path, data_path = self._paths(meta.domain, table.id)
        key = meta.domain, table.id
        row = self._rows.get(key)
        known = self._index.segment(row) if row is not None else None

        def prepare() -> tuple[int, mmap.mmap | bytes]:
            try:
                old = table_path.read_bytes()
            except FileNotFoundError:
                old = b""
            if old and old[:_MAGIC_BYTES] != content[:_MAGIC_BYTES]:
                # another version's addresses: its bytes would lie in what must be holes here
                self._disk.unlink(data_path)
            size = data_path.stat().st_size if data_path.exists() else 0
            create_files(
                table_path, data_path, None if old == content else content, table.segment_bytes, self._disk
            )
            return size, map_table(table_path)

        try:
            size, buffer = await trio.to_thread.run_sync(prepare)
            data_fd = os.open(data_path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise named(error, f"segment {table.id} cannot be made in {self._directory}") from error
        segment = Segment(
            buffer, data_fd=data_fd, path=data_path, table_path=table_path, meta=meta, file_starts=starts
        )
        try:
            if known is not None:
                self._recall(segment, known, size)
                # whatever was wrong, the bytes are to be looked at before they are used
                segment.presence.load(bytes(segment.presence.bitmap_bytes))
            elif size:
                found = await trio.to_thread.run_sync(chunks_with_data, data_fd, table)
                segment.take_record(found, segment.bytes_of(iterate_bits(found)))
                if size < table.segment_bytes:
                    self._cut(segment, size)
                segment.adopted = True
                log.warning("pool.adopted", file=str(data_path), chunks=segment.on_record.present_count())
            segment.row = await self._index.write(lambda connection: _insert(connection, segment, content))
        except BaseException:
            segment.close()
            raise
        self._rows[key] = segment.row
        self._broken.discard(segment.row)
        self._open[segment.row] = segment
        return segment

    async def _learn_files(self, segment: Segment, starts: array[int]) -> None:
        """The TOC of an adopted segment has been opened: now its files are known too."""
        segment.file_starts = starts
        async with self._committing:
            record = segment.on_record

            def change(connection: apsw.Connection) -> None:
                connection.execute(
                    "UPDATE segments SET file_starts = ? WHERE row = ?", (starts.tobytes(), segment.row)
                )
                if segment.adopted:  # nothing of it has been seen since; its files come with its chunks
                    return
                connection.executemany(
                    "INSERT OR IGNORE INTO files VALUES(?, ?, ?, ?, ?, ?)", complete_files(segment, record)
                )

            await self._index.write(change)

    def sweep(self) -> None:
        """Delete what a crash left half made, and count the files that no row knows. Blocks."""
        for path in self._directory.glob("*" + TEMPORARY_SUFFIX):
            self._disk.unlink(path)
        orphans = self.orphans()
        if orphans:
            log.warning(
                "pool.orphans",
                files=len(orphans),
                bytes=sum(orphans.values()),
                effect="taken in and checked when their images are mounted; else delete them while no node runs",
            )

    def orphans(self) -> dict[Path, int]:
        """Files without a row in the index, and the space they take: an index was lost or is an old copy.

        They are not used by name alone, since only the TOC tells whether their table is right; `open` takes
        them in.
        """
        known = {path for domain, segment_id in self._rows for path in self._paths(domain, segment_id)}
        return {
            path: path.stat().st_blocks * 512
            for path in self._directory.iterdir()
            if path.suffix in (DATA_SUFFIX, TABLE_SUFFIX) and path not in known
        }

    async def remove_orphans(self) -> int:
        """Delete them; returns the space they took."""
        async with self._making:  # a segment that is being made has files before it has a row
            orphans = self.orphans()
            for path in orphans:
                self._disk.unlink(path)
        return sum(orphans.values())

    async def forget(self, segment: Segment) -> None:
        """Take a segment out of the index, durably, then delete its files. Its space comes back when it is closed."""
        async with self._committing:

            def change(connection: apsw.Connection) -> None:
                record = Presence.private(segment.table.chunk_count)
                record.load(segment.on_record.to_bytes())
                erase(connection, segment, range(segment.table.chunk_count), record, 0)
                connection.execute("DELETE FROM heat WHERE segment = ?", (segment.row,))
                connection.execute("DELETE FROM segments WHERE row = ?", (segment.row,))

            await self._index.write(change, durable=True)
            segment.on_record.load(bytes(segment.on_record.bitmap_bytes))
        del self._rows[segment.domain, segment.id]
        del self._open[segment.row]
        for path in (segment.table_path, segment.path):
            self._disk.unlink(path)

    async def seal(self) -> None:
        """Write down what has been verified; the last thing before a clean stop."""
        states = [
            (
                (
                    int.from_bytes(segment.presence.to_bytes(), "little")
                    & int.from_bytes(segment.on_record.to_bytes(), "little")
                ).to_bytes(segment.presence.bitmap_bytes, "little"),
                self._disk.stamp(segment.data_fd),
                segment.row,
            )
            for segment in self._open.values()
        ]
        await self._index.write(
            lambda connection: connection.executemany(
                "UPDATE segments SET verified = ?, stamp = ? WHERE row = ?", states
            )
        )

    def close(self) -> None:
        """Close all that is open."""
        for segment in self._open.values():
            segment.close()
        self._open.clear()


def _insert(connection: apsw.Connection, segment: Segment, content: bytes) -> int:
    """Write the row of a segment that was just made, or made whole."""
    meta, table = segment.meta, segment.table
    columns = {
        "domain": meta.domain,
        "id": table.id.raw,
        "segment_bytes": table.segment_bytes,
        "chunk_count": table.chunk_count,
        "compression": table.compression,
        "blob_digest": meta.blob_digest.raw if meta.blob_digest is not None else None,
        "blob_bytes": meta.blob_bytes,
        "source": meta.source,
        "table_digest": hashlib.sha256(content).digest(),
        "file_starts": segment.file_starts.tobytes(),
        "present": segment.on_record.to_bytes(),
        "held_chunks": segment.on_record.present_count(),
        "held_bytes": segment.held_bytes,
    }
    names = ", ".join(columns)
    updates = ", ".join(f"{name} = excluded.{name}" for name in columns)
    sql = (
        f"INSERT INTO segments({names}) VALUES({', '.join('?' * len(columns))})"  # names of ours
        f" ON CONFLICT(domain, id) DO UPDATE SET {updates}, verified = NULL RETURNING row"
    )
    ((row,),) = list(connection.execute(sql, tuple(columns.values())))
    return int(row)
