"""The node's side of the segment hosts: asks for mounts, for the self-test, and for a successor of one that was killed.

A mount is an FsSession like one in tree mode, over a channel of its own; its end, and a node's take-over, are the same. When
a host is killed, the sessions of its mounts end; each is resumed by a host that has the old one's connection from the
holder, and the next new mount starts another host. Called by `erofs_mode`.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Final, TypeVar

import msgspec
import trio

from p2pgz.errors import MountUnavailable, StateError
from p2pgz.mount import hosted, hosting, relink, setup
from p2pgz.mount.held import HolderClient
from p2pgz.mount.hosting import ErofsPart, Hosted, HostPart, Opening, ResumePart, SelfTested, SelfTestPart
from p2pgz.mount.roster import Roster
from p2pgz.mount.segment_process import HostProcess, answer_of
from p2pgz.mount.session import Ensure, FsSession, Observe
from p2pgz.mount.setup import Failed, Ready, SessionOptions
from p2pgz.mount.spawner import Spawner

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
    """One segment host that makes mounts, and one for each earlier host that was killed under living mounts. Made by
    `SegmentClient.open()`."""

    def __init__(
        self, nursery: trio.Nursery, run_path: Path | None, holder: HolderClient | None, spawner: Spawner
    ) -> None:
        self._nursery = nursery
        self._run_path = run_path
        self._holder = holder
        self._spawner = spawner
        self._maker: HostProcess | None = None
        self._heirs: dict[str, HostProcess] = {}  # by the name of their connection
        self._starting = trio.Lock()
        self.roster = Roster()
        self.pid = 0
        """of the host that was started last"""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        run_path: Path | None = None,
        holder: HolderClient | None = None,
        spawner: Spawner | None = None,
    ) -> AsyncIterator[SegmentClient]:
        """Leaving it ends no mount; a host without mounts ends. Without a holder mounts end with their host."""
        async with trio.open_nursery() as nursery:
            spawns = spawner or Spawner(nursery, lambda pid, status: None)
            client = cls(nursery, run_path, holder, spawns)
            try:
                yield client
            finally:
                for host in [client._maker, *client._heirs.values()]:
                    if host is not None:
                        host.stop()
                if spawner is None:
                    spawns.stop()
                nursery.cancel_scope.cancel()

    async def prepare(self) -> None:
        """Start the host; the first mount need not wait for it then."""
        await self._maker_host()

    def record_of(self, mount_id: str) -> Hosted | None:
        """What another host has to know to serve a mount; None when it has ended, or is not one of a segment host."""
        return hosted.read_record(self._run_path, mount_id) if self._run_path is not None else None

    def records(self) -> dict[str, Hosted]:
        """The same of all mounts, by id."""
        return dict(hosted.records(self._run_path)) if self._run_path is not None else {}

    def forget(self, mount_id: str) -> None:
        """Nobody can serve this mount any more."""
        if self._run_path is not None:
            hosted.record_path(self._run_path, mount_id).unlink(missing_ok=True)

    async def start_session(
        self, opening: ErofsPart, options: SessionOptions, ensure: Ensure, observe: Observe | None = None
    ) -> FsSession:
        """Mount; the session has the detached mount's descriptor. Raises MountUnavailable or StateError."""
        options = self._with_socket(options)

        async def ask(channel: trio.socket.SocketType) -> tuple[Ready, int]:
            message, fds = await _exchange(channel, opening, options)
            if isinstance(message, Ready) and len(fds) == 1:
                return message, fds[0]
            setup.close_all(fds)
            if isinstance(message, Failed):
                raise setup.to_error(message)
            raise MountUnavailable("the segment host gave an answer that is not understood")

        with self.roster.starting():
            connection, (ready, mount_fd) = await self._ask(self._maker_host, ask)
            return self._enter(connection, options, ensure, observe, ready, mount_fd)

    async def resume_session(
        self, record: Hosted, options: SessionOptions, ensure: Ensure, observe: Observe | None = None
    ) -> FsSession:
        """Have a mount served again whose host is gone, or does not answer. Raises MountUnavailable or StateError."""
        options = self._with_socket(options)

        async def ask(channel: trio.socket.SocketType) -> Ready:
            message, fds = await _exchange(channel, ResumePart(record), options)
            setup.close_all(fds)
            if isinstance(message, Failed):
                raise setup.to_error(message)
            assert isinstance(message, Ready)
            return message

        async def heir() -> HostProcess:
            return await self._heir_of(record.host)

        with self.roster.starting():
            connection, ready = await self._ask(heir, ask)
            return self._enter(connection, options, ensure, observe, ready, -1)

    async def retire(self, record: Hosted, pid: int) -> None:
        """End a host that is well, if it still is the one of this process number: another one is to take over."""
        if self._holder is not None:
            held = (await self._holder.held()).get(record.host)
            if held is not None and held.pid == pid:
                await self._holder.kill(record.host)

    def _with_socket(self, options: SessionOptions) -> SessionOptions:
        if self._run_path is None or options.socket_path:
            return options
        name = relink.socket_name(options.hold_id or token_hex(8), token_hex(4))
        return msgspec.structs.replace(options, socket_path=self._run_path / name)

    def _enter(
        self,
        connection: socket.socket,
        options: SessionOptions,
        ensure: Ensure,
        observe: Observe | None,
        ready: Ready,
        mount_fd: int,
    ) -> FsSession:
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
            connection, answer = await self._ask(self._maker_host, ask)
        except MountUnavailable as error:
            return SelfTested(False, error.what, False)
        connection.close()
        return answer

    async def _ask(
        self,
        find: Callable[[], Awaitable[HostProcess]],
        ask: Callable[[trio.socket.SocketType], Awaitable[T]],
    ) -> tuple[socket.socket, T]:
        """Open a channel and do the first exchange on it; returns the channel, non-blocking."""
        for _ in range(ATTEMPTS):
            host = await find()
            try:
                ours = host.open_channel()
            except OSError:
                host.stop()
                continue
            try:
                with trio.fail_after(ANSWER_SECONDS), trio.socket.from_stdlib_socket(ours.dup()) as channel:
                    return ours, await ask(channel)
            except trio.TooSlowError:
                ours.close()
                raise MountUnavailable(f"the segment host gave no answer in {ANSWER_SECONDS:.0f} s") from None
            except OSError:  # it was killed, perhaps with our request unread: the next one is a new process
                ours.close()
                host.stop()
            except BaseException:
                ours.close()
                raise
        raise MountUnavailable("the segment host keeps ending", hint="the node's log says why")

    async def _maker_host(self) -> HostProcess:
        """The host that makes mounts."""
        async with self._starting:
            if self._maker is None or not self._maker.runs:
                self._maker = await self._start(HostPart(*self._holder_part(f"segments-{token_hex(8)}")))
            return self._maker

    async def _heir_of(self, name: str) -> HostProcess:
        """The host that goes on with the connection of another one; whoever has it now is ended."""
        async with self._starting:
            heir = self._heirs.get(name)
            if heir is None or not heir.runs:
                if self._holder is None:
                    raise MountUnavailable("without a holder a mount ends with its host")
                await self._holder.kill(name)
                heir = self._heirs[name] = await self._start(HostPart(*self._holder_part(name), resume=True))
            return heir

    def _holder_part(self, name: str) -> tuple[bytes, str]:
        return (os.fsencode(self._holder.path), name) if self._holder is not None else (b"", name)

    async def _start(self, part: HostPart) -> HostProcess:
        if self._holder is not None:
            await self._holder.ensure()
        host = await HostProcess.start(self._spawner, part)
        self.pid = host.pid
        self._nursery.start_soon(host.watch)
        return host


async def _exchange(
    channel: trio.socket.SocketType, opening: Opening, options: SessionOptions
) -> tuple[setup.Message, list[int]]:
    await channel.send(hosting.encode(opening))
    for datagram, fds in setup.encode_session(options, with_fds=True):
        await relink.send(channel, datagram, fds)
    return await answer_of(channel)
