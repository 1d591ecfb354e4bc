"""`Pool`: verified chunks in, slices of mapped files out. The door of this package.

Called by fetch (add, find, copy_from, revive: see `chunks`), by the layer opener (open_segment, objects,
lookup_files), by node and eviction (remove_chunks, drop_segment: see `removal`; stats). `catalog` has images,
tags, pins, mounts.

A presence bit means that the bytes are in the segment file and were verified in this boot. Adding: pwrite,
bit, fdatasync in batches, index. Removing: bit, acknowledgement of those who reply from the map, index with a
full sync, then the hole. kill -9 loses at most what was not synced yet and never shows a wrong byte: after it
every chunk is hashed before its first use. Must never take bytes that are not a `VerifiedChunk`. Design,
section 3.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import structlog
import trio

from p2pgz.core.content import FileRef
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.errors import P2pgzError, PoolFull, StateError
from p2pgz.pool.catalog import Catalog
from p2pgz.pool.chunks import DISK_THREADS
from p2pgz.pool.commit import Committer
from p2pgz.pool.disk import (
    Disk,
    keep_others_out,
    locked,
    mark_as_cache,
    named,
    refuse_unfit_file_system,
)
from p2pgz.pool.index import FORGET_BITMAPS, Index
from p2pgz.pool.presence import iterate_bits
from p2pgz.pool.removal import ChunkRemoval
from p2pgz.pool.segment import SHARED_DOMAIN, Segment, SegmentMeta, chunks_with_data
from p2pgz.pool.shelf import Shelf

__all__ = ["Pool", "PoolStats", "Segment", "SegmentMeta"]

log = structlog.get_logger(component="pool")

_SHARED_META = SegmentMeta()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What the pool holds, and what happened since it was opened. `bytes` and `chunks` count what is durable."""

    bytes: int
    chunks: int
    unsynced_bytes: int
    quota_bytes: int
    segments: int
    added_chunks: int
    added_bytes: int
    copied_chunks: int
    revived_chunks: int
    lost_chunks: int
    """on record, but not what they should be when looked at"""
    full_errors: int
    sync_failures: int


