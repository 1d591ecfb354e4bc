"""Chunk bytes on their way in and out of segments: adding, copying, checking again, removing.

The base of `pool.Pool`, which adds opening, segments and objects. Every path to a presence bit is here: after
the pwrite of a verified chunk, after a copy from one, after hashing what an earlier run left. Whoever touches
a chunk's bytes claims it, so that a removal cannot punch a hole under a write or a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TYPE_CHECKING

import structlog
import trio

from p2pgz.core.model import ChunkKind
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, PoolFull, StateError
from p2pgz.pool.commit import Committer, erase
from p2pgz.pool.disk import Disk, named, read_fully
from p2pgz.pool.index import Index
from p2pgz.pool.presence import Presence
from p2pgz.pool.segment import Segment
from p2pgz.pool.shelf import Shelf

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = structlog.get_logger(component="pool")

# A thread hop costs 55–65 us, a pwrite of 64 KiB about 13 us: larger ones would hold up the event loop
INLINE_BYTES = 64 << 10
# Threads for chunk bytes: two saturate the hash on two cores, the others wait for the disk
DISK_THREADS = 4
# How many places of one chunk are looked at; common small files have hundreds
PLACES_MAX = 16
_PAGE_BYTES = 4096

Acknowledge = Callable[[], Awaitable[None]]
"""returns when no reply that reads the chunks is in flight any more"""


class ChunkStore:
    """Chunks of open segments."""

    def __init__(
        self, index: Index, disk: Disk, shelf: Shelf, committer: Committer, limiter: trio.CapacityLimiter
    ) -> None:
        self._index = index
        self._disk = disk
        self._shelf = shelf
        self._committer = committer
        self._limiter = limiter
        self._closed = False
        self._counts: Counter[str] = Counter()

    async def add(self, segment: Segment, n: int, chunk: VerifiedChunk) -> None:
        """Put a chunk in its place; it is present when this returns, and durable about a second later.

        Idempotent, safe to cancel. Raises PoolFull or StateError when the disk refuses, ValueError when
        `chunk` is not chunk `n`; it is not present then.
        """
        await self.add_many(segment, [(n, chunk)])

    async def add_many(self, segment: Segment, chunks: Iterable[tuple[int, VerifiedChunk]]) -> None:
        """The same for several, with one thread hop for all. What was written before an error is present."""
        self._refuse_closed()
        table, presence = segment.table, segment.presence
        writes: dict[int, Buffer] = {}
        for n, chunk in chunks:
            if chunk.digest != table.digest(n) or len(chunk) != table.size[n]:
                raise ValueError(f"these {len(chunk)} bytes are not chunk {n} of segment {segment.id}")
            if presence.has(n):
                continue
            writes[n] = chunk.data
            if table.kind[n] == ChunkKind.ZEROS:
                # its place is a hole, so it has to be what the hole reads as
                if bytes(chunk.data).count(0) != len(chunk):
                    raise ChunkCorrupt(
                        f"chunk {n} of segment {segment.id} is listed as zeros, but its digest is of other bytes",
                        hint="the TOC of the layer contradicts itself",
                    )
                writes[n] = b""
        offset = table.segment_offset

        def write(n: int) -> None:
            self._disk.pwrite(segment.data_fd, writes[n], offset[n])

        await self._store(segment, writes, write)
        self._counts["added_chunks"] += len(writes)
        self._counts["added_bytes"] += segment.bytes_of(writes)
        await self._committer.wait_for_room()

    async def _store(self, segment: Segment, chunks: Collection[int], write: Callable[[int], None]) -> None:
        """Write each chunk, set its bit, and hand it to the committer."""
        if not chunks:
            await trio.lowlevel.checkpoint()
            return
        await segment.claim(chunks)
        done: list[int] = []
        failures = -1

        def write_all() -> None:
            done.clear()
            for n in chunks:
                write(n)
                done.append(n)

        try:
            # a sync that failed while we wrote may have been about our pages: write them again
            while failures != segment.lost_syncs:
                failures = segment.lost_syncs
                if segment.bytes_of(chunks) > INLINE_BYTES:
                    await trio.to_thread.run_sync(write_all, limiter=self._limiter)
                else:
                    write_all()
        except OSError as error:
            failure = named(error, f"{segment.path}: cannot write")
            self._counts["full_errors"] += isinstance(failure, PoolFull)
            raise failure from error
        finally:
            if failures == segment.lost_syncs:
                for n in done:
                    if not segment.presence.has(n):
                        segment.presence.set(n)
                        self._committer.note(segment, n)
            segment.release(chunks)

    async def flush(self) -> None:
        """Make all that was added durable now. Raises PoolFull or StateError when the index cannot be written."""
        await self._committer.flush()

    def find(self, domain: str, digest: bytes) -> tuple[Segment, int] | None:
        """A place in the domain's segments that has this chunk; one that was verified in this boot if there is.

        Of another one only the index knows so far: `segment.presence.has(n)` tells, `revive` finds out.
        """
        return self._find(domain, digest, besides=None)

    def _find(
        self, domain: str, digest: bytes, besides: tuple[Segment, int] | None
    ) -> tuple[Segment, int] | None:
        fresh = self._committer.find(domain, digest)
        if fresh is not None and fresh != besides and fresh[0].presence.has(fresh[1]):
            return fresh
        hearsay = None
        try:
            places = self._index.places(domain, digest, limit=PLACES_MAX)
        except StateError as error:
            self._complain_once(error)
            return None
        for row, n in places:
            segment = self._shelf.by_row(row)
            if segment is None or (segment, n) == besides or n >= segment.table.chunk_count:
                continue
            if segment.presence.has(n):
                return segment, n
            if hearsay is None and segment.recorded(n):
                hearsay = segment, n
        return hearsay

    async def copy_from(self, segment: Segment, n: int) -> bool:
        """Make chunk `n` present by copying it from another place of the pool; false when there is none.

        By reflink where file system and alignment allow. A source that was not verified in this boot is
        first. Raises PoolFull, StateError.
        """
        self._refuse_closed()
        if segment.presence.has(n):
            return True
        digest = segment.table.digest(n)
        for _ in range(PLACES_MAX):
            place = self._find(segment.domain, digest, besides=(segment, n))
            if place is None:
                return False
            source, m = place
            if source.table.digest(m) != digest or source.table.size[m] != segment.table.size[n]:
                return False
            if (source.presence.has(m) or await self.revive(source, [m])) and await self._copy(
                source, m, segment, n
            ):
                self._counts["copied_chunks"] += 1
                return True
        return False

    async def _copy(self, source: Segment, m: int, segment: Segment, n: int) -> bool:
        size = segment.table.size[n]
        if ChunkKind.ZEROS in (segment.table.kind[n], source.table.kind[m]):
            # nothing to copy from or to; the digest decides whether it is zeros
            try:
                chunk = verify(segment.table.digest(n), bytes(size), source="TOC")
            except ChunkCorrupt:
                return False
            await self.add(segment, n, chunk)
            return True
        if source is segment:
            # claimed together: one removal of both must not wait for us while we wait for it
            data = bytes(source.view(m))
            await self.add(segment, n, verify(segment.table.digest(n), data, source=str(source.path)))
            return True
        await source.claim([m])
        try:
            if not source.presence.has(m):
                return False
            source_offset, offset = source.table.segment_offset[m], segment.table.segment_offset[n]
            lost_syncs = source.lost_syncs

            def write(_: int) -> None:
                self._disk.copy(source.data_fd, source_offset, segment.data_fd, offset, size)

            await self._store(segment, [n], write)
            if source.lost_syncs != lost_syncs:
                # the source may have lost its pages before we read them
                self._committer.drop(segment, [n])
                return False
            return True
        finally:
            source.release([m])

    async def revive(self, segment: Segment, chunks: Iterable[int]) -> list[int]:
        """Hash chunks that are on record from an earlier run: those that are right become present and are returned.

        The others are absent from then on. Chunks that are not on record, or present already, are left alone.
        """
        self._refuse_closed()
        wanted = [n for n in chunks if segment.recorded(n) and not segment.presence.has(n)]
        if not wanted:
            await trio.lowlevel.checkpoint()
            return []
        table = segment.table

        def check() -> list[int]:
            good = []
            for n in wanted:
                try:
                    # pread, not the map: a file that lost its end gives a short read, not SIGBUS
                    data = read_fully(segment.data_fd, table.size[n], table.segment_offset[n])
                    verify(table.digest(n), data, source=str(segment.path))
                except (ChunkCorrupt, OSError):
                    continue
                good.append(n)
            return good

        await segment.claim(wanted)
        try:
            good = await trio.to_thread.run_sync(check, limiter=self._limiter)
            for n in good:
                if not segment.presence.has(n):
                    segment.presence.set(n)
                    if segment.adopted:  # the index does not know it yet
                        self._committer.note(segment, n)
            bad = set(wanted).difference(good)
            if bad:
                await self._mark_lost(segment, bad)
        finally:
            segment.release(wanted)
        self._counts["revived_chunks"] += len(good)
        return good

    async def _mark_lost(self, segment: Segment, chunks: set[int]) -> None:
        with trio.CancelScope(shield=True):
            async with self._committer.committing:
                lost = [n for n in chunks if not segment.presence.has(n)]  # one may have been added meanwhile
                await self._erase(segment, lost, durable=False)
        self._counts["lost_chunks"] += len(lost)
        log.warning(
            "pool.chunks_lost", file=str(segment.path), chunks=len(lost), effect="they are fetched again"
        )

    async def _erase(self, segment: Segment, chunks: Collection[int], *, durable: bool) -> None:
        """Take chunks off the record, in the index and in memory; the caller holds `committing`."""
        record = Presence.private(segment.table.chunk_count)
        record.load(segment.on_record.to_bytes())
        held_bytes = segment.held_bytes - segment.bytes_of(n for n in chunks if record.has(n))
        # whatever the index manages to write, nobody relies on these from now on
        for n in chunks:
            segment.on_record.clear(n)
        await self._index.write(
            lambda connection: erase(connection, segment, chunks, record), durable=durable
        )
        segment.on_record = record
        segment.held_bytes = held_bytes

    async def remove_chunks(self, segment: Segment, chunks: Iterable[int], acknowledge: Acknowledge) -> int:
        """Remove chunks and give their space back; returns how many bytes of them were held.

        Bits first, then `acknowledge`, then the index with a full sync, then the holes: at no instant can a
        reader, or a restart, take a hole for a chunk. When `acknowledge` fails they stay. Refuses segments
        that were served as a native device, since a kernel may read those without asking us.
        """
        self._refuse_closed()
        if segment.native_served:
            raise StateError(f"segment {segment.id} was served natively: it can only be dropped as a whole")
        wanted = set(chunks)
        before = {n for n in wanted if segment.presence.has(n)}
        lost_syncs = segment.lost_syncs
        await segment.begin_removal(wanted)
        try:
            try:
                await acknowledge()
            except BaseException:
                if segment.lost_syncs == lost_syncs:
                    segment.presence.set_many(before)
                raise
            with trio.CancelScope(shield=True):
                self._committer.drop(segment, wanted)
                async with self._committer.committing:
                    held = [n for n in wanted if segment.recorded(n) or n in before]
                    await self._erase(segment, wanted, durable=True)
                await trio.to_thread.run_sync(self._punch, segment, sorted(wanted), limiter=self._limiter)
        finally:
            segment.end_removal(wanted)
        return segment.bytes_of(held)

    def _punch(self, segment: Segment, chunks: list[int]) -> None:
        try:
            for offset, count in punch_ranges(segment, chunks):
                self._disk.punch(segment.data_fd, offset, count)
        except OSError as error:
            log.error(
                "pool.punch_failed",
                file=str(segment.path),
                reason=error.strerror,
                effect="space is not freed",
            )

    async def drop_segment(self, segment: Segment, acknowledge: Acknowledge) -> None:
        """Remove a whole segment that no mount uses: index first, then its files, unlinked and never punched.

        The object must not be used afterwards. When `acknowledge` fails everything stays.
        """
        self._refuse_closed()
        everything = range(segment.table.chunk_count)
        before = [n for n in everything if segment.presence.has(n)]
        await segment.begin_removal(everything)
        try:
            try:
                await acknowledge()
            except BaseException:
                segment.presence.set_many(before)
                raise
            with trio.CancelScope(shield=True):
                self._committer.drop(segment, everything)
                self._committer.abandon(segment)
                await self._shelf.forget(segment)
        finally:
            segment.end_removal(everything)
        await self._committer.between_syncs(segment.close)

    async def mark_native(self, segment: Segment) -> None:
        """Remember, durably, that a kernel may read this file without asking us. To be called before it may."""
        segment.native_served = True
        await self._index.write(
            lambda connection: connection.execute(
                "UPDATE segments SET native_served = 1 WHERE row = ?", (segment.row,)
            ),
            durable=True,
        )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StateError("the pool is closed")

    def _complain_once(self, error: StateError) -> None:
        if not self._counts["index_errors"]:
            log.error("pool.index_unreadable", reason=str(error))
        self._counts["index_errors"] += 1


def punch_ranges(segment: Segment, chunks: Iterable[int]) -> list[tuple[int, int]]:
    """The byte ranges of chunks (ascending numbers), joined, with the padding after the last chunk of a file."""
    table = segment.table
    ranges: list[tuple[int, int]] = []
    for n in chunks:
        start = table.segment_offset[n]
        end = start + table.size[n]
        inside = n + 1 < table.chunk_count and table.segment_offset[n + 1] == end
        if not inside:  # the next file begins on a page of its own
            end = (end + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = ranges[-1][0], end - ranges[-1][0]
        elif end > start:
            ranges.append((start, end - start))
    return ranges
