"""The node's sending side of a channel: records in order, batched, and chunk bytes that travel as a memfd.

Used by `session`. What the socket does not take at once waits here; bytes that wait are bounded by who asks `has_room`.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from typing import Final

import trio

from p2pgz.mount.channel import RECORDS_PER_DATAGRAM, Record, encode

# Several reads of 1 MiB, or one chunk of the largest size
WAITING_MAX_BYTES: Final = 32 << 20


class Outbox:
    """Records to one `fs` process. `run` is its task."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiting: deque[Record | tuple[Record, bytes]] = deque()
        self._waiting_bytes = 0
        self._clogged = trio.Event()
        self._emptied = trio.Event()

    @property
    def has_room(self) -> bool:
        """Whether more chunk bytes may be given."""
        return self._waiting_bytes < WAITING_MAX_BYTES

    async def drained(self) -> None:
        """Return when there may be room again."""
        await self._emptied.wait()

    def send(self, record: Record) -> None:
        """Now, or as soon as the socket takes it."""
        self._waiting.append(record)
        if not self._clogged.is_set():
            self._flush()

    def send_bytes(self, record: Record, data: bytes) -> None:
        """A record with bytes to come along."""
        self._waiting.append((record, data))
        self._waiting_bytes += len(data)
        if not self._clogged.is_set():
            self._flush()

    def _flush(self) -> None:
        while self._waiting:
            batch: list[Record] = []
            for item in self._waiting:
                if isinstance(item, Record) and len(batch) < RECORDS_PER_DATAGRAM:
                    batch.append(item)
                else:
                    break
            try:
                if batch:
                    self._socket.send(encode(batch), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    for _ in batch:
                        self._waiting.popleft()
                else:
                    first = self._waiting[0]
                    assert not isinstance(first, Record)
                    self._send_one(*first)
                    self._waiting.popleft()
                    self._waiting_bytes -= len(first[1])
            except BlockingIOError:
                self._clogged.set()
                return
            except OSError:
                self._waiting.clear()  # the other side is gone; who receives notices
                self._waiting_bytes = 0
        self._emptied.set()
        self._emptied = trio.Event()

    def _send_one(self, record: Record, data: bytes) -> None:
        fd = os.memfd_create("p2pgz-chunk", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))]
            self._socket.sendmsg([encode([record])], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            os.close(fd)

    async def run(self) -> None:
        """Send on whenever the socket takes more again."""
        while True:
            await self._clogged.wait()
            await trio.lowlevel.wait_writable(self._socket)
            self._clogged = trio.Event()
            self._flush()
