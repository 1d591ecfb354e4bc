"""A pool in memory, for tests of what stands on a pool. Same calls and meaning as `pool.Pool`, nothing survives.

Segments are memfds, so another process can map them by descriptor or `/proc/PID/fd/N` path. It has no locks,
threads or recovery; `p2pgz.testing.conformance_pool` holds it and the real pool to the same contract.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pgz.core.content import FileRef, content_key
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, ChunkKind
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, StateError
from p2pgz.pool.catalog import Catalog
from p2pgz.pool.disk import Disk
from p2pgz.pool.index import Index
from p2pgz.pool.pool import PoolStats
from p2pgz.pool.removal import Acknowledge, punch_ranges
from p2pgz.pool.segment import SHARED_DOMAIN, Segment, SegmentMeta, starts_of


class MemoryPool:
    """The fake. Usable at once, or through `open()` where a context is expected."""

    def __init__(self, *, quota_bytes: int = 0) -> None:
        self.quota_bytes = quota_bytes
        self.catalog = Catalog(Index.in_memory())
        self.keeps = self.has_slack = True
        self._segments: dict[tuple[str, Digest], Segment] = {}
        self._counts: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def open(cls, *, quota_bytes: int = 0) -> AsyncIterator[MemoryPool]:
        """Like `Pool.open`."""
        pool = cls(quota_bytes=quota_bytes)
        await trio.lowlevel.checkpoint()
        try:
            yield pool
        finally:
            pool.close()

    def close(self) -> None:
        """Release all segments."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    async def open_segment(
        self,
        source: SegmentLayout | bytes,
        meta: SegmentMeta = SegmentMeta(),  # noqa: B008  # frozen
    ) -> Segment:
        """See `Pool.open_segment`."""
        await trio.lowlevel.checkpoint()
        layout = source if isinstance(source, SegmentLayout) else None
        content = source.to_bytes() if isinstance(source, SegmentLayout) else bytes(source)
        table = SegmentTable(content)
        segment = self._segments.get((meta.domain, table.id))
        if segment is None:
            data_fd = os.memfd_create("p2pgz-segment", os.MFD_CLOEXEC)
            os.ftruncate(data_fd, table.segment_bytes)
            table_fd = os.memfd_create("p2pgz-table", os.MFD_CLOEXEC)
            Disk().pwrite(table_fd, content, 0)
            segment = Segment(
                content,
                data_fd=data_fd,
                path=Path(f"/proc/{os.getpid()}/fd/{data_fd}"),
                table_path=Path(f"/proc/{os.getpid()}/fd/{table_fd}"),
                meta=meta,
                row=len(self._segments) + 1,
                file_starts=array("I"),
            )
            segment.table_fd = table_fd
            self._segments[meta.domain, table.id] = segment
        elif not segment.has_table(content):
            raise StateError(f"segment {table.id} exists with another table")
        if layout is not None:
            segment.file_starts = starts_of(layout)
        return segment

    def segment(self, segment_id: Digest, domain: str = SHARED_DOMAIN) -> Segment | None:
        """See `Pool.segment`."""
        return self._segments.get((domain, segment_id))

    def segments(self) -> list[Segment]:
        """See `Pool.segments`."""
        return list(self._segments.values())

    async def add(self, segment: Segment, n: int, chunk: VerifiedChunk) -> None:
        """See `Pool.add`."""
        await self.add_many(segment, [(n, chunk)])

    async def add_many(self, segment: Segment, chunks: Iterable[tuple[int, VerifiedChunk]]) -> None:
        """See `Pool.add_many`."""
        await trio.lowlevel.checkpoint()
        table = segment.table
        for n, chunk in chunks:
            if chunk.digest != table.digest(n) or len(chunk) != table.size[n]:
                raise ValueError(f"these bytes are not chunk {n} of segment {segment.id}")
            if table.kind[n] == ChunkKind.ZEROS and any(bytes(chunk.data)):
                raise ChunkCorrupt(f"chunk {n} of segment {segment.id} is listed as zeros")
            if not segment.presence.has(n):
                Disk().pwrite(segment.data_fd, chunk.data, table.segment_offset[n])
                segment.presence.set(n)
                segment.on_record.set(n)
                self._counts["added_chunks"] += 1
                self._counts["added_bytes"] += segment.bytes_of([n])

    def unkept(self, segment: Segment, n: int) -> VerifiedChunk | None:
        """See `Pool.unkept`: it has no overflow."""
        return None

    async def flush(self) -> None:
        """See `Pool.flush`."""
        await trio.lowlevel.checkpoint()

    def find(self, domain: str, digest: bytes) -> tuple[Segment, int] | None:
        """See `Pool.find`."""
        return self._find(domain, digest, None)

    def _find(
        self, domain: str, digest: bytes, besides: tuple[Segment, int] | None
    ) -> tuple[Segment, int] | None:
        for (owner, _), segment in self._segments.items():
            if owner != domain:
                continue
            for n in range(segment.table.chunk_count):
                if segment.presence.has(n) and segment.table.digest(n) == digest and (segment, n) != besides:
                    return segment, n
        return None

    async def copy_from(self, segment: Segment, n: int) -> bool:
        """See `Pool.copy_from`."""
        await trio.lowlevel.checkpoint()
        if segment.presence.has(n):
            return True
        place = self._find(segment.domain, segment.table.digest(n), (segment, n))
        if place is None:
            return False
        data = bytes(place[0].view(place[1]))
        await self.add(segment, n, verify(segment.table.digest(n), data, source="pool"))
        self._counts["copied_chunks"] += 1
        return True

    async def revive(self, segment: Segment, chunks: Iterable[int]) -> list[int]:
        """See `Pool.revive`: there is no earlier run, so nothing to do."""
        await trio.lowlevel.checkpoint()
        return []

    async def remove_chunks(self, segment: Segment, chunks: Iterable[int], acknowledge: Acknowledge) -> int:
        """See `Pool.remove_chunks`."""
        if segment.native_served:
            raise StateError(f"segment {segment.id} was served natively: it can only be dropped as a whole")
        wanted = sorted(set(chunks))
        before = [n for n in wanted if segment.presence.has(n)]
        for n in wanted:
            segment.presence.clear(n)
        try:
            await acknowledge()
        except BaseException:
            segment.presence.set_many(before)
            raise
        for n in wanted:
            segment.on_record.clear(n)
        for offset, count in punch_ranges(segment, wanted):
            Disk().punch(segment.data_fd, offset, count)
        return segment.bytes_of(before)

    async def drop_segment(self, segment: Segment, acknowledge: Acknowledge) -> None:
        """See `Pool.drop_segment`."""
        await acknowledge()
        del self._segments[segment.domain, segment.id]
        segment.close()

    async def mark_native(self, segment: Segment) -> None:
        """See `Pool.mark_native`."""
        await trio.lowlevel.checkpoint()
        segment.native_served = True

    def lookup_files(self, domain: str, keys: Iterable[bytes]) -> dict[bytes, FileRef]:
        """See `Pool.lookup_files`."""
        wanted = set(keys)
        found: dict[bytes, FileRef] = {}
        for (owner, _), segment in self._segments.items():
            table = segment.table
            for first in segment.file_starts if owner == domain else ():
                extent = segment.file_of(first)
                assert extent is not None
                if not segment.presence.has_range(first, extent.chunk_count):
                    continue
                chunks = range(first, first + extent.chunk_count)
                key = content_key([Chunk(table.digest(n), 0, table.size[n], 0, 0, 0) for n in chunks])
                if key in wanted and key not in found:
                    found[key] = FileRef(segment.id, *extent)
        return found

    async def put_object(self, digest: Digest, data: bytes, *, domain: str = SHARED_DOMAIN) -> None:
        """See `Pool.put_object`."""
        await self.catalog.put_object(digest, data, domain=domain)

    async def get_object(self, digest: Digest, *, domain: str = SHARED_DOMAIN) -> bytes | None:
        """See `Pool.get_object`."""
        return await self.catalog.get_object(digest, domain=domain)

    def stats(self) -> PoolStats:
        """See `Pool.stats`."""
        held = [(s, [n for n in range(s.table.chunk_count) if s.presence.has(n)]) for s in self.segments()]
        return PoolStats(
            bytes=sum(segment.bytes_of(chunks) for segment, chunks in held),
            chunks=sum(len(chunks) for _, chunks in held),
            unsynced_bytes=0,
            quota_bytes=self.quota_bytes,
            segments=len(self._segments),
            added_chunks=self._counts["added_chunks"],
            added_bytes=self._counts["added_bytes"],
            copied_chunks=self._counts["copied_chunks"],
            revived_chunks=0,
            lost_chunks=0,
            full_errors=0,
            sync_failures=0,
        )
