"""The node's side of the zygote: starts it, has it fork, hears which of its children ended.

Used by `session` and `segment_process`. A zygote that ends is replaced at the next fork; the file systems it forked go on
without it.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from p2pgz.errors import MountUnavailable

FORK: Final = b"f"
"""node → zygote, with the descriptor of the new child's channel"""
FORK_SEGMENT_HOST: Final = b"h"
"""the same, for the control socket of a segment host"""
EXIT: Final = struct.Struct("=ii")
"""zygote → node: pid and wait status of a child that ended"""
REAP_SECONDS: Final = 2.0  # it ends as soon as its socket is closed
_ATTEMPTS: Final = 2


class Spawner:
    """At most one zygote at a time; its tasks run in the given nursery."""

    def __init__(self, nursery: trio.Nursery, on_exit: Callable[[int, int], None]) -> None:
        self._nursery = nursery
        self._on_exit = on_exit
        self._control: socket.socket | None = None
        self._starting = trio.Lock()

    async def prepare(self) -> None:
        """Start the zygote before anybody needs it: its imports cost more than all else of a mount."""
        async with self._starting:
            if self._control is None:
                await self._start()

    async def fork(self, channel: socket.socket, what: bytes = FORK) -> None:
        """Start an `fs` process, or a segment host, that has this socket as its channel."""
        async with self._starting:
            for _ in range(_ATTEMPTS):
                control = self._control or await self._start()
                try:
                    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                    socket.send_fds(control, [what], [channel.fileno()], flags)
                except OSError:
                    self.stop()
                else:
                    return
        raise MountUnavailable(
            "the process that starts file systems keeps ending", hint="the node's log says why"
        )

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            # -P: the current directory must not supply modules
            process = await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "p2pgz.mount.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                start_new_session=True,
            )
        self._control = ours
        self._nursery.start_soon(self._watch, ours, process)
        return ours

    async def _watch(self, control: socket.socket, process: trio.Process) -> None:
        """Take its reports until it ends; reap it even when everything is being closed."""
        try:
            with suppress(OSError, trio.ClosedResourceError):
                while True:
                    await trio.lowlevel.wait_readable(control)
                    try:
                        report = control.recv(EXIT.size, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        continue
                    if len(report) != EXIT.size:
                        break
                    self._on_exit(*EXIT.unpack(report))
        finally:
            if self._control is control:
                self.stop()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + REAP_SECONDS):
                await process.wait()
            if process.returncode is None:
                process.kill()

    def stop(self) -> None:
        """Let the zygote end."""
        if self._control is not None:
            control, self._control = self._control, None
            trio.lowlevel.notify_closing(control)
            control.close()
