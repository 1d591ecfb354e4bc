"""The `fs` side of the channel: sends what `demand` decides, wakes readers, survives the loss of the node.

Runs in the `fs` process, made and run by `fs`. While no node is connected requests are kept; a new connection hears them
all again. Opens no file and logs nothing on the way of a read.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

import trio

from p2pgz.core.model import MAX_CHUNK_BYTES
from p2pgz.mount.channel import (
    CHANNEL_VERSION,
    DATAGRAM_BYTES,
    RECORDS_PER_DATAGRAM,
    Kind,
    Record,
    decode,
    encode,
)
from p2pgz.mount.demand import Demand
from p2pgz.mount.observed import FirstReads
from p2pgz.mount.relink import descriptors
from p2pgz.mount.setup import close_all
from p2pgz.pool.presence import Presence

# A node that says "present" of a chunk that is not is asked again, since it was evicted in between: until the deadline, at
# first at once, then after 10, 20, 40 … 320 ms, so that eviction has settled
ATTEMPTS_AT_ONCE: Final = 4
PAUSE_START_SECONDS: Final = 0.01
PAUSE_MAX_DOUBLINGS: Final = 5
# A memfd with a chunk: no TOC has a larger one
UNKEPT_MAX_BYTES: Final = MAX_CHUNK_BYTES
# The kernel repeats a failed read-ahead page by page at once; that repetition must not wait for a whole deadline again
AFTER_DEADLINE_SECONDS: Final = 0.5


class NodeLink:
    """The connection to the node, or the lack of one."""

    def __init__(
        self,
        presences: list[Presence],
        *,
        read_deadline_seconds: float,
        set_read_ahead: Callable[[int], object],
        drain: Callable[[], object] = lambda: None,  # who drains says so (DRAINING)
        invalidate: Callable[[int, int, int], object] = lambda segment, first, count: None,
    ) -> None:
        self.presences = presences
        self.demand = Demand()
        self.garbage = 0
        self.lookups = 0
        self.first_reads: FirstReads | None = None
        """who tells the node of them, while it wants to know"""
        self.reads = 0
        self._deadline_seconds = read_deadline_seconds
        self._set_read_ahead = set_read_ahead
        self._drain = drain
        self._invalidate = invalidate
        self._socket: socket.socket | None = None
        self._outbox: deque[Record] = deque()
        self._clogged = trio.Event()
        self._expired: dict[tuple[int, int], float] = {}  # segment, chunk → until when its reads fail at once

    @property
    def connected(self) -> bool:
        """Whether a node hears us now."""
        return self._socket is not None

    async def ensure(self, segment: int, first: int, count: int, unkept: dict[int, bytes]) -> int:
        """Wait until chunks first .. first+count are present; returns 0, or the errno that the reader gets.

        Chunks that the pool cannot keep are in `unkept` then; the others are present at the moment of the return, and the
        caller has to use them before it awaits anything: later, they may be evicted.
        """
        return await self.ensure_chunks(segment, range(first, first + count), unkept)

    async def ensure_chunks(self, segment: int, chunks: Sequence[int], unkept: dict[int, bytes]) -> int:
        """The same for chunks in any order; the first one that is missing is what the reader is stuck at."""
        missing: list[int] = []
        with trio.move_on_after(self._deadline_seconds):
            for attempt in count():
                if attempt >= ATTEMPTS_AT_ONCE:
                    doublings = min(attempt - ATTEMPTS_AT_ONCE, PAUSE_MAX_DOUBLINGS)
                    await trio.sleep(PAUSE_START_SECONDS * 2**doublings)
                has = self.presences[segment].has
                missing = [n for n in chunks if not has(n) and n not in unkept]
                if not missing:
                    return 0
                if self._expired and self._has_just_expired(segment, missing):
                    return errno.EIO
                arrived = trio.Event()
                ticket, records = self.demand.want(segment, missing, arrived.set)
                self.send(records)
                try:
                    await arrived.wait()
                finally:
                    if not ticket.done:
                        self.send(self.demand.give_up(ticket))
                if ticket.errno:
                    return ticket.errno
                unkept |= ticket.unkept
        until = trio.current_time() + AFTER_DEADLINE_SECONDS
        self._expired |= {(segment, n): until for n in missing}
        return errno.EIO

    def abandon(self) -> None:
        """Nobody answers here any more: wake all readers that wait, with an error."""
        self.demand.fail_all(errno.EIO)

    def _has_just_expired(self, segment: int, missing: list[int]) -> bool:
        now = trio.current_time()
        self._expired = {key: until for key, until in self._expired.items() if until > now}
        return any((segment, n) in self._expired for n in missing)

    def send(self, records: list[Record]) -> None:
        """Send now what the socket takes, the rest as soon as it can."""
        if self._socket is None or not records:
            return  # a later connection hears everything that is unanswered
        self._outbox.extend(records)
        if not self._clogged.is_set():
            self._flush()

    def _flush(self) -> None:
        connection, outbox = self._socket, self._outbox
        while connection is not None and outbox:
            batch = [outbox[n] for n in range(min(len(outbox), RECORDS_PER_DATAGRAM))]
            try:
                connection.send(encode(batch), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._clogged.set()
                return
            except OSError:
                outbox.clear()  # the connection is gone; `run` notices
                return
            for _ in batch:
                outbox.popleft()

    async def run(self, connection: socket.socket) -> None:
        """Serve one connection until it ends; owns and closes the socket."""
        if self._socket is not None:
            raise RuntimeError("one connection at a time")
        self._socket = connection
        self._outbox.clear()
        self._clogged = trio.Event()
        hello = Record(Kind.HELLO, first=CHANNEL_VERSION, amount=len(self.presences), id=os.getpid())
        try:
            self.send([hello, *self.demand.unanswered()])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._unclog, connection)
                await self._receive(connection)
                nursery.cancel_scope.cancel()
        finally:
            self._socket = None
            self.first_reads = None
            trio.lowlevel.notify_closing(connection)
            connection.close()

    async def _unclog(self, connection: socket.socket) -> None:
        while True:
            await self._clogged.wait()
            await trio.lowlevel.wait_writable(connection)
            self._clogged = trio.Event()
            self._flush()

    async def _receive(self, connection: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(connection)
            try:
                datagram, ancillary, _, _ = connection.recvmsg(
                    DATAGRAM_BYTES + 1, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except OSError:
                return
            fds = descriptors(ancillary)
            try:
                if not datagram:
                    return
                records, unknown = decode(datagram)
                self.garbage += unknown
                for record in records:
                    if record.kind is Kind.UNKEPT:
                        self._take_bytes(record, fds)
                    else:
                        self._take(record)
            finally:
                close_all(fds)

    def _take_bytes(self, record: Record, fds: list[int]) -> None:
        if len(fds) != 1 or not 0 < record.amount <= UNKEPT_MAX_BYTES:
            self.garbage += 1
            return
        data = os.pread(fds[0], record.amount, 0)
        if len(data) == record.amount:
            self.demand.delivered(record.segment, record.first, data)
        else:
            self.garbage += 1

    def _take(self, record: Record) -> None:
        match record.kind:
            case Kind.REPLY:
                self.demand.replied(record.id, record.errno)
            case Kind.PING:
                lookups, reads = self.lookups & 0xFFFF_FFFF, self.reads & 0xFFFF_FFFF
                self.send([Record(Kind.PONG, 0, 0, lookups, reads, len(self.demand), record.id)])
            case Kind.READ_AHEAD:
                self._set_read_ahead(record.amount)
            case Kind.DRAIN:
                self._drain()
            case Kind.INVALIDATE if record.segment < len(self.presences):
                self._invalidate(record.segment, record.first, record.amount)
            case Kind.OBSERVE:
                self.first_reads = None
            case _:
                self.garbage += 1
