"""The node's side of the segment host: starts it, asks for mounts and for the self-test. Called by `erofs_mode`.

A mount is an FsSession like one in tree mode, over a channel of its own; its end, and a node's take-over, are the same. When
the host is killed, all its mounts end for us (the kernel answers EIO for what it has not cached) and the next mount starts
another host.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Final, TypeVar

import msgspec
import structlog
import trio

from p2pgz.errors import MountUnavailable, StateError
from p2pgz.mount import hosting, relink, setup
from p2pgz.mount.hosting import ErofsPart, SelfTested, SelfTestPart
from p2pgz.mount.roster import Roster
from p2pgz.mount.session import Ensure, FsSession, Observe
from p2pgz.mount.setup import Failed, Ready, SessionOptions

log = structlog.get_logger(component="mount")

START_SECONDS: Final = (
    20.0  # the host imports pyfuse3 and trio before it answers, on a loaded machine for seconds
)
ANSWER_SECONDS: Final = 40.0  # a self-test may take a few times 5 s when the kernel misbehaves
ATTEMPTS: Final = 2

T = TypeVar("T")


class HostedSession(FsSession):
    """A mount of the segment host: its process goes on when it ends, so no exit is waited for."""

    def started(self, ready: Ready, mount_fd: int, exit_status: int | None) -> None:
        """See FsSession."""
        super().started(ready, mount_fd, exit_status)
        self._expects_exit = False

    async def _receive(self, nursery: trio.Nursery) -> None:
        await super()._receive(nursery)
        # the host removes a mount's socket when the mount has ended; what is left over is left by its death
        died = bool(self.options.socket_path) and Path(self.options.socket_path).exists()
        self.exited(signal.SIGKILL if died else 0)


class SegmentClient:
    """At most one segment host at a time. Made by `SegmentClient.open()`."""

    def __init__(self, nursery: trio.Nursery, run_path: Path | None) -> None:
        self._nursery = nursery
        self._run_path = run_path
        self._control: socket.socket | None = None
        self._starting = trio.Lock()
        self.roster = Roster()
        self.pid = 0
        """of the host that was started last"""

    @classmethod
    @asynccontextmanager
    async def open(cls, run_path: Path | None = None) -> AsyncIterator[SegmentClient]:
        """Leaving it ends no mount; a host without mounts ends."""
        async with trio.open_nursery() as nursery:
            client = cls(nursery, run_path)
            try:
                yield client
            finally:
                client._stop()
                nursery.cancel_scope.cancel()

    async def prepare(self) -> None:
        """Start the host; the first mount need not wait for it then."""
        if self._control is None:
            await self._start()

    async def start_session(
        self, opening: ErofsPart, options: SessionOptions, ensure: Ensure, observe: Observe | None = None
    ) -> FsSession:
        """Mount; the session has the detached mount's descriptor. Raises MountUnavailable or StateError."""
        if self._run_path is not None and not options.socket_path:
            options = msgspec.structs.replace(
                options,
                socket_path=self._run_path
                / relink.socket_name(options.hold_id or token_hex(8), token_hex(4)),
            )

        async def ask(channel: trio.socket.SocketType) -> tuple[Ready, int]:
            await channel.send(hosting.encode(opening))
            for datagram, fds in setup.encode_session(options, with_fds=True):
                await relink.send(channel, datagram, fds)
            message, fds = await _answer(channel)
            if isinstance(message, Ready) and len(fds) == 1:
                return message, fds[0]
            setup.close_all(fds)
            if isinstance(message, Failed):
                raise setup.to_error(message)
            raise MountUnavailable("the segment host gave an answer that is not understood")

        with self.roster.starting():
            connection, (ready, mount_fd) = await self._ask(ask)
            session = HostedSession(connection, options, ensure, observe)
            session.started(ready, mount_fd, None)
            self.roster.enter(session)
        self._nursery.start_soon(self._live, session)
        return session

    async def _live(self, session: HostedSession) -> None:
        try:
            await session.run()
        finally:
            self.roster.leave(session)

    async def self_test(self, folder: Path) -> SelfTested:
        """Whether the kernel can be trusted; `folder` is on the disk where metadata will be."""

        async def ask(channel: trio.socket.SocketType) -> SelfTested:
            await channel.send(hosting.encode(SelfTestPart(bytes(folder))))
            try:
                datagram, fds = await relink.receive_raw(channel)
            except StateError as error:
                raise ConnectionResetError(str(error)) from error
            setup.close_all(fds)
            answer = hosting.decode_self_tested(datagram)
            if answer is not None:
                return answer
            message = setup.decode(datagram)
            assert isinstance(message, Failed)
            return SelfTested(False, message.what)

        try:
            connection, answer = await self._ask(ask)
        except MountUnavailable as error:
            return SelfTested(False, error.what)
        connection.close()
        return answer

    async def _ask(self, ask: Callable[[trio.socket.SocketType], Awaitable[T]]) -> tuple[socket.socket, T]:
        """Open a channel and do the first exchange on it; returns the channel, non-blocking."""
        for _ in range(ATTEMPTS):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            try:
                with theirs:
                    control = self._control or await self._start()
                    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                    socket.send_fds(control, [hosting.NEW_CHANNEL], [theirs.fileno()], flags)
                with trio.fail_after(ANSWER_SECONDS), trio.socket.from_stdlib_socket(ours.dup()) as channel:
                    return ours, await ask(channel)
            except trio.TooSlowError:
                ours.close()
                raise MountUnavailable(f"the segment host gave no answer in {ANSWER_SECONDS:.0f} s") from None
            except OSError:  # it was killed, perhaps with our request unread: the next one is a new process
                ours.close()
                self._stop()
            except BaseException:
                ours.close()
                raise
        raise MountUnavailable("the segment host keeps ending", hint="the node's log says why")

    async def _start(self) -> socket.socket:
        async with self._starting:
            if self._control is not None:
                return self._control
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            try:
                with theirs:
                    # -P: the current directory must not supply modules. It forks: the host itself is not our child, since
                    # it may outlive us
                    await trio.run_process(
                        [sys.executable, "-P", "-m", "p2pgz.mount.segment_host", str(theirs.fileno())],
                        pass_fds=(theirs.fileno(),),
                        cwd="/",
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                    )
                with trio.fail_after(START_SECONDS), trio.socket.from_stdlib_socket(ours.dup()) as channel:
                    message, fds = await _answer(channel)
            except (OSError, subprocess.CalledProcessError, trio.TooSlowError) as error:
                ours.close()
                raise MountUnavailable(
                    f"the segment host does not start: {error}", hint="the node's log says why"
                ) from error
            except BaseException:
                ours.close()
                raise
            setup.close_all(fds)
            if not isinstance(message, Ready):
                ours.close()
                assert isinstance(message, Failed)
                raise setup.to_error(message)
            self._control, self.pid = ours, message.pid
            self._nursery.start_soon(self._watch, ours)
            return ours

    async def _watch(self, control: socket.socket) -> None:
        """Notice its end: it says nothing more on this socket."""
        with suppress(OSError, trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(control)
        if self._control is control:
            log.warning("segments.ended", pid=self.pid)
            self._stop()

    def _stop(self) -> None:
        if self._control is not None:
            control, self._control = self._control, None
            trio.lowlevel.notify_closing(control)
            control.close()


async def _answer(channel: trio.socket.SocketType) -> tuple[setup.Message, list[int]]:
    try:
        return await relink.receive(channel)
    except StateError as error:
        raise ConnectionResetError(str(error)) from error
