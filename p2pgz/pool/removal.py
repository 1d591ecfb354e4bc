"""Taking chunks out of segments: the mechanism; which ones is eviction's decision.

Part of `pool.Pool`. The order is what keeps readers safe (design, section 3): bits, then the word of those
who reply from the map, then the index with a full sync, then the hole. With any other order a restart or a
reader can take a hole for a chunk. Must never punch a file that a kernel may read without asking us.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog
import trio

from p2pgz.core.layout import PAGE_BYTES
from p2pgz.errors import StateError
from p2pgz.pool.chunks import ChunkStore
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="pool")

Acknowledge = Callable[[], Awaitable[None]]
"""returns when no reply that reads the chunks is in flight any more"""


class ChunkRemoval(ChunkStore):
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
