"""Taking chunks out of segments: the mechanism; which ones is eviction's decision.

Part of `pool.Pool`. The order is what keeps readers safe (design, section 3): bits, then the word of those
who reply from the map, then the index with a full sync, then the hole. With any other order a restart or a
reader can take a hole for a chunk. Must never punch a file that a kernel may read without asking us.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path

import structlog
import trio

from p2pgz.core.layout import PAGE_BYTES
from p2pgz.errors import PoolFull, StateError
from p2pgz.pool.copies import ChunkCopies
from p2pgz.pool.disk import TEMPORARY_SUFFIX, is_full, named
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="pool")

Acknowledge = Callable[[], Awaitable[None]]
"""returns when no reply that reads the chunks is in flight any more"""


class ChunkRemoval(ChunkCopies):
    """Chunks out."""

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
        wanted |= _absent_on_the_same_pages(segment, wanted)
        lost_syncs = segment.lost_syncs
        before = await segment.begin_removal(wanted)
        try:
            try:
                if (
                    segment.native_served
                ):  # since a moment ago; a mount that begins now sees that bits are missing
                    raise StateError(f"segment {segment.id} is being served natively")
                await acknowledge()
            except BaseException:
                if segment.lost_syncs == lost_syncs:
                    segment.presence.set_many(before)
                raise
            with trio.CancelScope(shield=True):
                self._committer.drop(segment, wanted)
                held = [n for n in wanted if segment.recorded(n)]
                held += [n for n in before if not segment.recorded(n)]
                await self._erase_then(segment, wanted, lambda: self._punch(segment, sorted(wanted)))
        finally:
            segment.end_removal(wanted)
        return segment.bytes_of(held)

    async def _erase_then(self, segment: Segment, chunks: Collection[int], free: Callable[[], None]) -> None:
        """Take chunks off the record, durably, and free their space, in a thread.

        On a disk without a single free page the index may not be able to say so before the space is free. Then
        it says it afterwards, or stays behind: after a crash, every chunk that it lists is hashed before it is
        used, and a clean stop writes down what is present, so that a hole cannot pass for a chunk either way.
        """
        try:
            async with self._committer.committing:
                await self._erase(segment, chunks, durable=True)
        except PoolFull:
            log.warning("pool.freed_first", file=str(segment.path), chunks=len(chunks))
            await trio.to_thread.run_sync(free, limiter=self._limiter)
            async with self._committer.committing:
                await self._erase(segment, chunks, durable=True)
        else:
            await trio.to_thread.run_sync(free, limiter=self._limiter)

    async def renew_segment(self, segment: Segment, is_unused: Callable[[], bool]) -> int:
        """Give a segment that was served natively a new, empty file; returns how many bytes it held.

        A kernel that still has the old file keeps it. `is_unused` is asked at the last moment, before anything
        changes: whether no process may map the file by its name. Raises StateError when it is in use, or is
        being written or read.
        """
        self._refuse_closed()
        everything = range(segment.table.chunk_count)
        if any(segment.is_busy(n) for n in everything):
            raise StateError(f"segment {segment.id} is in use")
        fresh = await trio.to_thread.run_sync(self._make_empty, segment, limiter=self._limiter)
        before = await segment.begin_removal(everything)
        held = segment.held_bytes
        try:
            with trio.CancelScope(shield=True):
                await self._committer.between_syncs(lambda: self._swap(segment, fresh, is_unused, before))
                await trio.to_thread.run_sync(self._disk.sync_directory, segment.path.parent)
                async with self._committer.committing:
                    await self._erase(segment, everything, durable=True)
                    await self._index.write(
                        lambda connection: connection.execute(
                            "UPDATE segments SET native_served = 0 WHERE row = ?", (segment.row,)
                        ),
                        durable=True,
                    )
                segment.native_served = False
        finally:
            segment.end_removal(everything)
        return held

    def _make_empty(self, segment: Segment) -> int:
        """A file beside the segment's own, of its size; returns its descriptor."""
        path = _fresh_path(segment)
        try:
            os.close(self._disk.create(path))
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._disk.truncate(fd, segment.table.segment_bytes)
                self._disk.fsync(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise named(error, f"{path}: cannot be made") from error
        return fd

    def _swap(
        self, segment: Segment, fresh: int, is_unused: Callable[[], bool], before: Collection[int]
    ) -> None:
        if not is_unused():
            segment.presence.set_many(before)
            os.close(fresh)
            self._disk.unlink(_fresh_path(segment))
            raise StateError(f"segment {segment.id} is in use")
        self._committer.drop(segment, range(segment.table.chunk_count))
        self._disk.replace(_fresh_path(segment), segment.path)
        segment.take_file(fresh)

    def _punch(self, segment: Segment, chunks: list[int]) -> None:
        def punch() -> None:
            for offset, count in punch_ranges(segment, chunks):
                self._disk.punch(segment.data_fd, offset, count)

        try:
            try:
                punch()
            except OSError as error:
                # where a file system copies on write, or counts its own blocks, freeing room takes some
                if not is_full(error) or not self._index.release_reserve():
                    raise
                punch()
            self._index.take_reserve()
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
                self.overflow.drop_all(segment)
                await self._shelf.forget(segment)
        finally:
            segment.end_removal(everything)
        await self._committer.between_syncs(segment.close)
        await trio.to_thread.run_sync(self._index.take_reserve, limiter=self._limiter)

    async def mark_native(self, segment: Segment) -> None:
        """Remember, durably, that a kernel may read this file without asking us. To be called before it may."""
        segment.native_served = True
        await self._index.write(
            lambda connection: connection.execute(
                "UPDATE segments SET native_served = 1 WHERE row = ?", (segment.row,)
            ),
            durable=True,
        )


def _fresh_path(segment: Segment) -> Path:
    return segment.path.with_name(segment.path.name + TEMPORARY_SUFFIX)


def _absent_on_the_same_pages(segment: Segment, chunks: Collection[int]) -> set[int]:
    """Absent chunks that share a page with one of these. Space is given back by the page: if each of two neighbours were
    punched by itself, their common page would stay for good."""
    offset, size = segment.table.segment_offset, segment.table.size
    found: set[int] = set()
    for n in chunks:
        for step, edge in ((-1, offset[n] // PAGE_BYTES), (1, (offset[n] + size[n]) // PAGE_BYTES)):
            at = n + step
            while (
                0 <= at < segment.table.chunk_count
                and at not in chunks
                and offset[at] // PAGE_BYTES <= edge <= (offset[at] + size[at]) // PAGE_BYTES
                and not (segment.presence.has(at) or segment.recorded(at) or segment.is_busy(at))
            ):
                found.add(at)
                at += step
    return found


def punch_ranges(segment: Segment, chunks: Iterable[int]) -> list[tuple[int, int]]:
    """The byte ranges of chunks (ascending numbers), joined, with the padding after the last chunk of a file."""
    table = segment.table
    ranges: list[tuple[int, int]] = []
    for n in chunks:
        start = table.segment_offset[n]
        end = start + table.size[n]
        inside = n + 1 < table.chunk_count and table.segment_offset[n + 1] == end
        if not inside:  # the next file begins on a page of its own
            end = (end + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = ranges[-1][0], end - ranges[-1][0]
        elif end > start:
            ranges.append((start, end - start))
    return ranges
