"""Chunk bytes on their way into segments: adding, copying, checking again.

The base of `removal` and `pool.Pool`. Every path to a presence bit is here: after
the pwrite of a verified chunk, after a copy from one, after hashing what an earlier run left. Whoever touches
a chunk's bytes claims it, so that a removal cannot punch a hole under a write or a copy.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
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
# The loop is to answer within 10 ms
INLINE_SECONDS = 0.002
# How many places of one chunk are looked at; common small files have hundreds
PLACES_MAX = 16


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
        self._gave_way = 0.0
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
                if not await _is_zeros(chunk):
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
        # small chunks are written without a thread; giving way after each would cost as much as the write
        now = time.monotonic()
        if now - self._gave_way >= INLINE_SECONDS:
            await trio.lowlevel.checkpoint()
            self._gave_way = time.monotonic()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

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
                if segment.bytes_of(chunks) > INLINE_BYTES or self._committer.syncing:
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
            chunk = await self._verified(segment, n, lambda: bytes(size))
        elif source is segment:
            # not claimed both in turn: a removal of both would wait for us while we wait for it
            offset = segment.table.segment_offset[m]
            chunk = await self._verified(segment, n, lambda: read_fully(segment.data_fd, size, offset))
        else:
            return await self._copy_range(source, m, segment, n)
        if chunk is not None:
            await self.add(segment, n, chunk)
        return chunk is not None

    async def _verified(self, segment: Segment, n: int, read: Callable[[], bytes]) -> VerifiedChunk | None:
        """Bytes from somewhere as chunk `n`, if that is what they are."""

        def run() -> VerifiedChunk | None:
            try:
                return verify(segment.table.digest(n), read(), source=str(segment.path))
            except (ChunkCorrupt, OSError):
                return None

        return await trio.to_thread.run_sync(run, limiter=self._limiter)

    async def _copy_range(self, source: Segment, m: int, segment: Segment, n: int) -> bool:
        size = segment.table.size[n]
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

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StateError("the pool is closed")

    def _complain_once(self, error: StateError) -> None:
        if not self._counts["index_errors"]:
            log.error("pool.index_unreadable", reason=str(error))
        self._counts["index_errors"] += 1


async def _is_zeros(chunk: VerifiedChunk) -> bool:
    if len(chunk) <= INLINE_BYTES:
        return bytes(chunk.data).count(0) == len(chunk)
    return await trio.to_thread.run_sync(lambda: bytes(chunk.data).count(0) == len(chunk))
