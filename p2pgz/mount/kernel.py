"""The parts of the FUSE protocol that pyfuse3 does not offer: our own answer to FUSE_INIT, ranged invalidation, read-ahead.

Called by `fs` only. Why answer INIT ourselves: libfuse leaves the kernel's limit of 12 waiting background requests, so a
dozen stuck read-aheads would stop every other read of the mount; the limit can only be set here or through a file system
under /sys that containers do not have. libfuse then gets the same INIT from a socket in place of the device, and its answer
goes to the device after the fact, where the kernel drops it (ENOENT). The protocol: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
from pathlib import Path
from typing import Final

from p2pgz.errors import MountUnavailable, ResendUnavailable

FUSE_INIT: Final = 26
FUSE_NOTIFY_INVAL_INODE: Final = 2
FUSE_NOTIFY_RESEND: Final = 7
RESEND_SINCE: Final = (6, 9, 4)  # in 6.9 already, but re-sent requests could be lost there
IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
INIT_IN: Final = struct.Struct("=IIII")  # major, minor, max_readahead, flags; newer fields follow
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
OUT_HEADER: Final = struct.Struct("=IiQ")
INVAL_INODE_OUT: Final = struct.Struct("=Qqq")
assert (IN_HEADER.size, OUT_HEADER.size, INIT_OUT.size) == (40, 16, 64)

PROTOCOL_MAJOR: Final = 7
PROTOCOL_MINOR: Final = 31  # Linux 5.2 or later speaks it; nothing later is used here
FUSE_ASYNC_READ: Final = 1 << 0
FUSE_BIG_WRITES: Final = 1 << 5
FUSE_DO_READDIRPLUS: Final = 1 << 13
FUSE_ASYNC_DIO: Final = 1 << 15
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_MAX_PAGES: Final = 1 << 22
FUSE_CACHE_SYMLINKS: Final = 1 << 23
# Not among them on purpose: READDIRPLUS_AUTO (pyfuse3 answers READDIRPLUS only), EXPORT_SUPPORT (no NFS export), locks (the
# kernel's own are right for a read-only tree), AUTO_INVAL_DATA (content never changes)
WANTED_FLAGS: Final = (
    FUSE_ASYNC_READ
    | FUSE_BIG_WRITES
    | FUSE_DO_READDIRPLUS
    | FUSE_ASYNC_DIO
    | FUSE_PARALLEL_DIROPS
    | FUSE_MAX_PAGES
    | FUSE_CACHE_SYMLINKS
)
MAX_TASKS: Final = 2000  # handlers at a time
MAX_BACKGROUND: Final = (
    1000  # waiting read-aheads: half of the handlers, so that look-ups always find a free one
)
CONGESTION_THRESHOLD: Final = 750
MAX_PAGES: Final = 256  # 1 MiB, the most that kernels take by default
MAX_READ_AHEAD_BYTES: Final = 1 << 20
MAX_WRITE_BYTES: Final = 128 << 10  # nothing is ever written; sizes the kernel's check of our read buffer
_REQUEST_BYTES: Final = (1 << 20) + 4096


def has_ended(fuse_fd: int) -> bool:
    """Whether the connection is over, by an unmount or an abort. Asked, not waited for: every request wakes a waiter."""
    probe = select.poll()
    probe.register(fuse_fd, 0)
    return bool(probe.poll(0))


def answer_init(fuse_fd: int) -> bytes:
    """Read the kernel's FUSE_INIT and answer it; returns the message as `LibfuseDoor` wants it.

    libfuse hears nothing of MAX_PAGES: it would take a buffer of 1 MiB for each waiting handler, which only writes need.
    """
    message = os.read(fuse_fd, _REQUEST_BYTES)
    if len(message) < IN_HEADER.size + INIT_IN.size:
        raise MountUnavailable("the kernel's FUSE greeting is cut short")
    _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
    major, minor, _, flags = INIT_IN.unpack_from(message, IN_HEADER.size)
    if opcode != FUSE_INIT or major != PROTOCOL_MAJOR or minor < PROTOCOL_MINOR:
        raise MountUnavailable(f"the kernel speaks FUSE {major}.{minor}", hint="Linux 5.2 or later is needed")
    body = INIT_OUT.pack(
        PROTOCOL_MAJOR,
        PROTOCOL_MINOR,
        MAX_READ_AHEAD_BYTES,
        flags & WANTED_FLAGS,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_WRITE_BYTES,
        1,  # time granularity in ns
        MAX_PAGES,
        0,  # map alignment
        0,  # flags2
    )
    os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
    heard = bytearray(message)
    INIT_IN.pack_into(heard, IN_HEADER.size, major, minor, MAX_READ_AHEAD_BYTES, flags & ~FUSE_MAX_PAGES)
    return bytes(heard)


def greeting() -> bytes:
    """A FUSE_INIT for `LibfuseDoor` when the kernel's own was answered long ago, by the process before this one."""
    body = INIT_IN.pack(PROTOCOL_MAJOR, PROTOCOL_MINOR, MAX_READ_AHEAD_BYTES, WANTED_FLAGS & ~FUSE_MAX_PAGES)
    return IN_HEADER.pack(IN_HEADER.size + len(body), FUSE_INIT, 1, 0, 0, 0, os.getpid(), 0, 0) + body


