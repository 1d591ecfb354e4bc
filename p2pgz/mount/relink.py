"""How an `fs` process and a node that did not start it find each other again: a socket in the node's run directory.

fs side: `listen`, `accept`; node side: `connect`. The node that comes back has new presence bitmaps, so before the
records of `channel` begin, `fs` says what it serves and the node passes the bitmaps (the order is in `setup`). A restart
of the node therefore never breaks a mount: readers wait meanwhile.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.mount import setup
from p2pgz.mount.setup import MESSAGE_BYTES, PresencePart, SegmentFiles, SessionOptions
from p2pgz.pool.presence import Presence

HANDSHAKE_SECONDS: Final = 10.0
SOCKET_PATTERN: Final = "fs-*.sock"
_SOCKET_NAME: Final = re.compile(r"fs-([0-9a-f]+)-[0-9a-f]+\.sock")
_UCRED: Final = struct.Struct("=iII")


def socket_name(mount_id: str, process: str) -> str:
    """The file name of a process's socket: which mount it serves, and which of its processes it is."""
    return f"fs-{mount_id}-{process}.sock"


def mount_id_of(path: Path) -> str:
    """The mount that the process at a socket serves; empty when its name does not say."""
    match = _SOCKET_NAME.fullmatch(path.name)
    return match[1] if match else ""


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """The same socket by a name that fits into sockaddr_un (108 bytes), whatever the directory's length."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """The socket where a later node finds this process; for its owner only."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with short_path(path) as name:
            old_mask = os.umask(0o177)
            try:
                listener.bind(name)
            finally:
                os.umask(old_mask)
        listener.listen(1)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StateError(f"{path}: cannot listen: {error.strerror}") from error
    return listener


async def accept(
    listener: socket.socket, options: SessionOptions, presences: list[Presence]
) -> socket.socket:
    """Wait for a node, agree with it, take its bitmaps. Strangers and failed greetings are turned away."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            connection, _ = listener.accept()
        except OSError:
            continue
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                fresh = await _greet(connection, options)
        except (P2pgzError, OSError, trio.TooSlowError):
            connection.close()
            continue
        except BaseException:
            connection.close()
            raise
        presences[:] = fresh  # the old maps go when the last reply that uses them has
        return connection


async def _greet(connection: socket.socket, options: SessionOptions) -> list[Presence]:
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid not in {0, os.geteuid()}:
        raise StateError(f"user {uid} is not this node's owner")
    channel = trio.socket.from_stdlib_socket(connection.dup())
    with channel:
        for datagram, _ in setup.encode_session(options, with_fds=False):
            await channel.send(datagram)
        fresh: list[Presence] = []
        while True:
            message, fds = await receive(channel)
            if not isinstance(message, PresencePart) or len(fds) != len(message.counts):
                setup.close_all(fds)
                raise StateError("a message between node and fs came out of order")
            fresh += [Presence.attach(fd, count) for fd, count in zip(fds, message.counts, strict=True)]
            if message.last:
                break
    if [presence.count for presence in fresh] != [segment.presence_count for segment in options.segments]:
        raise StateError("the node's bitmaps are not those of this image")
    return fresh


def peer_pid(connection: socket.socket) -> int:
    """Who listens at the other end."""
    pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)


async def receive(channel: trio.socket.SocketType) -> tuple[setup.Message, list[int]]:
    """The next message and the descriptors that came along; raises StateError at the end or for a stranger's bytes."""
    datagram, fds = await receive_raw(channel)
    try:
        return setup.decode(datagram), fds
    except StateError:
        setup.close_all(fds)
        raise


async def receive_raw(channel: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """The next datagram and its descriptors; raises StateError when the other side is gone."""
    space = socket.CMSG_SPACE(4 * setup.FDS_PER_DATAGRAM)
    datagram, ancillary, _, _ = await channel.recvmsg(MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = descriptors(ancillary)
    if not datagram:
        setup.close_all(fds)
        raise StateError("the other side ended")
    return datagram, fds


def descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in the control messages of recvmsg."""
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4])
    return fds


async def send(channel: trio.socket.SocketType, datagram: bytes, fds: Sequence[int]) -> None:
    """Send one message with descriptors; the caller keeps its own."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    await channel.sendmsg([datagram], rights)


Adopt = Callable[[SessionOptions], Awaitable[Sequence[SegmentFiles]]]


async def connect(path: Path, adopt: Adopt) -> tuple[socket.socket, SessionOptions]:
    """Take over the `fs` that listens at `path`: `adopt` is told what it serves and gives the segments as this node has
    them. Raises MountUnavailable when nobody listens there."""
    channel = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with channel:
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                with short_path(path) as name:
                    await channel.connect(name)
                assembler = setup.Assembler(with_fds=False)
                options = None
                while options is None:
                    options = assembler.feed(*await receive_raw(channel))
            segments = await adopt(options)
            with trio.fail_after(HANDSHAKE_SECONDS):
                for datagram, fds in setup.encode_presence(segments):
                    await send(channel, datagram, fds)
        except (OSError, StateError, trio.TooSlowError) as error:
            raise MountUnavailable(
                f"{path}: the file system process there does not answer: {error}"
            ) from error
        duplicate = os.dup(channel.fileno())
    connection = socket.socket(fileno=duplicate)
    connection.setblocking(False)
    return connection, options
