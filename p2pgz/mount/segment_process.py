"""One segment host as the node sees it: a process, and the socket on which it is passed channels. For `segment_client`."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final

import structlog
import trio

from p2pgz.errors import MountUnavailable, StateError
from p2pgz.mount import hosting, relink, setup
from p2pgz.mount.hosting import HostPart
from p2pgz.mount.setup import Failed, Ready
from p2pgz.mount.spawner import FORK_SEGMENT_HOST, Spawner

log = structlog.get_logger(component="mount")

START_SECONDS: Final = 20.0  # a fork; but the zygote may have to start, on a loaded machine for seconds
_ATTEMPTS: Final = 2


class HostProcess:
    """Made by `start`; `watch` is to run as long as it is used."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control: socket.socket | None = control
        self.pid = pid

    @classmethod
    async def start(cls, spawner: Spawner, part: HostPart) -> HostProcess:
        """Fork one; raises what it says is wrong, or MountUnavailable."""
        for _ in range(_ATTEMPTS):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            try:
                with theirs:
                    await spawner.fork(theirs, FORK_SEGMENT_HOST)
                with trio.fail_after(START_SECONDS), trio.socket.from_stdlib_socket(ours.dup()) as channel:
                    await channel.send(hosting.encode(part))
                    message, fds = await answer_of(channel)
            except trio.TooSlowError:
                ours.close()
                raise MountUnavailable(f"the segment host was not ready in {START_SECONDS:.0f} s") from None
            except OSError:  # the zygote was killed with our request in its socket, or the host at once
                ours.close()
                continue
            except BaseException:
                ours.close()
                raise
            setup.close_all(fds)
            if isinstance(message, Ready):
                return cls(ours, message.pid)
            ours.close()
            assert isinstance(message, Failed)
            raise setup.to_error(message)
        raise MountUnavailable("the segment host does not start", hint="the node's log says why")

    @property
    def runs(self) -> bool:
        """Whether its end was not noticed yet."""
        return self._control is not None

    def open_channel(self) -> socket.socket:
        """A new channel to it, non-blocking; raises OSError when it is gone."""
        if self._control is None:
            raise ConnectionResetError
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                socket.send_fds(self._control, [hosting.NEW_CHANNEL], [theirs.fileno()], flags)
        except BaseException:
            ours.close()
            raise
        return ours

    async def watch(self) -> None:
        """Notice its end: it says nothing more on this socket."""
        control = self._control
        if control is None:
            return
        with suppress(OSError, trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(control)
        if self._control is control:
            log.warning("segments.ended", pid=self.pid)
            self.stop()

    def stop(self) -> None:
        """It is passed nothing more; without mounts it ends."""
        if self._control is not None:
            control, self._control = self._control, None
            trio.lowlevel.notify_closing(control)
            control.close()


async def answer_of(channel: trio.socket.SocketType) -> tuple[setup.Message, list[int]]:
    """The next message; raises ConnectionResetError when there is none."""
    try:
        return await relink.receive(channel)
    except StateError as error:
        raise ConnectionResetError(str(error)) from error