def resend(fuse_fd: int) -> None:
    """Have the kernel queue again what a process that is gone had read and not answered. Nobody else may be reading.

    Raises ResendUnavailable where the kernel cannot.
    """
    try:
        if not can_resend():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size, FUSE_NOTIFY_RESEND, 0))
    except OSError as error:
        if error.errno in {errno.ENODEV, errno.ENOTCONN}:
            raise MountUnavailable("the mount is gone") from error
        raise no_resend() from error


def can_resend() -> bool:
    """Whether this kernel sends requests again that a killed process had read, and loses none."""
    return _kernel_version() >= RESEND_SINCE


def no_resend() -> ResendUnavailable:
    """Why a mount cannot go on."""
    return ResendUnavailable(
        "this kernel cannot send requests again that a killed process had read",
        hint=f"Linux {'.'.join(map(str, RESEND_SINCE))} or later can; mount again",
    )


def _release() -> str:
    return os.uname().release


def _kernel_version() -> tuple[int, ...]:
    numbers = re.findall(r"[0-9]+", _release().partition("-")[0])
    return tuple(int(number) for number in numbers[:3])


class LibfuseDoor:
    """The descriptor that libfuse believes to be its device: first a socket with the INIT in it, then the device itself."""

    def __init__(self, fuse_fd: int, init_message: bytes) -> None:
        ours, self._peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._peer.send(init_message)
        self._fuse_fd = fuse_fd
        self.fd = ours.detach()

    @property
    def path(self) -> str:
        """What to give to libfuse as mount point: it takes this as an open session."""
        return f"/dev/fd/{self.fd}"

    def open(self) -> None:
        """To be called when libfuse has read the INIT and before it answers: from here on it talks to the kernel."""
        os.dup2(self._fuse_fd, self.fd, inheritable=False)
        self._peer.close()


def invalidate(fuse_fd: int, ino: int, offset: int, size_bytes: int) -> None:
    """Drop the kernel's cached pages of a range; blocks while one of them is being read: call it in a thread.

    After a failed read the kernel would fetch that range in single pages for ever.
    """
    body = INVAL_INODE_OUT.pack(ino, offset, size_bytes)
    os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), FUSE_NOTIFY_INVAL_INODE, 0) + body)


def set_read_ahead(device: int, kilobytes: int) -> bool:
    """Set how far the kernel reads ahead in files opened from now on. Best effort: needs root and a writable /sys."""
    knob = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        knob.write_text(f"{kilobytes}\n", "ascii")
    except OSError:
        return False
    return True
