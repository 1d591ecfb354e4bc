"""Chunks that the pool has elsewhere: finding them, and copying them instead of fetching.

Part of `pool.Pool`, between `chunks` and `removal`. A copy is made from what was verified in this boot, or after hashing it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2pgz.core.model import ChunkKind
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, PoolFull, StateError
from p2pgz.pool.chunks import ChunkStore
from p2pgz.pool.disk import read_fully
from p2pgz.pool.segment import Segment

# How many places of one chunk are looked at; common small files have hundreds
PLACES_MAX = 16


class ChunkCopies(ChunkStore):
    """Chunks from one segment into another."""

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
            if not (source.presence.has(m) or await self.revive(source, [m])):
                continue
            full: PoolFull | None = None
            try:
                copied = await self._copy(source, m, segment, n)
            except PoolFull as error:
                full = error
            if full is not None:
                if not await self._copy_aside(source, m, segment, n):
                    raise full
                return True
            if copied:
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
            await self._refuse_without_room(segment, size)
            self.admitted_bytes += size
            try:
                return await self._copy_range(source, m, segment, n)
            finally:
                self.admitted_bytes -= size
        if chunk is not None:
            await self.add(segment, n, chunk)
        return chunk is not None

    async def _copy_aside(self, source: Segment, m: int, segment: Segment, n: int) -> bool:
        """The same through memory: for when there is no room for a second copy."""
        size, offset = source.table.size[m], source.table.segment_offset[m]
        await source.claim([m])
        try:
            chunk = await self._verified(segment, n, lambda: read_fully(source.data_fd, size, offset))
        finally:
            source.release([m])
        return chunk is not None and self.overflow.put(segment, n, chunk)

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