class Pool(ChunkRemoval):
    """An open pool. Made by `Pool.open`; all calls belong to the trio loop that opened it, any number at a time."""

    def __init__(self, directory: Path, index: Index, disk: Disk, quota_bytes: int) -> None:
        limiter = trio.CapacityLimiter(DISK_THREADS)
        committer = Committer(disk, index, limiter)
        shelf = Shelf(directory, index, committer.committing, disk)
        super().__init__(index, disk, shelf, committer, limiter)
        self.directory = directory
        self.quota_bytes = quota_bytes
        self.catalog = Catalog(index)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        state_dir: Path,
        *,
        boot_id: str,
        check_filesystem: bool = True,
        quota_bytes: int = 0,
        disk: Disk | None = None,
    ) -> AsyncIterator[Pool]:
        """Open the pool of a state directory for one node; raises StateError when it cannot be used.

        Leaving the context makes everything durable and marks a clean stop, whatever ended the body.
        """
        directory = state_dir / "pool"
        disk = disk or Disk()
        async with AsyncExitStack() as stack:
            try:
                state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                if check_filesystem:
                    refuse_unfit_file_system(state_dir)
                disk.mkdir(directory)
                for owned in (state_dir, directory):
                    if keep_others_out(owned):
                        log.warning(
                            "state.mode_repaired", path=str(owned), effect="only its owner writes there"
                        )
                stack.enter_context(locked(state_dir / "lock"))
                await trio.to_thread.run_sync(mark_as_cache, directory, disk)
                index = await trio.to_thread.run_sync(Index.open, state_dir / "index.db", disk)
                stack.callback(index.close)
                await trio.to_thread.run_sync(disk.sync_directory, state_dir)
            except OSError as error:
                raise named(error, f"the state directory {state_dir} cannot be used") from error
            await _begin(index, boot_id)
            pool = cls(directory, index, disk, quota_bytes)
            stack.callback(pool._shelf.close)
            await trio.to_thread.run_sync(pool._shelf.sweep)
            failure: Exception | None = None
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool._committer.run)
                    try:
                        yield pool
                    except Exception as error:  # noqa: BLE001  # goes on below, not wrapped in a group
                        failure = error
                    nursery.cancel_scope.cancel()
            finally:
                # bounded by the disk; without it the next start would hash every chunk again
                with trio.CancelScope(shield=True):
                    await pool._stop()
            if failure is not None:
                raise failure

    async def _stop(self) -> None:
        self._closed = True
        try:
            await self._committer.flush()
            await self._index.forget_distrusted()
            await self._shelf.seal()
            await self._index.write(
                lambda connection: connection.execute("UPDATE facts SET value = 1 WHERE name = 'clean'"),
                durable=True,
            )
        except P2pgzError as error:
            log.error(
                "pool.stop_unclean", reason=str(error), effect="chunks are checked when first used again"
            )

    async def open_segment(self, source: SegmentLayout | bytes, meta: SegmentMeta = _SHARED_META) -> Segment:
        """The segment of a layout, or of the bytes of a segment table; made on the disk if it is new.

        Idempotent: the same (domain, id) gives the same object. Only a layout says where files begin and end,
        so only with one whole files are offered to other images. Raises PoolFull, StateError.
        """
        self._refuse_closed()
        return await self._shelf.open(source, meta)

    def segment(self, segment_id: Digest, domain: str = SHARED_DOMAIN) -> Segment | None:
        """A segment that the pool has, or None."""
        return self._shelf.get(domain, segment_id)

    def segments(self) -> list[Segment]:
        """Those that are open."""
        return self._shelf.opened()

    def segment_of_row(self, row: int) -> Segment | None:
        """A segment by its row in the index, opened if need be; None when it cannot be."""
        return self._shelf.by_row(row)

    def heat(self) -> list[tuple[int, str, bytes, int, float, int, int]]:
        """See `Index.heat`."""
        return self._index.heat()

    def fact(self, name: str) -> Any:
        """A value that was noted with `set_facts`, or None."""
        return self._index.fact(name)

    async def set_facts(self, facts: Mapping[str, str | float]) -> None:
        """Note values for later runs."""
        await self._index.write(
            lambda connection: connection.executemany(
                "INSERT OR REPLACE INTO facts(name, value) VALUES(?, ?)", list(facts.items())
            )
        )

    @property
    def lacks_reserve(self) -> bool:
        """Whether the room that is reserved for the index was given up: what is freed next belongs to that."""
        return self._index.lacks_reserve

    async def take_reserve(self) -> None:
        """Reserve room for the index again, as far as there is some now."""
        await trio.to_thread.run_sync(self._index.take_reserve, limiter=self._limiter)

    async def remove_strays(self, acknowledge: Callable[[Segment], Awaitable[None]]) -> int:
        """Give back what files hold that no chunk on record accounts for: writes that a crash kept from the
        record. Returns the bytes of those chunks."""
        freed = 0
        for segment in self._shelf.opened():
            if segment.native_served:
                continue
            found = await trio.to_thread.run_sync(chunks_with_data, segment.data_fd, segment.table)
            strays = [
                n
                for n in iterate_bits(found)
                if not (segment.presence.has(n) or segment.recorded(n) or segment.is_busy(n))
            ]
            # a page may belong to two chunks: what is all zeros was none, and costs nothing to take for one
            if strays:
                await self.remove_chunks(segment, strays, partial(acknowledge, segment))
                freed += segment.bytes_of(strays)
        return freed

    def lookup_files(self, domain: str, keys: Iterable[bytes]) -> dict[bytes, FileRef]:
        """Which of these contents (`core.content`) some segment of the domain holds completely, and where.

        After an unclean stop that is what the index says; a chunk that turns out damaged when it is first
        read is fetched again, from the origin of the segment that holds it.
        """
        found: dict[bytes, FileRef] = {}
        complete: dict[int, tuple[Segment, bool] | None] = {}
        try:
            for key, row, segment_offset, first_chunk, chunk_count in self._index.files(keys):
                if row not in complete:
                    complete[row] = self._holds(domain, row)
                holder = complete[row]
                if holder is None:
                    continue
                segment, whole = holder
                # what a damaged file lost is off the record, though the index may still offer it
                if whole or segment.holds(first_chunk, chunk_count):
                    found[key] = FileRef(segment.id, segment_offset, first_chunk, chunk_count)
        except StateError as error:
            self._complain_once(error)
        return found

    def _holds(self, domain: str, row: int) -> tuple[Segment, bool] | None:
        segment = self._shelf.by_row(row)
        if segment is None or segment.domain != domain:
            return None
        return segment, segment.holds(0, segment.table.chunk_count)

    def orphans(self) -> dict[Path, int]:
        """Segment files that the index does not know (it was lost), and the space they take; for `pool stat`."""
        return self._shelf.orphans()

    async def remove_orphans(self) -> int:
        """Delete them; returns how much space they took. Kernels that still map one keep it until they are done."""
        return await self._shelf.remove_orphans()

    async def put_object(self, digest: Digest, data: bytes, *, domain: str = SHARED_DOMAIN) -> None:
        """Keep a TOC, manifest or config under its digest. Raises PoolFull, StateError."""
        await self.catalog.put_object(digest, data, domain=domain)

    async def get_object(self, digest: Digest, *, domain: str = SHARED_DOMAIN) -> bytes | None:
        """A document by its digest, checked; None when it is not here."""
        return await self.catalog.get_object(digest, domain=domain)

    def stats(self) -> PoolStats:
        """Numbers for status and metrics."""
        chunks, held_bytes = self._index.held()
        counts = self._counts
        return PoolStats(
            bytes=held_bytes,
            chunks=chunks,
            unsynced_bytes=self._committer.unsynced_bytes,
            quota_bytes=self.quota_bytes,
            segments=len(self._shelf),
            added_chunks=counts["added_chunks"],
            added_bytes=counts["added_bytes"],
            copied_chunks=counts["copied_chunks"],
            revived_chunks=counts["revived_chunks"],
            lost_chunks=counts["lost_chunks"],
            full_errors=counts["full_errors"],
            sync_failures=self._committer.sync_failures,
        )


async def _begin(index: Index, boot_id: str) -> None:
    """Note that a node uses the pool now; bitmaps count as verified only after a clean stop of the last one."""
    clean = index.fact("clean") == 1

    def change(connection: apsw.Connection) -> None:
        if not clean:
            connection.execute(FORGET_BITMAPS)
        for name, value in (("clean", 0), ("boot_id", boot_id)):
            connection.execute("INSERT OR REPLACE INTO facts(name, value) VALUES(?, ?)", (name, value))

    # on the disk before anything changes: a crash must find the flag down
    try:
        await index.write(change, durable=True)
    except PoolFull as error:
        if clean:
            raise
        # it is down since the last run, whose mounts and readers need a node all the more
        index.distrusts_bitmaps = True
        log.warning(
            "pool.index_full", reason=str(error), effect="what is fetched is not recorded until there is room"
        )
    if not clean and not index.fresh:
        log.warning("pool.unclean", effect="chunks are checked when first used")
