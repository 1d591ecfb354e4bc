"""The node's side of the holder: starts it, replaces it when it was killed, asks what it holds. Called by `mounts`.

The node never gets a descriptor of /dev/fuse itself: each `fs` hands its own to the holder (`hold`), again when a new holder
has taken over. The messages are in `holder`.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog
import trio

from p2pgz.errors import MountUnavailable, StateError
from p2pgz.mount import holder, relink
from p2pgz.mount.hold import ANSWER_SECONDS

log = structlog.get_logger(component="mount")

SOCKET_NAME: Final = "holder.sock"
RESTART_SECONDS: Final = 0.2
LISTEN_BACKLOG: Final = 128
DIE_SECONDS: Final = 2.0  # a killed process that hangs in the kernel longer is left behind
# How long readers wait for an `fs` before the mount is given up: a node restarts within seconds, and half of the kernel's
# warning of hung tasks (120 s) is the other bound
ABANDON_SECONDS: Final = 60.0
FUSE_DEVICE_NUMBER: Final = os.makedev(10, 229)  # include/linux/miscdevice.h: MISC_MAJOR, FUSE_MINOR


class HeldMount(NamedTuple):
    """What the holder says of a mount."""

    device: int
    pid: int
    """its `fs`, 0 when none is connected"""
    silent_seconds: float


class HolderClient:
    """The node's side: starts the holder with the first mount, replaces it when it is gone. Made by `open`."""

    def __init__(self, run_path: Path, abandon_seconds: float) -> None:
        self.path = run_path / SOCKET_NAME
        self.losses = 0
        """how often the holder ended without being told to"""
        self._abandon_seconds = abandon_seconds
        self._nursery: trio.Nursery
        self._is_watched = False
        self._starting = trio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, run_path: Path, *, abandon_seconds: float = ABANDON_SECONDS
    ) -> AsyncIterator[HolderClient]:
        """A client of the holder in `run_path`, which is looked for or started by `ensure`."""
        client = cls(run_path, abandon_seconds)
        async with trio.open_nursery() as nursery:
            client._nursery = nursery
            yield client
            nursery.cancel_scope.cancel()

    async def ensure(self) -> None:
        """A holder runs; a failure is logged only, since mounts work without one."""
        async with self._starting:
            if self._is_watched:
                return
            try:
                watched = await self._connect_or_start()
            except (OSError, StateError) as error:
                log.error("holder.failed", reason=str(error), effect="mounts end with their process")
                return
            self._is_watched = True
            self._nursery.start_soon(self._watch, watched)

    async def _connect_or_start(self) -> trio.socket.SocketType:
        with suppress(OSError):
            return await self._connect()
        self.path.unlink(missing_ok=True)
        with relink.listen(self.path) as listener:
            listener.listen(LISTEN_BACKLOG)
            # -I -S: nothing but the standard library, whatever the environment says
            process = await trio.lowlevel.open_process(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    holder.__file__,
                    str(listener.fileno()),
                    str(self._abandon_seconds),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(listener.fileno(),),
                cwd="/",
            )
            self._nursery.start_soon(_reap, process)
            return await self._connect()

    async def _connect(self) -> trio.socket.SocketType:
        channel = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with relink.short_path(self.path) as name:
                await channel.connect(name)
        except BaseException:
            channel.close()
            raise
        return channel

    async def _watch(self, channel: trio.socket.SocketType) -> None:
        """Keeps it from ending while this node lives, and notices when it does."""
        with channel, suppress(OSError):
            while await channel.recv(64):
                pass
        self._is_watched = False
        self.losses += 1
        log.error("holder.lost", effect="a new one takes over", losses=self.losses)
        await trio.sleep(RESTART_SECONDS)
        await self.ensure()

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One question; raises MountUnavailable when there is no answer."""
        try:
            with trio.fail_after(ANSWER_SECONDS), await self._connect() as channel:
                await channel.send(json.dumps(message).encode())
                answer: dict[str, Any] = json.loads(await channel.recv(holder.MESSAGE_BYTES))
        except (OSError, ValueError, trio.TooSlowError) as error:
            raise MountUnavailable(f"the holder at {self.path} does not answer: {error}") from error
        if "ok" not in answer:
            raise MountUnavailable(f"the holder refuses: {answer.get('error')}")
        return answer

    async def held(self) -> dict[str, HeldMount]:
        """All mounts that are held; empty when no holder runs."""
        found: dict[str, HeldMount] = {}
        if not self.path.exists():
            return found
        while True:
            answer = await self._ask({"op": "list", "after": max(found, default="")})
            if not answer["mounts"]:
                return found
            found |= {
                entry["id"]: HeldMount(entry["device"], entry["pid"], entry["silent_seconds"])
                for entry in answer["mounts"]
            }

    async def kill(self, mount_id: str) -> None:
        """Kill the `fs` of a mount, whatever it does, and wait until it is gone or hopeless."""
        pid = (await self._ask({"op": "kill", "id": mount_id}))["pid"]
        if not pid:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
        try:
            with trio.move_on_after(DIE_SECONDS):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def abort(self, mount_id: str) -> None:
        """End a mount: its readers get an error."""
        await self._ask({"op": "abort", "id": mount_id})

    async def take_from_systemd(self) -> None:
        """Hand the holder what systemd kept of a service that ended altogether (FDSTORE). Best effort."""
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        # once: a program that takes this one's place (`p2pgz upgrade`) has the same number and other descriptors
        pid = os.environ.pop("LISTEN_PID", "")
        if pid != str(os.getpid()) or not any(names):
            return
        for fd, name in enumerate(names, 3):
            mark, _, rest = name.partition("-")
            mount_id, _, device = rest.rpartition("-")
            if mark != "p2pgz" or not mount_id or not device.isdecimal() or not _is_fuse_device(fd):
                continue
            await self.ensure()
            message = json.dumps({"op": "restore", "id": mount_id, "device": int(device)}).encode()
            with (
                suppress(OSError),
                trio.move_on_after(ANSWER_SECONDS),
                await self._connect() as channel,
            ):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
                await channel.sendmsg([message], rights)
                await channel.recv(holder.MESSAGE_BYTES)
            with suppress(OSError):
                os.close(fd)


def _is_fuse_device(fd: int) -> bool:
    with suppress(OSError):
        status = os.fstat(fd)
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == FUSE_DEVICE_NUMBER
    return False


async def _reap(process: trio.Process) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_SECONDS):
        await process.wait()
