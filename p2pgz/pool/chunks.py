"""Chunk bytes on their way into segments: adding, checking again.

The base of `copies`, `removal` and `pool.Pool`. Every path to a presence bit is here: after
the pwrite of a verified chunk, after a copy of one, after hashing what an earlier run left. Whoever touches
a chunk's bytes claims it, so that a removal cannot punch a hole under a write or a copy.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pgz.core.model import ChunkKind
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, PoolFull, StateError
from p2pgz.pool.commit import Committer, erase
from p2pgz.pool.disk import Disk, named, read_fully
from p2pgz.pool.index import Index
from p2pgz.pool.overflow import Overflow
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
# Batches of some MiB that may be between wire and disk at a time; the disk takes them one by one anyway
ARRIVALS = 16
# The loop is to answer within 10 ms
INLINE_SECONDS = 0.002
# Writes that find no room are tried again this often after something was evicted for them
ROOM_ATTEMPTS = 3


class Room(Protocol):
    """Who sees to it that there is room: the evictor."""

    @property
    def keeps(self) -> bool:
        """False: the disk is full, and nothing that may go is left."""
        ...

    def admits(self, count: int) -> bool:
        """Whether this many bytes more are within the quota."""
        ...

    def has_slack(self) -> bool:
        """Whether there is room for what nobody waits for."""
        ...

    async def make(self, count: int) -> bool:
        """Free this many bytes; false when that cannot be, and for a while nothing is kept then."""
        ...


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
        self.room: Room | None = None
        """nobody: what finds no room on the disk is an error"""
        self.overflow = Overflow(0)
        self.arrivals = trio.CapacityLimiter(ARRIVALS)
        """held by whoever makes chunks of what came from the wire, until they are added: a slow disk slows down all"""
        self.admitted_bytes = 0
        """on their way to the disk: those that come meanwhile must not be admitted to the same room"""
        self._closed = False
        self.failing = ""
        """why the disk takes no chunks, though it is not full: the last word of it"""
        self._gave_way = 0.0
        self._counts: Counter[str] = Counter()

    async def add(self, segment: Segment, n: int, chunk: VerifiedChunk) -> None:
        """Put a chunk in its place; it is present when this returns, and durable about a second later.

        Idempotent, safe to cancel. Raises PoolFull or StateError when the disk refuses, ValueError when
        `chunk` is not chunk `n`; it is not present then. A pool with an overflow raises neither of the first two
        but has the chunk there for a while (`unkept`).
        """
        await self.add_many(segment, [(n, chunk)])

    async def add_many(self, segment: Segment, chunks: Iterable[tuple[int, VerifiedChunk]]) -> None:
        """The same for several, with one thread hop for all. What was written before an error is present."""
        self._refuse_closed()
        table, presence = segment.table, segment.presence
        writes: dict[int, Buffer] = {}
        given: dict[int, VerifiedChunk] = {}
        for n, chunk in chunks:
            if chunk.digest != table.digest(n) or len(chunk) != table.size[n]:
                raise ValueError(f"these {len(chunk)} bytes are not chunk {n} of segment {segment.id}")
            if presence.has(n):
                continue
            writes[n], given[n] = chunk.data, chunk
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

        try:
            await self._store_with_room(segment, writes, write)
        except (PoolFull, StateError) as error:
            if isinstance(error, StateError):
                self._note_failing(error)
            for n in writes:
                if not presence.has(n) and not self.overflow.put(segment, n, given[n]):
                    raise
        added = [n for n in writes if presence.has(n)]
        self._counts["added_chunks"] += len(added)
        self._counts["added_bytes"] += segment.bytes_of(added)
        await self._committer.wait_for_room()
        # small chunks are written without a thread; giving way after each would cost as much as the write
        now = time.monotonic()
        if now - self._gave_way >= INLINE_SECONDS:
            await trio.lowlevel.checkpoint()
            self._gave_way = time.monotonic()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def _store_with_room(
        self, segment: Segment, chunks: Collection[int], write: Callable[[int], None]
    ) -> None:
        """`_store`, after eviction where it is needed. Nothing may be claimed: eviction would wait for it."""
        for attempt in range(1, ROOM_ATTEMPTS + 1):
            left = [n for n in chunks if not segment.presence.has(n)]
            size = segment.bytes_of(left)
            await self._refuse_without_room(segment, size)
            full: PoolFull | None = None
            self.admitted_bytes += size
            try:
                await self._store(segment, left, write)
            except PoolFull as error:
                full = error
            finally:
                self.admitted_bytes -= size
            if full is None:
                return
            if self.room is None or attempt == ROOM_ATTEMPTS or not await self.room.make(size):
                raise full

    async def _refuse_without_room(self, segment: Segment, size: int) -> None:
        room = self.room
        if room is None or not size:
            return
        if not self._index.lacks_reserve and room.keeps and (room.admits(size) or await room.make(size)):
            return
        raise PoolFull(
            f"{segment.path}: nothing more is kept at the moment",
            hint="free some space, raise pool.quota_bytes, or unpin images",
        )

    async def write_out(self, segment: Segment, n: int, chunk: VerifiedChunk) -> None:
        """Try the disk, whatever is known about it. Raises PoolFull or StateError."""
        self._refuse_closed()
        offset = segment.table.segment_offset[n]
        await self._store(segment, [n], lambda _: self._disk.pwrite(segment.data_fd, chunk.data, offset))
        self.overflow.drop(segment, n)

    @property
    def keeps(self) -> bool:
        """False while chunks go through memory to their readers, since the disk is full or failing."""
        return not self.failing and (self.room is None or self.room.keeps)

    @property
    def has_slack(self) -> bool:
        """Whether there is room for what nobody waits for: it must not push out what somebody has read."""
        return not self.failing and (self.room is None or self.room.has_slack())

    @property
    def written_bytes(self) -> int:
        """How much was put on the disk since the pool was opened."""
        return self._counts["written_bytes"]

    def unkept(self, segment: Segment, n: int) -> VerifiedChunk | None:
        """A chunk that was added and found no room, if it is not forgotten yet: its readers take it from here."""
        return self.overflow.get(segment, n)

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
                fresh = [n for n in done if not segment.presence.has(n)]
                for n in fresh:
                    segment.presence.set(n)
                    self._committer.note(segment, n)
                    self.overflow.drop(segment, n)
                segment.touch(fresh)
                self._counts["written_bytes"] += segment.bytes_of(fresh)
                if fresh and self.failing:
                    self.failing = ""
                    log.info("pool.writes_again")
            segment.release(chunks)

    def _note_failing(self, error: StateError) -> None:
        if not self.failing:
            effect = "chunks are served without being kept"
            log.error("pool.cannot_write", reason=str(error), effect=effect)
        self.failing = error.what

    async def flush(self) -> None:
        """Make all that was added durable now. Raises PoolFull or StateError when the index cannot be written."""
        await self._committer.flush()

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

        def check(recorded: list[int]) -> list[int]:
            good = []
            for n in recorded:
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
            # what was just being removed when it was asked for is gone now, and not damaged
            recorded = [n for n in wanted if segment.recorded(n) and not segment.presence.has(n)]
            good = await trio.to_thread.run_sync(check, recorded, limiter=self._limiter)
            segment.touch(good)
            for n in good:
                if not segment.presence.has(n):
                    segment.presence.set(n)
                    if segment.adopted:  # the index does not know it yet
                        self._committer.note(segment, n)
            bad = set(recorded).difference(good)
            if bad:
                await self._mark_lost(segment, bad)
        finally:
            segment.release(wanted)
        self._counts["revived_chunks"] += len(good)
        return good

    async def forget_wrong(self, segment: Segment, chunks: Collection[int]) -> None:
        """Chunks whose bytes on the disk turned out wrong are absent from now on; the next reader fetches over them.

        Nothing is punched, so whoever is just reading them gets what is there and no hole.
        """
        self._refuse_closed()
        await segment.claim(chunks)
        try:
            self._committer.drop(segment, chunks)
            await self._mark_lost(segment, set(chunks))
        finally:
            segment.release(chunks)

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
        try:
            await self._index.write(
                lambda connection: erase(connection, segment, chunks, record, held_bytes), durable=durable
            )
            segment.on_record = record
        finally:
            segment.held_bytes = held_bytes  # of what `on_record` says, either way

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
