"""Keeping the pool: within its limits, sound on the disk, and with what is pinned. Joins evictor, scrubber and mounts.

Made by `node.run`; `Node` passes the commands of `p2pgz pool` on to it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, Final

import structlog
import trio

from p2pgz.config import PoolConfig, pool_limits
from p2pgz.core.schedule import Priority
from p2pgz.errors import ImageNotFound, StateError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.mount.users import SegmentUsers
from p2pgz.pool.catalog import USER, ImageRecord
from p2pgz.pool.evictor import GRACE_TENTHS, Evictor
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.recheck import recheck
from p2pgz.pool.scrub import IDLE_AFTER_SECONDS, Scrubber
from p2pgz.web.api import GcRequest, Progress, ScrubRequest, UnpinRequest

log = structlog.get_logger(component="node")

EVERYTHING_BYTES: Final = 1 << 62


class Upkeep:
    """One per node. `start` starts its tasks."""

    def __init__(self, config: PoolConfig, pool: Pool, fetcher: ChunkFetcher, users: SegmentUsers) -> None:
        self._config = config
        self._pool = pool
        self._fetcher = fetcher
        quota_bytes, floor_bytes = self._limits(config)
        self._users = users
        self.evictor = Evictor(
            pool, quota_bytes=quota_bytes, free_floor_bytes=floor_bytes, users=users, rarity=fetcher.copies
        )
        self._scrubber = Scrubber(pool, self._refetch, is_busy=self._is_busy, found_wrong=users.invalidate)
        self._activity = (-1, -1)
        self._active_at = 0.0

    def _limits(self, config: PoolConfig) -> tuple[int, int]:
        space = os.statvfs(self._pool.directory)
        return pool_limits(config, space.f_blocks * space.f_frsize)

    def limit(self, config: PoolConfig) -> None:
        """Keep the pool within other limits from now on."""
        quota_bytes, floor_bytes = self._limits(config)
        self.evictor.limit(quota_bytes=quota_bytes, free_floor_bytes=floor_bytes)

    def start(self, nursery: trio.Nursery) -> None:
        """Evict as needed, look at what a crash has left, and scrub when there is nothing else to do."""
        nursery.start_soon(self.evictor.run)
        nursery.start_soon(recheck, self._pool, self._users.mounted, self._is_busy)
        if self._config.scrub_interval_seconds:
            nursery.start_soon(
                self._scrubber.run, self._config.scrub_interval_seconds, self._config.scrub_bytes_per_second
            )

    async def _refetch(self, segment: Segment, chunks: list[int]) -> None:
        await self._fetcher.ensure_chunks(segment, chunks, Priority.READ_AHEAD)

    def _is_busy(self) -> bool:
        """Whether somebody was given a chunk just now, or reads from the disk."""
        counters = self._fetcher.counters
        supplied = counters.pool_chunks + counters.peer_chunks + counters.registry_chunks
        activity = supplied, self._users.reads
        if activity != self._activity:
            self._activity, self._active_at = activity, trio.current_time()
        return trio.current_time() - self._active_at < IDLE_AFTER_SECONDS

    def status(self) -> dict[str, Any]:
        """`pool` in the status document."""
        space = os.statvfs(self._pool.directory)
        return {
            **dataclasses.asdict(self._pool.stats()),
            "path": str(self._pool.directory),
            "free_bytes": space.f_bavail * space.f_frsize,
            **self.evictor.status(),
            **self._scrubber.status(),
            "pins": [
                {"ref": pin.reference, "digest": str(pin.manifest), "owner": pin.owner.partition(" ")[0]}
                for pin in self._pool.catalog.pins()
            ],
        }

    async def gc(self, request: GcRequest, progress: Progress) -> dict[str, Any]:
        """Give back what the pool need not hold: files that nothing refers to, and what is above the low-water mark."""
        before = self.evictor.used_bytes
        await progress({"event": "progress", "text": "looking for files without an image"})
        orphan_bytes = await self._pool.remove_orphans()
        stray_bytes = 0
        if self._users.may_punch():
            try:
                stray_bytes = await self._pool.remove_strays(self.evictor.acknowledge)
            except StateError as error:  # somebody does not answer: what he may read stays
                log.warning("pool.strays_stay", reason=str(error))
        await progress({"event": "progress", "text": "evicting"})
        need = EVERYTHING_BYTES if request.all else self.evictor.above_low_water()
        failures = self.evictor.counts["eviction_failures"]
        # what came in the last moments has readers on their way to it; without this grace they could miss it for ever
        evicted_bytes = await self.evictor.evict(need, grace_tenths=GRACE_TENTHS[-1]) if need else 0
        return {
            "orphan_bytes": orphan_bytes,
            "stray_bytes": stray_bytes,
            "evicted_bytes": evicted_bytes,
            "allocated_bytes_before": before,
            "allocated_bytes": self.evictor.used_bytes,
            "eviction_failures": self.evictor.counts["eviction_failures"] - failures,
        }

    async def scrub(self, request: ScrubRequest, progress: Progress) -> dict[str, Any]:
        """Check every chunk on the disk and fetch what is wrong again."""
        rate = request.bytes_per_second
        return await self._scrubber.scrub(
            self._config.scrub_bytes_per_second if rate is None else rate, progress
        )

    async def make_room(self, count: int) -> None:
        """Evict cold chunks for what is to be kept and can wait a moment: what came just now may go after its grace."""
        grace = GRACE_TENTHS[-1]
        need = self.evictor.above_low_water() + count
        freed = await self.evictor.evict(need, grace_tenths=grace)
        if freed < need:
            await trio.sleep((grace + 1) / 10)
            await self.evictor.evict(need - freed, grace_tenths=grace)

    async def pin(self, image: OpenImage, *, owner: str = USER) -> dict[str, Any]:
        """Keep the chunks of an image, whatever the quota says, until `owner` unpins it. Fetches nothing."""
        now = time.time()
        segments = image.all_segments
        for domain in {segment.domain for segment in segments}:
            await self._pool.catalog.put_image(
                ImageRecord(
                    manifest=image.digest,
                    reference=image.reference,
                    tree_path=str(image.tree_path),
                    segments=tuple(segment.id for segment in segments if segment.domain == domain),
                    created=now,
                    domain=domain,
                )
            )
        await self._pool.catalog.pin(image.digest, image.reference, now, owner=owner)
        return {"reference": image.reference, "digest": str(image.digest), "bytes": image.chunk_bytes}

    async def unpin(self, request: UnpinRequest) -> dict[str, Any]:
        """Let it be evicted again."""
        pins = [
            pin
            for pin in self._pool.catalog.pins()
            if request.reference in (pin.reference, str(pin.manifest))
        ]
        found = [pin.manifest for pin in pins if pin.owner == USER]
        if not found:
            raise ImageNotFound(
                f"{request.reference}: not pinned" + (" by hand" if pins else ""),
                hint="`p2pgz seed --remove` lets it go"
                if pins
                else "`p2pgz pool stat` lists the pinned images",
            )
        for digest in found:
            await self._pool.catalog.unpin(digest)
        return {"unpinned": [str(digest) for digest in found]}
