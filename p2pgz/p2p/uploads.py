"""What peers have asked of us: the queue of one connection, and what all of them share.

Called by `p2p.connection`. The queue decides what goes out next (most urgent first, then in the order of arrival) and
refuses what is beyond its limits; the shared part keeps uploads to some slots and to a rate, so that giving does not
disturb this host's own work.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio

from p2pgz.core.messages import Alternative, Want, chunks_of
from p2pgz.core.pacing import Pace
from p2pgz.core.schedule import Priority
from p2pgz.core.wirezstd import pays
from p2pgz.p2p.offers import Offer

SLOTS: Final = 16
# Connections that wait for a slot; beyond, asking another peer is faster
WAITING_MAX: Final = 2 * SLOTS
# A peer's requests at one time, and the chunks in them; the specification names both
REQUESTS_MAX: Final = 64
QUEUED_CHUNKS_MAX: Final = 8192
RETRY_MS: Final = 100
# a longer pause would outlast the backlog: requests are forgotten, peers go
BUSY_MAX_SECONDS: Final = 5.0
CLASSES: Final = len(Priority)
# What is sent in one go, besides a single larger part: long enough to be cheap, short enough for a more urgent request
BATCH_BYTES: Final = 256 << 10
# well within the time after which a peer without an answer takes us for dead
WAIT_MAX_SECONDS: Final = 1.0
# One worker compresses: the other core is the reader's
_ZSTD_WORKERS: Final = 1
# one thread makes 387 MB/s of level 1: a link that takes this much raw needs no help
ZSTD_BELOW_BYTES_PER_SECOND: Final = 150e6


class _Asked:
    """One request of the peer: how far each of its chunks has gone out, and which of them are being sent."""

    __slots__ = ("chunks", "offer", "priority", "sending")

    def __init__(self, offer: Offer, priority: int) -> None:
        self.offer = offer
        self.priority = priority
        self.chunks: dict[int, int] = {}
        self.sending: dict[int, bool] = {}  # chunk -> whether it was forgotten meanwhile


class UploadQueue:
    """Chunks that one peer waits for. `take` and `sent` come in pairs; forgetting may happen between them."""

    __slots__ = ("_arrival", "_heap", "_requests", "class_bytes")

    def __init__(self) -> None:
        self._heap: list[
            tuple[int, int, int, int]
        ] = []  # priority, arrival, request, chunk; stale entries stay
        self._arrival = itertools.count()
        self._requests: dict[int, _Asked] = {}
        self.class_bytes = [0] * CLASSES
        """that have not gone out yet, per class"""

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return sum(len(asked.chunks) for asked in self._requests.values())

    def knows(self, request: int) -> bool:
        """Whether this request is still being answered: its number must not be used again until then."""
        return request in self._requests

    def has_room(self, want: Want) -> bool:
        """Whether a further request is within the limits."""
        wanted = sum(count for _, count in want.runs)
        return len(self._requests) < REQUESTS_MAX and len(self) + wanted <= QUEUED_CHUNKS_MAX

    def add(self, want: Want, offer: Offer) -> list[int]:
        """Queue what we have; returns the chunks that we have not, ascending."""
        missing = []
        asked = _Asked(offer, want.priority)
        count = offer.chunk_count
        for n in chunks_of(want.runs):
            if n < count and offer.has(n):
                asked.chunks[n] = 0
                self._count(asked, offer.size(n))
                heapq.heappush(self._heap, (want.priority, next(self._arrival), want.request, n))
            else:
                missing.append(n)
        if asked.chunks:
            self._requests[want.request] = asked
        return missing

    def forget(self, request: int, chunks: Iterable[int] | None) -> list[int]:
        """Drop chunks of a request (None: all of them); returns those that will not be sent, ascending."""
        asked = self._requests.get(request)
        if asked is None:
            return []
        chosen = sorted(asked.chunks if chunks is None else asked.chunks.keys() & set(chunks))
        dropped = []
        for n in chosen:
            if n in asked.sending:
                asked.sending[n] = True
            else:
                self._drop(asked, n)
                dropped.append(n)
        self._tidy(request, asked)
        return dropped

    def head_priority(self) -> int:
        """The class of what goes out next; the last class when there is nothing."""
        while self._heap:
            priority, _, request, n = self._heap[0]
            if self._waiting(request, n) is not None:
                return priority
            heapq.heappop(self._heap)
        return CLASSES - 1

    def take(self) -> tuple[int, int, Offer, int] | None:
        """Request, chunk, offer and offset of what goes out next, or None."""
        while self._heap:
            _, _, request, n = heapq.heappop(self._heap)
            asked = self._waiting(request, n)
            if asked is not None:
                asked.sending[n] = False
                return request, n, asked.offer, asked.chunks[n]
        return None

    def _waiting(self, request: int, n: int) -> _Asked | None:
        asked = self._requests.get(request)
        return None if asked is None or n not in asked.chunks or n in asked.sending else asked

    def sent(self, request: int, n: int, offset: int | None) -> bool:
        """What was taken has gone out up to `offset` (None: it is finished). True: forgotten, the rest must not follow."""
        asked = self._requests[request]
        forgotten = asked.sending.pop(n)
        if offset is None or forgotten:
            self._drop(asked, n)
            self._tidy(request, asked)
            return forgotten and offset is not None
        self._count(asked, asked.chunks[n] - offset)
        asked.chunks[n] = offset
        # a chunk that has begun goes on before others of its class
        heapq.heappush(self._heap, (asked.priority, -1, request, n))
        return False

    def _drop(self, asked: _Asked, n: int) -> None:
        self._count(asked, asked.chunks.pop(n) - asked.offer.size(n))

    def _count(self, asked: _Asked, size: int) -> None:
        self.class_bytes[min(asked.priority, CLASSES - 1)] += size

    def _tidy(self, request: int, asked: _Asked) -> None:
        if not asked.chunks:
            del self._requests[request]
        if not self._requests:
            self._heap.clear()


class Uploads:
    """What all connections share: slots, rate, the compressor's worker, counters."""

    def __init__(
        self,
        *,
        bytes_per_second: int = 0,
        slots: int = SLOTS,
        zstd: bool = True,
        alternatives: Callable[[bytes], tuple[Alternative, ...]] = lambda swarm: (),
    ) -> None:
        self._slots = trio.CapacityLimiter(slots)
        self._pace = Pace(bytes_per_second)
        self._queues: set[UploadQueue] = set()
        self._zstd = zstd
        self._workers = trio.CapacityLimiter(_ZSTD_WORKERS)
        self.alternatives = alternatives
        self.leaving = False
        """the node is about to end: nothing new is promised"""
        self.chunks = self.raw_bytes = self.wire_bytes = self.busy = self.compressed_chunks = 0

    def limit(self, *, bytes_per_second: int, slots: int) -> None:
        """Other limits from now on."""
        self._pace.bytes_per_second = bytes_per_second
        self._slots.total_tokens = slots

    def join(self, queue: UploadQueue) -> None:
        """A further connection, whose queue counts."""
        self._queues.add(queue)

    def leave(self, queue: UploadQueue) -> None:
        """It has ended."""
        self._queues.discard(queue)

    def busy_ms(self, priority: int) -> int:
        """When a peer should ask again, because what is before it would keep it waiting for too long; 0: serve it now."""
        if self.leaving or self._slots.statistics().tasks_waiting >= WAITING_MAX:
            return RETRY_MS
        rate = self._pace.bytes_per_second
        if not rate:
            return 0
        before = sum(sum(queue.class_bytes[: priority + 1]) for queue in self._queues)
        seconds = before / rate + self._pace.wait_seconds(priority, trio.current_time())
        if seconds <= WAIT_MAX_SECONDS:
            return 0
        return int(1000 * min(BUSY_MAX_SECONDS, seconds - WAIT_MAX_SECONDS / 2))

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the slots; first come, first served, so that connections take turns."""
        try:
            self._slots.acquire_nowait()  # `async with` would give way first, though a slot is free
        except trio.WouldBlock:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    def wait_seconds(self, priority: int) -> float:
        """How long the rate makes a class wait; see `core.pacing`."""
        return self._pace.wait_seconds(priority, trio.current_time())

    def spend(self, count: int, priority: int) -> None:
        """Charge for bytes that go out; negative: it was less in the end."""
        self._pace.spend(count, priority, trio.current_time())

    def compresses(self, size: int, ratio: float, blocked_seconds: float, bytes_per_second: float) -> bool:
        """Whether a chunk is to be compressed for a connection that was blocked this long and takes this much."""
        return (
            self._zstd
            and bytes_per_second < ZSTD_BELOW_BYTES_PER_SECOND
            and pays(
                size=size,
                toc_ratio=ratio,
                blocked_seconds=blocked_seconds,
                worker_idle=self._workers.available_tokens >= 1,
            )
        )

    @property
    def workers(self) -> trio.CapacityLimiter:
        """The compressor's threads."""
        return self._workers
