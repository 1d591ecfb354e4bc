"""Unix listeners for the owner of the node only (SO_PEERCRED), and the hand-over of mount descriptors.

Socket paths are limited to 107 bytes (unix(7)); a deeper state directory is reached through /proc/self/fd.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from p2pgz.errors import StateError

log = structlog.get_logger(component="control")

UNIX_PATH_MAX_BYTES = 107
# names in the run directory; `cli.client` has them too, since importing this module would cost commands their start
API_SOCKET = "api.sock"
DESCRIPTOR_SOCKET = "fd.sock"
# a client that connects and says nothing
HANDSHAKE_SECONDS = 10.0
CONNECTIONS_MAX = 256

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket address, valid inside the context."""
    if len(os.fsencode(path)) <= UNIX_PATH_MAX_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> trio.SocketListener:
    """A listener at `path` that only its owner can connect to; a left-over socket of a dead node is replaced.

    The caller holds the state directory's lock, so that no living node's socket is taken away.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            with short_path(path) as name:
                sock.bind(name)
        finally:
            os.umask(old)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise StateError(f"{path}: cannot listen: {error.strerror}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def peer_uid(sock: trio.socket.SocketType) -> int:
    """The user at the other end of a unix socket."""
    _, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return int(uid)


async def serve(
    listener: trio.SocketListener,
    handler: Handler,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections until cancelled; strangers are turned away, and no connection's failure ends the server."""
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)
    owner = os.geteuid()

    async def guarded(stream: trio.SocketStream) -> None:
        async with stream, limit:
            try:
                uid = peer_uid(stream.socket)
                if uid not in {owner, 0}:
                    log.warning("control.refused", uid=uid)
                    return
                await handler(stream)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the client is gone
            except Exception:  # a bug in one request must not end the node
                log.exception("control.bug")

    task_status.started()
    await trio.serve_listeners(guarded, [listener])


async def send_descriptor(stream: trio.SocketStream, message: bytes, descriptor: int | None) -> None:
    """Send a short message with at most one file descriptor.

    Returns without letting other tasks run: the caller closes its descriptor of a mount before the receiver can be told that
    the mount is busy.
    """
    ancillary = []
    if descriptor is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
    with trio.fail_after(HANDSHAKE_SECONDS):
        await trio.lowlevel.wait_writable(stream.socket)
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as same:
        same.sendmsg([message], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
