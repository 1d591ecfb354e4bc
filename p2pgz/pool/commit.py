"""Makes chunks durable in groups: fdatasync first, then one index transaction for all of them.

Owned by `pool.Pool`. What a failed sync covers becomes absent and stays so: the kernel reports a lost write
once and then calls the pages clean, so a second sync that succeeds says nothing (design, section 3, and the
fsync behaviour of Linux since 4.13). Must never mark anything durable whose sync did not return well.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator

import apsw
import structlog
import trio

from p2pgz.core.content import content_key
from p2pgz.core.layout import FileExtent
from p2pgz.core.model import MAX_CHUNK_BYTES, Chunk
from p2pgz.errors import P2pgzError
from p2pgz.pool.disk import Disk
from p2pgz.pool.index import Index
from p2pgz.pool.presence import Presence
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="pool")

# A crash loses at most this much of what was fetched, and a sync is paid once for all of it (0.6–2.2 ms each
# for small chunks when done one by one)
COMMIT_INTERVAL_SECONDS = 1.0
COMMIT_BYTES = 64 << 20
# and of many small ones, because about 2 us of work for each is done on the event loop
COMMIT_CHUNKS = 4096
# The index of a full disk: tried again after 2, 4, 8, … seconds
RETRY_MAX_SECONDS = 60.0
# Fetching waits for the disk beyond this, so that a slow one cannot gather dirty pages without end
UNSYNCED_MAX_BYTES = 256 << 20
# A content key of several chunks is a digest over rows of size (8 bytes, little-endian) and digest. A file
# that *is* such a list has the same name, so what looks like one is not offered as content: it could pass for
# another file.
_KEY_ROW_BYTES = 40

FileRow = tuple[bytes, int, int, int, int, int]
"""key, segment row, segment offset, first chunk, chunk count, size"""


class Committer:
    """Gathers written chunks and commits them; `run` is its task. What others wrote to the index it makes durable too."""

    def __init__(self, disk: Disk, index: Index, limiter: trio.CapacityLimiter) -> None:
        self._disk = disk
        self._index = index
        self._limiter = limiter
        self._dirty: dict[int, Segment] = {}
        self._fresh: dict[tuple[str, bytes], tuple[Segment, int]] = {}
        self._unrecorded: dict[int, tuple[Segment, set[int]]] = {}
        """synced, but the index could not say so: part of the next commit"""
        self._full = trio.Event()
        self._some = trio.Event()
        self._drained = trio.Event()
        self._flushing = trio.Lock()
        index.on_unsynced = lambda: self._some.set()
        self.committing = trio.Lock()
        """held from the last look at presence bits to the end of the index transaction that relies on it"""
        self.syncing = False
        """a sync is running: even small writes may wait for the journal, so they go to a thread"""
        self.unsynced_bytes = 0
        self.sync_failures = 0
        self.commits = 0

    def note(self, segment: Segment, n: int) -> None:
        """Chunk `n` was written and its bit is set; it will be part of the next commit."""
        size = segment.table.size[n]
        segment.unsynced.add(n)
        segment.unsynced_bytes += size
        self._dirty[segment.row] = segment
        self._fresh[segment.domain, segment.table.digest(n)] = (segment, n)
        self.unsynced_bytes += size
        self._some.set()
        if self.unsynced_bytes >= COMMIT_BYTES or len(self._fresh) >= COMMIT_CHUNKS:
            self._full.set()

    def find(self, domain: str, digest: bytes) -> tuple[Segment, int] | None:
        """A chunk that is not in the index yet."""
        return self._fresh.get((domain, digest))

    async def wait_for_room(self) -> None:
        """Wait while too much is unsynced."""
        while self.unsynced_bytes > UNSYNCED_MAX_BYTES:
            self._drained = trio.Event() if self._drained.is_set() else self._drained
            await self._drained.wait()

    async def run(self) -> None:
        """Commit every second, or sooner when there is much. Runs until cancelled."""
        failures = 0
        while True:
            await self._some.wait()
            with trio.move_on_after(COMMIT_INTERVAL_SECONDS):
                await self._full.wait()
            self._some = (
                trio.Event()
            )  # only here: a flush that replaced it would leave this task waiting for the old one
            try:
                await self.flush()
            except P2pgzError as error:
                if not failures:
                    log.error("pool.commit_failed", reason=str(error), effect="it is tried again")
                failures += 1
                await trio.sleep(min(RETRY_MAX_SECONDS, COMMIT_INTERVAL_SECONDS * 2**failures))
                self._some.set()
            except Exception:
                log.exception("pool.bug")
            else:
                failures = 0

    async def flush(self) -> None:
        """Make durable what was written before the call; raises when the index cannot be written.

        Once begun it is not cancelled: half of it would leave chunks that nobody commits any more. The disk
        bounds it.
        """
        async with self._flushing:
            with trio.CancelScope(shield=True):
                await self._flush()

    async def _flush(self) -> None:
        self._full = trio.Event()
        dirty, self._dirty = self._dirty, {}
        batches: list[tuple[Segment, list[int]]] = []
        try:
            for segment in dirty.values():
                batch = await self._sync(segment)
                if batch or segment.row in self._unrecorded:
                    _, left = self._unrecorded.pop(segment.row, (segment, set()))
                    batches.append((segment, list(left.union(batch))))
            batches += [(segment, list(left)) for segment, left in self._unrecorded.values()]
            self._unrecorded.clear()
            try:
                await self._commit(batches)
            except P2pgzError:
                self._unrecorded = {segment.row: (segment, set(batch)) for segment, batch in batches}
                raise
        finally:
            for segment, batch in batches:
                self._forget(segment, batch)
            self._drained.set()

    async def _sync(self, segment: Segment) -> list[int]:
        """The chunks of a segment that are durable now."""
        batch = list(segment.unsynced)
        segment.unsynced.clear()
        self.unsynced_bytes -= segment.unsynced_bytes
        segment.unsynced_bytes = 0
        try:
            self.syncing = True
            await trio.to_thread.run_sync(self._disk.fdatasync, segment.data_fd, limiter=self._limiter)
        except OSError as error:
            # also what was written while the sync ran: the failure may have been of its pages
            lost = [*batch, *segment.unsynced]
            segment.unsynced.clear()
            self.unsynced_bytes -= segment.unsynced_bytes
            segment.unsynced_bytes = 0
            segment.lost_syncs += 1
            self.sync_failures += 1
            self.drop(segment, lost)
            log.error("pool.sync_failed", file=str(segment.path), reason=error.strerror, chunks=len(lost))
            return []
        finally:
            self.syncing = False
        return batch

    def drop(self, segment: Segment, chunks: Collection[int]) -> None:
        """Chunks that were written, and may be unsynced, are absent now."""
        for n in chunks:
            segment.presence.clear(n)
            if n in segment.unsynced:
                segment.unsynced.discard(n)
                segment.unsynced_bytes -= segment.table.size[n]
                self.unsynced_bytes -= segment.table.size[n]
        if segment.row in self._unrecorded:
            self._unrecorded[segment.row][1].difference_update(chunks)
        self._forget(segment, chunks)

    def abandon(self, segment: Segment) -> None:
        """The segment goes away: do not sync it any more."""
        self._dirty.pop(segment.row, None)
        self._unrecorded.pop(segment.row, None)

    async def between_syncs(self, action: Callable[[], None]) -> None:
        """Run something while no thread syncs a file."""
        with trio.CancelScope(shield=True):
            async with self._flushing:
                action()

    def _forget(self, segment: Segment, chunks: Iterable[int]) -> None:
        for n in chunks:
            key = segment.domain, segment.table.digest(n)
            if n not in segment.unsynced and self._fresh.get(key) == (segment, n):
                del self._fresh[key]

    async def _commit(self, batches: list[tuple[Segment, list[int]]]) -> None:
        async with self.committing:
            work = []
            for segment, batch in batches:
                # removed meanwhile: the removal has committed, or will commit after us
                still = [n for n in batch if segment.presence.has(n)]
                record = Presence.private(segment.table.chunk_count)
                record.load(segment.on_record.to_bytes())
                work.append((segment, still, record))
            if not work:
                await self._index.settle()
                return

            def change(connection: apsw.Connection) -> list[tuple[int, int]]:
                return [_record(connection, segment, still, record) for segment, still, record in work]

            # without the sync a power failure could forget chunks for as long as the index is not written otherwise
            held = await self._index.write(change, durable=True)
            for (segment, _, record), (_, held_bytes) in zip(work, held, strict=True):
                segment.on_record = record
                segment.held_bytes = held_bytes
            self.commits += 1


def _record(
    connection: apsw.Connection, segment: Segment, chunks: list[int], record: Presence
) -> tuple[int, int]:
    """Write chunks and the files they complete. `record` has what is durable, and gets these too. May be called again."""
    new = [n for n in chunks if not segment.on_record.has(n)]
    record.set_many(chunks)
    digest = segment.table.digest
    connection.executemany(
        "INSERT OR IGNORE INTO chunks(digest, segment, n) VALUES(?, ?, ?)",
        ((digest(n), segment.row, n) for n in chunks),
    )
    connection.executemany(
        "INSERT OR IGNORE INTO files(key, segment, segment_offset, first_chunk, chunk_count, size)"
        " VALUES(?, ?, ?, ?, ?, ?)",
        _complete_files(segment, chunks, record),
    )
    held = record.present_count(), segment.held_bytes + segment.bytes_of(new)
    connection.execute(
        "UPDATE segments SET present = ?, held_chunks = ?, held_bytes = ? WHERE row = ?",
        (record.to_bytes(), *held, segment.row),
    )
    return held


def _complete_files(segment: Segment, chunks: Iterable[int], record: Presence) -> Iterator[FileRow]:
    seen = set()
    for n in chunks:
        extent = segment.file_of(n)
        if extent is None or extent.first_chunk in seen:
            continue
        seen.add(extent.first_chunk)
        complete = record.has_range(extent.first_chunk, extent.chunk_count)
        if complete and not _may_be_key_rows(segment, extent):
            yield file_row(segment, extent)


def _may_be_key_rows(segment: Segment, extent: FileExtent) -> bool:
    size = segment.table.size[extent.first_chunk]
    if extent.chunk_count > 1 or size % _KEY_ROW_BYTES or size == _KEY_ROW_BYTES:
        return False
    first_size = int.from_bytes(os.pread(segment.data_fd, 8, extent.segment_offset), "little")
    return 0 < first_size <= MAX_CHUNK_BYTES


def complete_files(segment: Segment, record: Presence) -> Iterator[FileRow]:
    """The rows of all files of which every chunk is on record."""
    return _complete_files(segment, segment.file_starts, record)


def file_row(segment: Segment, extent: FileExtent) -> FileRow:
    """The row of `files` for a file."""
    table = segment.table
    chunks = range(extent.first_chunk, extent.first_chunk + extent.chunk_count)
    key = content_key([Chunk(table.digest(n), 0, table.size[n], 0, 0, 0) for n in chunks])
    size = sum(table.size[n] for n in chunks)
    return key, segment.row, extent.segment_offset, extent.first_chunk, extent.chunk_count, size


def erase(
    connection: apsw.Connection, segment: Segment, chunks: Collection[int], record: Presence, held_bytes: int
) -> None:
    """Take chunks, and the files they are part of, out of the index; `record` loses them too, and holds `held_bytes` then.
    May be called again."""
    for n in chunks:
        record.clear(n)
    digest = segment.table.digest
    connection.executemany(
        "DELETE FROM chunks WHERE digest = ? AND segment = ? AND n = ?",
        ((digest(n), segment.row, n) for n in chunks),
    )
    if segment.file_starts:
        extents = {extent for n in chunks if (extent := segment.file_of(n)) is not None}
        rows = [file_row(segment, extent) for extent in extents]
        connection.executemany(
            # another file of the segment with the same content may be the one on record
            "DELETE FROM files WHERE key = ? AND segment = ? AND first_chunk = ?",
            ((row[0], row[1], row[3]) for row in rows),
        )
    else:
        numbers = array("I", sorted(chunks))
        connection.executemany(
            "DELETE FROM files WHERE segment = ? AND first_chunk <= ? AND first_chunk + chunk_count > ?",
            ((segment.row, n, n) for n in numbers),
        )
    connection.execute(
        "UPDATE segments SET present = ?, held_chunks = ?, held_bytes = ?, verified = NULL WHERE row = ?",
        (record.to_bytes(), record.present_count(), held_bytes, segment.row),
    )
