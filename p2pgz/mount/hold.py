"""An `fs` process's connection to the holder: gives it the /dev/fuse descriptor, or takes the one that a dead `fs` left.

Never makes a reader wait, and lives on without a holder: a mount that nobody holds is served like any other, it only cannot
outlive its process. A holder that was killed is replaced by the node, and is given the descriptor again. The messages are in
`holder`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio

from p2pgz.errors import MountUnavailable
from p2pgz.mount import attach, holder, kernel, relink

ANSWER_SECONDS: Final = 5.0  # it answers in microseconds; a loaded machine starts it in half a second
BEAT_SECONDS: Final = 1.0
_BEAT: Final = b'{"op":"beat"}'
_RELEASE: Final = b'{"op":"release"}'


class Hold:
    """An `fs` process's connection to the holder."""

    def __init__(self, path: Path, mount_id: str) -> None:
        self._path = path
        self._id = mount_id
        self._fuse_fd = -1
        self._device = 0
        self._socket: socket.socket | None = None

    def take(self) -> tuple[int, int]:
        """The descriptor of a mount whose `fs` is gone, and its device; blocks. Raises MountUnavailable."""
        try:
            self._socket = self._connect()
            self._send({"op": "take", "id": self._id})
            data, fds, _, _ = socket.recv_fds(self._socket, holder.MESSAGE_BYTES, 1)
            answer = json.loads(data)
        except (OSError, ValueError) as error:
            raise MountUnavailable(f"the holder at {self._path} does not answer: {error}") from error
        if "ok" not in answer or not fds:
            raise MountUnavailable(f"the holder has no such mount: {answer.get('error', '')}")
        os.set_inheritable(fds[0], False)
        self._fuse_fd, self._device = fds[0], int(answer["device"])
        return self._fuse_fd, self._device

    def give(self, fuse_fd: int, device: int) -> None:
        """Have the holder keep the descriptor; blocks until it does. Without one the mount is merely mortal."""
        self._fuse_fd, self._device = fuse_fd, device
        try:
            self._socket = self._connect()
            self._send_descriptor()
            answer = json.loads(self._socket.recv(holder.MESSAGE_BYTES))
            if "ok" not in answer:
                raise OSError(str(answer.get("error")))
        except (OSError, ValueError) as error:
            logging.getLogger("p2pgz.fs").warning("no holder: %s; this mount ends with its process", error)
            self._close()

    async def keep(self) -> None:
        """Tell the holder that this process lives, for ever; find its successor when it is gone."""
        while True:
            if self._socket is None:
                try:
                    self._socket = self._connect(0)
                    self._send_descriptor()
                except OSError:
                    self._close()
            else:
                try:
                    self._socket.send(_BEAT, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    pass
                except OSError:
                    self._close()
                    continue
            await trio.sleep(BEAT_SECONDS)

    def release(self) -> None:
        """The mount is gone."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.send(_RELEASE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _connect(self, timeout_seconds: float = ANSWER_SECONDS) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(timeout_seconds)
            with relink.short_path(self._path) as name:
                sock.connect(name)
        except BaseException:
            sock.close()
            raise
        return sock

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        self._socket.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)

    def _send_descriptor(self) -> None:
        assert self._socket is not None
        message = json.dumps({"op": "hold", "id": self._id, "device": self._device}).encode()
        socket.send_fds(self._socket, [message], [self._fuse_fd], socket.MSG_NOSIGNAL)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def resume_mount(hold: Hold | None, *, resend: bool = True) -> attach.FuseMount:
    """Go on with a connection whose last process is gone, or is ending and reads no more requests (`resend` is off then);
    blocks. Raises MountUnavailable."""
    if hold is None:
        raise MountUnavailable("a mount without a holder cannot be resumed")
    fuse_fd, device = hold.take()
    if resend:
        kernel.resend(fuse_fd)
    return attach.FuseMount(fuse_fd, -1, device)
