"""All chunks of one plain layer from peers into a spool, checked as a stream while they come.

Called by `fetch.plainshare`. Chunks are asked for in windows in the order of the stream, several peers at once, and each
window is fed to the check while the next one comes. Whoever gives a wrong chunk has lost its place already, since the
exchange verifies; here a peer that fails only leaves its chunks to others. Raises PeersGaveUp when what is missing cannot
be had from peers, or too slowly; ImageInvalid when the index is not what the chunks say.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import structlog
import trio

from p2pgz.core.indexcheck import IndexCheck
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.media import Descriptor
from p2pgz.core.model import Toc
from p2pgz.core.ownindex import PlainIndex
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import PeerSource
from p2pgz.core.race import assign
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ChunkMissing, ImageInvalid, P2pgzError, PoolFull, SourceUnavailable
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.limiter import Throttle
from p2pgz.fetch.plain import Progress
from p2pgz.fetch.spool import numbered_chunks, write_at
from p2pgz.fetch.trace import POOL, Kind, Source
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN

log = structlog.get_logger(component="fetch")

# What is asked for before the window before it has been checked; half of it is on the way while the other half is hashed
WINDOW_BYTES: Final = 16 << 20
WINDOW_CHUNKS: Final = 2048
# Bitmaps come within a round trip of JOIN, and another peer may be about to have what one has failed to give
HOLDERS_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 0.01
BUSY_SECONDS_MIN: Final = 0.02
BUSY_SECONDS_MAX: Final = 1.0
# Slower than this is slower than nearly every registry, which the caller asks then
RATE_SECONDS: Final = 10.0
RATE_MIN_BYTES_PER_SECOND: Final = 256 << 10
# Larger writes would hold up the event loop
INLINE_BYTES: Final = 64 << 10


class PeersGaveUp(SourceUnavailable):
    """Peers cannot give the layer, or not soon enough: read it from its source."""


class Gathering:
    """The chunks of one layer; `toc` is named as its segment and swarm are."""

    def __init__(
        self,
        pool: Pool,
        peers: PeerSource,
        counters: Counters,
        toc: Toc,
        layout: SegmentLayout,
        rate: Throttle | None = None,
    ) -> None:
        self._pool = pool
        self._peers = peers
        self._counters = counters
        self._rate = rate or Throttle()
        self._swarm = toc.digest.raw
        self._table = SegmentTable(layout.to_bytes())
        self._order = [n for n, _ in numbered_chunks(toc)]
        self._place: dict[int, int] = {}
        at = 0
        for n in self._order:
            self._place[n] = at
            at += self._table.size[n]
        self.total_bytes = at
        self._landed_bytes = 0

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Know who has the chunks."""
        self._peers.follow(self._swarm)
        try:
            yield
        finally:
            self._peers.unfollow(self._swarm)

    async def wait_for_holders(self) -> bool:
        """Until some peer has told that it has any, for a moment at most; whether one has."""
        with trio.move_on_after(HOLDERS_SECONDS):
            while not self._peers.swarm_holders(self._swarm):  # noqa: ASYNC110  # bitmaps of any peer, no event for it
                await trio.sleep(LOOK_SECONDS)
            return True
        return False

    async def run(
        self, index: PlainIndex, spool: int, progress: Progress, descriptor: Descriptor
    ) -> PlainIndex:
        """Gather and check; returns the index that was made of the stream, equal to `index` but for its warnings."""
        check = IndexCheck(index)
        failures: list[P2pgzError] = []
        send, receive = trio.open_memory_channel[list[int]](1)

        async def check_windows() -> None:
            try:
                async with receive:
                    async for window in receive:
                        await trio.to_thread.run_sync(self._check_window, check, spool, window)
            except (ImageInvalid, PoolFull) as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async def fetch_windows() -> None:
            try:
                async with send:
                    for window in self._windows():
                        await self._fetch(window, spool)
                        await send.send(window)
                        await progress(self._event(descriptor))
            except P2pgzError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async def watch_rate() -> None:
            before = 0
            while True:
                await trio.sleep(RATE_SECONDS)
                if self._landed_bytes - before < RATE_MIN_BYTES_PER_SECOND * RATE_SECONDS:
                    failures.append(PeersGaveUp("peers are slower than a registry"))
                    nursery.cancel_scope.cancel()
                before = self._landed_bytes

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as work:
                nursery.start_soon(watch_rate)
                work.start_soon(check_windows)
                work.start_soon(fetch_windows)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        return await trio.to_thread.run_sync(check.finish)

    def _event(self, descriptor: Descriptor) -> dict[str, object]:
        percent = 100 * self._landed_bytes // self.total_bytes if self.total_bytes else 100
        return {
            "event": "progress",
            "text": f"layer {descriptor.digest.hex[:12]} is not lazy: reading all of it from peers, {percent} %",
            "done": self._landed_bytes,
            "total": self.total_bytes,
        }

    def _windows(self) -> Iterator[list[int]]:
        window: list[int] = []
        window_bytes = 0
        for n in self._order:
            size = self._table.size[n]
            if window and (window_bytes + size > WINDOW_BYTES or len(window) >= WINDOW_CHUNKS):
                yield window
                window, window_bytes = [], 0
            window.append(n)
            window_bytes += size
        if window:
            yield window

    def _check_window(self, check: IndexCheck, spool: int, window: list[int]) -> None:
        for n in window:
            payload = os.pread(spool, self._table.size[n], self._place[n])
            if len(payload) != self._table.size[n]:
                raise PoolFull("a spool file lost its end", hint="look at the disk of the state directory")
            check.take(payload)

    async def _fetch(self, window: list[int], spool: int) -> None:
        """Bring the chunks of a window into the spool. Raises PeersGaveUp."""
        left = set(window)
        await self._from_pool(left, spool)
        tried: dict[PeerId, set[int]] = {}
        stuck_at = trio.current_time() + HOLDERS_SECONDS
        while left:
            holders = self._peers.swarm_holders(self._swarm)
            plan = assign(
                {
                    n: [h.peer for h in holders if h.has(n) and n not in tried.get(h.peer, ())]
                    for n in sorted(left)
                },
                self._table.size,
                {h.peer: h.wait_seconds for h in holders},
                {h.peer: h.bytes_per_second for h in holders},
            )
            if plan:
                await self._ask_all(plan, left, tried, spool)
                stuck_at = trio.current_time() + HOLDERS_SECONDS
            elif trio.current_time() < stuck_at:
                await trio.sleep(LOOK_SECONDS)
            else:
                raise PeersGaveUp(f"no peer has {len(left)} of its chunks")

    async def _from_pool(self, left: set[int], spool: int) -> None:
        """What is here in other segments needs nobody."""
        for n in sorted(left):
            digest = self._table.digest(n)
            place = self._pool.find(SHARED_DOMAIN, digest)
            if place is None:
                continue
            segment, m = place
            try:
                chunk = verify(digest, bytes(segment.view(m)), source="pool")
            except (ChunkMissing, ChunkCorrupt):
                continue
            await self._land(left, spool, [(n, chunk)])
            self._counters.trace.note(SHARED_DOMAIN, self._table, [n], POOL, 0.0)
            self._counters.pool_chunks += 1
            self._counters.pool_bytes += len(chunk)

    async def _ask_all(
        self, plan: dict[PeerId, list[int]], left: set[int], tried: dict[PeerId, set[int]], spool: int
    ) -> None:
        failures: list[P2pgzError] = []
        retries: list[float] = []

        began = trio.current_time()

        async def landed(peer: PeerId, good: list[tuple[int, VerifiedChunk]]) -> None:
            source, seconds = Source(Kind.PEER, str(peer)), trio.current_time() - began
            new = [n for n, _ in good if n in left]
            self._counters.trace.note(SHARED_DOMAIN, self._table, new, source, seconds)
            try:
                await self._land(left, spool, good)
            except PoolFull as error:  # our own trouble: no peer can help
                failures.append(error)
                nursery.cancel_scope.cancel()
                return
            self._counters.from_peers(chunk for _, chunk in good)
            self._rate.charge(sum(len(chunk) for _, chunk in good))

        async def ask(peer: PeerId, chunks: list[int]) -> None:
            try:
                answer = await self._peers.fetch(
                    peer,
                    self._swarm,
                    self._table,
                    chunks,
                    priority=Priority.READ_AHEAD,
                    landed=partial(landed, peer),
                )
            except P2pgzError as error:
                self._counters.peer_failures += 1
                log.info("peer.failed", peer=str(peer), chunks=len(chunks), reason=error.what)
                return
            if answer.busy:
                tried[peer].difference_update(answer.busy)
                retries.append(answer.retry_seconds)

        async with trio.open_nursery() as nursery:
            for peer, chunks in plan.items():
                tried.setdefault(peer, set()).update(chunks)
                nursery.start_soon(ask, peer, chunks)
        if failures:
            raise failures[0]
        if retries:
            await trio.sleep(min(max(*retries, BUSY_SECONDS_MIN), BUSY_SECONDS_MAX))

    async def _land(self, left: set[int], spool: int, good: list[tuple[int, VerifiedChunk]]) -> None:
        def write() -> None:
            for n, chunk in good:
                write_at(spool, self._place[n], chunk.data)

        if sum(len(chunk) for _, chunk in good) > INLINE_BYTES:
            await trio.to_thread.run_sync(write)
        else:
            write()
        self._landed_bytes += sum(len(chunk) for n, chunk in good if n in left)
        left.difference_update(n for n, _ in good)
