"""The node's side of the `fs` processes: starts one per mount and answers what it asks for.

Called by `mounts`. `FsHost.open()` owns the zygote and all sessions' tasks; leaving it closes every connection but ends no
mount: present bytes go on being served, and a later node takes over with `reattach`. This side never touches /dev/fuse and
never reads a mount.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Final

import msgspec
import structlog
import trio

from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.mount import relink, setup
from p2pgz.mount.channel import DATAGRAM_BYTES, Kind, Record, decode
from p2pgz.mount.outbox import Outbox
from p2pgz.mount.roster import Roster
from p2pgz.mount.setup import Failed, Ready, SegmentFiles, SessionOptions
from p2pgz.mount.spawner import Spawner
from p2pgz.mount.stats import FsStats

__all__ = ["FsHost", "FsSession", "FsStats", "SegmentFiles", "SessionOptions"]

log = structlog.get_logger(component="mount")

START_SECONDS: Final = 20.0  # milliseconds, but a loaded machine imports pyfuse3 and trio for seconds
PING_SECONDS: Final = 1.0
SILENT_PINGS: Final = 10  # pings without an answer, seconds apart: then something is wrong with the process
EXIT_NOTICE_SECONDS: Final = 2.0
# Each is a task of ours. An `fs` has at most 2000 handlers, a handler some dozen missing chunks
MAX_UNANSWERED: Final = 65_536
ERRNO_MAX: Final = 4095  # the kernel's MAX_ERRNO
EIO: Final = 5

Ensure = Callable[[int, int, int, int], Awaitable[Mapping[int, bytes] | None]]
"""`ensure(segment_index, first_chunk, count, priority)`: return when they are present, or the bytes of those that the pool
cannot keep; raises P2pgzError"""
Observe = Callable[[int, int, int], bool]
"""`observe(segment_index, first_chunk, count)`: they were read for the first time. False: tell no more"""


class FsSession:
    """One `fs` process. Made by `FsHost`; its tasks run in the host's nursery."""

    def __init__(
        self, connection: socket.socket, options: SessionOptions, ensure: Ensure, observe: Observe | None
    ) -> None:
        self.options = options
        self.pid = 0
        self.device = 0
        """st_dev of the mount"""
        self.exit_status: int | None = None
        """wait status of the process, when its end was reported"""
        self.stats = FsStats()
        self._mount_fd = -1
        self._socket = connection
        self._ensure = ensure
        self._observe = observe
        self._scopes: dict[int, trio.CancelScope] = {}
        self._pings: dict[int, trio.Event] = {}
        self._ping_ids = count(1)
        self._outbox = Outbox(connection)
        self._heard_at = trio.current_time()
        self._expects_exit = False
        self._exited = trio.Event()
        self._closed = trio.Event()
        self._draining = trio.Event()

    @property
    def mount_fd(self) -> int:
        """The detached mount, still ours; -1 when it was handed over, or was attached by `fs` itself (not root)."""
        return self._mount_fd

    def take_mount_fd(self) -> int:
        """The detached mount's descriptor; the caller closes it after attaching or sending it."""
        if self._mount_fd < 0:
            raise MountUnavailable("this mount has no descriptor to hand over", hint="it is attached already")
        fd, self._mount_fd = self._mount_fd, -1
        return fd

    def drop_mount_fd(self) -> None:
        """Close the descriptor if nobody took it; a mount that was never attached ends with it."""
        if self._mount_fd >= 0:
            os.close(self.take_mount_fd())

    @property
    def silent_seconds(self) -> float:
        """How long nothing was heard; it answers a ping each second."""
        return trio.current_time() - self._heard_at

    async def wait_closed(self) -> None:
        """Return when the process has ended: after the last unmount, or when it was killed."""
        await self._closed.wait()

    async def ping(self) -> None:
        """Return when the process has answered; the caller sets a time limit."""
        number, event = next(self._ping_ids), trio.Event()
        self._pings[number] = event
        try:
            self._send(Record(Kind.PING, id=number))
            await event.wait()
        finally:
            self._pings.pop(number, None)

    @property
    def is_draining(self) -> bool:
        """Whether it was told to leave its mount to a successor: its end is then not the mount's."""
        return self._draining.is_set()

    async def drain(self) -> None:
        """Have the process leave the kernel's requests to a successor and end once it has answered those it read; returns
        when it reads no more. The caller sets a time limit."""
        self._send(Record(Kind.DRAIN))
        await self._draining.wait()

    def set_read_ahead(self, kilobytes: int) -> None:
        """Change the kernel's read-ahead: more once the image is complete (`setup.READ_AHEAD_COMPLETE_KB`)."""
        self._send(Record(Kind.READ_AHEAD, amount=kilobytes))

    def invalidate(self, segment_index: int, first: int, count: int) -> None:
        """Have the kernel forget what it has cached of chunks whose bits are cleared. An older `fs` ignores it."""
        self._send(Record(Kind.INVALIDATE, 0, 0, segment_index, first, count))

    async def run(self) -> None:
        """Serve the channel until the other side ends it. For the host."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ping_for_ever)
                nursery.start_soon(self._outbox.run)
                await self._receive(nursery)
                nursery.cancel_scope.cancel()
        finally:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self.drop_mount_fd()
        if self.exit_status is None:
            with trio.move_on_after(EXIT_NOTICE_SECONDS if self._expects_exit else 0):
                await self._exited.wait()
        self._closed.set()

    def started(self, ready: Ready, mount_fd: int, exit_status: int | None) -> None:
        """Our own child is ready, and may even have ended; the zygote reports that. For the host."""
        self.pid, self.device = ready.pid, ready.device
        self._mount_fd = mount_fd
        self._expects_exit = True
        if exit_status is not None:
            self.exited(exit_status)

    def exited(self, status: int) -> None:
        """The process is gone. For the host."""
        self.exit_status = status
        self._exited.set()

    async def _receive(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                datagram = self._socket.recv(DATAGRAM_BYTES + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not datagram:
                return
            self._heard_at = trio.current_time()
            records, unknown = decode(datagram)
            self.stats.garbage += unknown
            for record in records:
                self._take(record, nursery)

    def _take(self, record: Record, nursery: trio.Nursery) -> None:
        match record.kind:
            case Kind.REQUEST if self._is_sound(record):
                self.stats.requests += 1
                scope = trio.CancelScope()
                self._scopes[record.id] = scope
                nursery.start_soon(self._answer, record, scope)
            case Kind.CANCEL:
                waiting = self._scopes.get(record.id)
                if waiting is not None:  # else its answer is on the way already
                    self.stats.cancelled += 1
                    waiting.cancel()
            case Kind.PONG:
                self.stats.unanswered_in_fs = record.amount
                self.stats.lookups, self.stats.reads = record.segment, record.first
                event = self._pings.get(record.id)
                if event is not None:
                    event.set()
            case Kind.HELLO:
                self.pid = self.pid or record.id
            case Kind.DRAINING:
                self._draining.set()
            case Kind.OBSERVED if self._is_within(record):
                if not (self._observe and self._observe(record.segment, record.first, record.amount)):
                    self._send(Record(Kind.OBSERVE))
            case _:
                self.stats.garbage += 1

    def _is_within(self, record: Record) -> bool:
        segments = self.options.segments
        return (
            record.segment < len(segments)
            and 0 < record.amount <= segments[record.segment].presence_count - record.first
        )

    def _is_sound(self, record: Record) -> bool:
        unknown = record.id not in self._scopes and len(self._scopes) < MAX_UNANSWERED
        return unknown and self._is_within(record)

    async def _answer(self, record: Record, scope: trio.CancelScope) -> None:
        code = 0
        with scope:
            try:
                await self._supply(record)
            except P2pgzError as error:
                code = error.errno_value
            except Exception:
                log.exception("mount.ensure_failed", source=self.options.source_name)
                code = EIO
        del self._scopes[record.id]
        if scope.cancelled_caught:
            return
        if code:
            self.stats.failed += 1
            code = code if 0 < code <= ERRNO_MAX else EIO
        else:
            self.stats.answered += 1
        self._send(Record(Kind.REPLY, errno=code, id=record.id))

    async def _supply(self, record: Record) -> None:
        """Have the chunks made present; send those along that cannot be."""
        while unkept := await self._ensure(record.segment, record.first, record.amount, record.priority):
            if self._outbox.has_room:
                for n, data in unkept.items():
                    self._outbox.send_bytes(
                        Record(Kind.UNKEPT, 0, 0, record.segment, n, len(data), record.id), data
                    )
                return
            # the process does not read: better to fetch them again than to gather them here
            await self._outbox.drained()

    def _send(self, record: Record) -> None:
        self._outbox.send(record)

    async def _ping_for_ever(self) -> None:
        heard_at, unheard = self._heard_at, 0
        while True:
            # counted, not timed: while this process was stopped, or the machine slept, nobody was asked
            await trio.sleep(PING_SECONDS)
            unheard = unheard + 1 if self._heard_at == heard_at else 0
            heard_at = self._heard_at
            self._send(Record(Kind.PING))
            if unheard != SILENT_PINGS:
                continue
            log.error("fs.silent", pid=self.pid, source=self.options.source_name)
            if self.options.hold_id and self.pid:  # it can be replaced
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                with suppress(OSError):
                    self._socket.shutdown(
                        socket.SHUT_RDWR
                    )  # it may hang in the kernel and keep its side open


class _EndedEarlyError(MountUnavailable):
    """The process that should have become an `fs` is gone without a word."""


class FsHost:
    """All `fs` processes of a node. Made by `FsHost.open()`."""

    def __init__(self, nursery: trio.Nursery, run_path: Path | None) -> None:
        self._nursery = nursery
        self._run_path = run_path
        self.spawner = Spawner(nursery, self._note_exit)
        self._by_pid: dict[int, FsSession] = {}
        self.roster = Roster()
        self._starts = 0  # sessions that do not know their pid yet
        # processes that ended meanwhile: one of them may be such a session's
        self._early_exits: dict[int, int] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, run_path: Path | None = None) -> AsyncIterator[FsHost]:
        """A host that keeps the sockets for a later node in `run_path`. Its zygote starts at once."""
        async with trio.open_nursery() as nursery:
            host = cls(nursery, run_path)
            nursery.start_soon(host.spawner.prepare)
            try:
                yield host
            finally:
                host.spawner.stop()
                nursery.cancel_scope.cancel()

    async def start_session(
        self, options: SessionOptions, ensure: Ensure, observe: Observe | None = None
    ) -> FsSession:
        """Serve an image. As root the mount is detached: take its descriptor from the session and attach it.

        Raises MountUnavailable or StateError; then no process and no mount is left.
        """
        if self._run_path is not None and not options.socket_path:
            name = relink.socket_name(options.hold_id or token_hex(8), token_hex(4))
            options = msgspec.structs.replace(options, socket_path=self._run_path / name)
        with self.roster.starting():
            try:
                return await self._start(options, ensure, observe)
            except _EndedEarlyError:
                # the zygote was killed with our request in its socket: the next one is a new process
                return await self._start(options, ensure, observe)

    async def _start(self, options: SessionOptions, ensure: Ensure, observe: Observe | None) -> FsSession:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._starts += 1
        try:
            with theirs:
                await self.spawner.fork(theirs)
            try:
                with trio.fail_after(START_SECONDS):
                    ready, mount_fd = await self._set_up(ours, options)
            except trio.TooSlowError:
                raise MountUnavailable(
                    f"the file system process was not ready in {START_SECONDS:.0f} s"
                ) from None
            session = FsSession(ours, options, ensure, observe)
            session.started(ready, mount_fd, self._early_exits.get(ready.pid))
        except BaseException:
            ours.close()
            raise
        finally:
            self._starts -= 1
            if not self._starts:
                self._early_exits.clear()
        self._by_pid[ready.pid] = session
        self.roster.enter(session)
        self._nursery.start_soon(self._live, session)
        return session

    async def reattach(
        self, socket_path: Path, adopt: relink.Adopt, ensure: Ensure, observe: Observe | None = None
    ) -> FsSession:
        """Take over a file system process of an earlier node. `adopt` is told what it serves, and returns its segments
        as this node has them (same order); after that `ensure` hears every request that is without an answer."""
        with self.roster.starting():
            connection, options = await relink.connect(socket_path, adopt)
            session = FsSession(connection, options, ensure, observe)
            session.pid = relink.peer_pid(connection)
            self.roster.enter(session)
        self._nursery.start_soon(self._live, session)
        return session

    def orphans(self) -> list[Path]:
        """Sockets in the run directory: one per file system process, dead ones too."""
        return sorted(self._run_path.glob(relink.SOCKET_PATTERN)) if self._run_path is not None else []

    def _note_exit(self, pid: int, status: int) -> None:
        session = self._by_pid.get(pid)
        if session is not None:
            session.exited(status)
        elif self._starts:
            self._early_exits[pid] = status

    async def _live(self, session: FsSession) -> None:
        try:
            await session.run()
        finally:
            self._by_pid.pop(session.pid, None)
            self.roster.leave(session)

    @staticmethod
    async def _set_up(connection: socket.socket, options: SessionOptions) -> tuple[Ready, int]:
        connection.setblocking(False)
        with trio.socket.from_stdlib_socket(connection.dup()) as channel:
            try:
                for datagram, fds in setup.encode_session(options, with_fds=True):
                    await relink.send(channel, datagram, fds)
                message, fds = await relink.receive(channel)
            except (OSError, StateError) as error:
                raise _EndedEarlyError(
                    f"the file system process ended before it was ready: {error}", hint="its log says why"
                ) from error
        if isinstance(message, Failed):
            setup.close_all(fds)
            raise setup.to_error(message)
        if not isinstance(message, Ready) or len(fds) > 1:
            setup.close_all(fds)
            raise MountUnavailable("the file system process gave an answer that is not understood")
        return message, fds[0] if fds else -1
