"""The kernel's mount calls that libc or Python do not wrap, and the FUSE mounts made with them.

`fs` makes a mount here (detached when root, through fusermount3 otherwise); commands attach a detached one to a directory of
their own mount namespace with `move_mount`. Called with plain descriptors, blocks, imports neither trio nor pyfuse3.
Failures are MountUnavailable and say what would help. System call numbers: the same on every architecture since Linux 5.2.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from p2pgz.errors import MountUnavailable
from p2pgz.mount.umount import find_mounts, resolve_parent

# include/uapi/asm-generic/unistd.h; x86_64 and aarch64 agree from 424 on
SYS_OPEN_TREE: Final = 428
SYS_MOVE_MOUNT: Final = 429
SYS_FSOPEN: Final = 430
SYS_FSCONFIG: Final = 431
SYS_FSMOUNT: Final = 432
SYS_MOUNT_SETATTR: Final = 442
# include/uapi/linux/mount.h
FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
MOVE_MOUNT_F_EMPTY_PATH: Final = 4
OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_STATX_DONT_SYNC: Final = 0x4000

FUSE_DEVICE: Final = "/dev/fuse"
FUSERMOUNT_SECONDS: Final = 10.0
SUBTYPE: Final = "p2pgz"
READ_INSTEAD: Final = "`p2pgz ls` and `p2pgz cat` read an image without a mount"

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class FuseMount(NamedTuple):
    """A FUSE superblock: its /dev/fuse descriptor, and a detached mount of it (-1: already attached somewhere)."""

    fuse_fd: int
    mount_fd: int
    device: int
    """st_dev of the mount: names its knobs under /sys"""


def open_fuse_device() -> int:
    """Open /dev/fuse, or say why there is no FUSE here."""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            hint = (
                f"load it with `modprobe fuse`; in a container pass the device {FUSE_DEVICE}; {READ_INSTEAD}"
            )
        elif error.errno in {errno.EPERM, errno.EACCES}:
            hint = f"in a container allow the device (privileged, or a FUSE device plugin); {READ_INSTEAD}"
        else:
            hint = READ_INSTEAD
        raise MountUnavailable(f"{FUSE_DEVICE}: {error.strerror}", hint=hint) from error


def make_detached(
    *, source: str, suid: bool = False, dev: bool = False, context: str = "", allow_other: bool = True
) -> FuseMount:
    """Create a read-only FUSE superblock and a mount of it that is attached nowhere. Needs CAP_SYS_ADMIN."""
    fuse_fd = open_fuse_device()
    try:
        context_fd = _new_context()
        try:
            mount_fd = _configure_and_mount(context_fd, fuse_fd, source, suid, dev, context, allow_other)
        finally:
            os.close(context_fd)
    except BaseException:
        os.close(fuse_fd)
        raise
    return FuseMount(fuse_fd, mount_fd, device_of(mount_fd))


def open_context(fs_name: str) -> int:
    """fsopen(2); the descriptor takes what the functions below set."""
    return _syscall(SYS_FSOPEN, fs_name.encode(), FSOPEN_CLOEXEC)


def set_string(context_fd: int, name: str, value: str) -> None:
    """One `name=value` of a mount that is being made."""
    _syscall(SYS_FSCONFIG, context_fd, FSCONFIG_SET_STRING, name.encode(), os.fsencode(value), 0)


def set_flag(context_fd: int, name: str) -> None:
    """One flag of a mount that is being made."""
    _syscall(SYS_FSCONFIG, context_fd, FSCONFIG_SET_FLAG, name.encode(), None, 0)


def create_and_mount(context_fd: int, *, suid: bool, dev: bool) -> int:
    """Make the superblock, and a read-only mount of it that is attached nowhere."""
    _syscall(SYS_FSCONFIG, context_fd, FSCONFIG_CMD_CREATE, None, None, 0)
    attributes = MOUNT_ATTR_RDONLY | (0 if suid else MOUNT_ATTR_NOSUID) | (0 if dev else MOUNT_ATTR_NODEV)
    return _syscall(SYS_FSMOUNT, context_fd, FSMOUNT_CLOEXEC, attributes)


def _new_context() -> int:
    try:
        return open_context("fuse")
    except OSError as error:
        hint = {
            errno.EPERM: "mounting needs root or CAP_SYS_ADMIN; run the node as yourself to mount through fusermount3",
            errno.ENOSYS: "Linux 5.2 or later is needed",
            errno.ENODEV: "the kernel has no FUSE: `modprobe fuse`",
        }.get(error.errno or 0, READ_INSTEAD)
        raise MountUnavailable(f"cannot make a FUSE mount: {error.strerror}", hint=hint) from error


def _configure_and_mount(
    context_fd: int, fuse_fd: int, source: str, suid: bool, dev: bool, context: str, allow_other: bool
) -> int:
    strings = {
        "source": source,
        "subtype": SUBTYPE,
        "fd": str(fuse_fd),
        "rootmode": "40000",
        "user_id": str(os.geteuid()),
        "group_id": str(os.getegid()),
    }
    if context:
        strings["context"] = context
    flags = ["ro", "default_permissions", *(["allow_other"] if allow_other else [])]
    name = ""
    try:
        for name, value in strings.items():
            set_string(context_fd, name, value)
        for name in flags:
            set_flag(context_fd, name)
        name = "create"
        return create_and_mount(context_fd, suid=suid, dev=dev)
    except OSError as error:
        hint = READ_INSTEAD
        if name == "context":
            hint = "SELinux is not in use on this host, or does not know that context: leave --context out"
        elif error.errno == errno.EPERM:
            hint = "mounting needs root or CAP_SYS_ADMIN"
        said = context_messages(context_fd)
        raise MountUnavailable(
            f"cannot make a FUSE mount ({name}): {error.strerror}{': ' + said if said else ''}", hint=hint
        ) from error


def context_messages(context_fd: int) -> str:
    """What the kernel wrote about the failure, if anything (one message per read, ENODATA at the end)."""
    messages: list[str] = []
    try:
        while len(messages) < 8:
            messages.append(os.read(context_fd, 4096).decode("utf-8", "replace").strip()[2:])
    except OSError:
        pass
    return "; ".join(messages)


def device_of(mount_fd: int) -> int:
    """st_dev, without asking the file system (nobody answers for it yet): statx with AT_STATX_DONT_SYNC."""
    buffer = ctypes.create_string_buffer(256)
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    if _libc.statx(ctypes.c_int(mount_fd), b"", ctypes.c_int(flags), ctypes.c_uint(0), buffer) != 0:
        return 0
    major, minor = struct.unpack_from("=II", buffer.raw, 0x88)  # struct statx: stx_dev_major, stx_dev_minor
    return os.makedev(major, minor)


def make_through_fusermount(
    directory: str, *, source: str, suid: bool = False, dev: bool = False, context: str = ""
) -> FuseMount:
    """Mount on a directory as an ordinary user. fusermount3 sends the /dev/fuse descriptor over _FUSE_COMMFD."""
    program = shutil.which("fusermount3")
    if program is None:
        raise MountUnavailable(
            "fusermount3 is not installed, and only root can mount without it",
            hint=f"install the package fuse3; {READ_INSTEAD}",
        )
    if suid or dev or context:
        raise MountUnavailable("--suid, --dev and --context need root", hint="mount without them, or as root")
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"ro,nosuid,nodev,default_permissions,subtype={SUBTYPE},fsname={escaped}"
    if _user_allow_other():
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(  # a fixed program; the arguments are no shell text
                [program, "-o", options, "--", directory],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FUSERMOUNT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountUnavailable(f"fusermount3 {directory}: {error}", hint=READ_INSTEAD) from error
        theirs.close()
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[:500]
            raise MountUnavailable(
                f"{directory}: {said or 'fusermount3 failed'}",
                hint=f"the directory must be yours, and {FUSE_DEVICE} usable; {READ_INSTEAD}",
            )
        ours.settimeout(FUSERMOUNT_SECONDS)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not fds:
        raise MountUnavailable(f"{directory}: fusermount3 gave no descriptor", hint=READ_INSTEAD)
    return FuseMount(fds[0], -1, _device_at(directory))


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _device_at(directory: str) -> int:
    # never stat here: nobody answers for that directory yet
    wanted = resolve_parent(directory)
    return next((mount.device for mount in find_mounts() if mount.directory == wanted), 0)


def move_mount(mount_fd: int, directory: str | Path) -> None:
    """Attach a detached mount to a directory of the caller's mount namespace. The descriptor stays open: close it, else
    `umount` finds the mount busy."""
    try:
        _syscall(SYS_MOVE_MOUNT, mount_fd, b"", AT_FDCWD, os.fsencode(directory), MOVE_MOUNT_F_EMPTY_PATH)
    except OSError as error:
        hint = {
            errno.EPERM: "attaching a mount needs root or CAP_SYS_ADMIN in this mount namespace",
            errno.ENOENT: "create the directory first",
            errno.ENOTDIR: "give a directory",
            errno.EINVAL: "the mount was attached already, or the directory is in another mount namespace",
        }.get(error.errno or 0, "")
        raise MountUnavailable(
            f"{directory}: cannot attach the mount: {error.strerror}", hint=hint
        ) from error


attach = move_mount


def clone_mount(directory: str) -> int:
    """A detached copy of the mount at a directory (open_tree)."""
    try:
        return _syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(directory), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    except OSError as error:
        raise MountUnavailable(f"{directory}: cannot copy the mount: {error.strerror}") from error


def set_mount_attributes(mount_fd: int, *, add: int = 0, remove: int = 0) -> None:
    """Change MOUNT_ATTR_* of a mount that a descriptor names (Linux 5.12)."""
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", add, remove, 0, 0), 32)
    try:
        _syscall(SYS_MOUNT_SETATTR, mount_fd, b"", AT_EMPTY_PATH, attributes, 32)
    except OSError as error:
        raise MountUnavailable(f"cannot change the flags of a mount: {error.strerror}") from error
