"""Finding, checking and undoing mounts of p2pgz. Called by commands, tests and `fs`; blocks; needs no node.

Everything is read from the kernel (/proc/self/mountinfo): there is no bookkeeping that could be wrong. No call here
touches the root of a mount before it must, since whoever serves it may be gone or stuck.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from p2pgz.errors import MountUnavailable

FS_TYPE: Final = "fuse.p2pgz"
EROFS_TYPE: Final = "erofs"
EROFS_SUFFIX: Final = ".p2pgz-erofs"  # of the metadata file, which the kernel shows as the source
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
FUSERMOUNT_SECONDS: Final = 30.0
HOLDERS_SHOWN: Final = 5
PROBE_SECONDS: Final = 2.0  # a mount that is served answers in microseconds
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


class MountPoint(NamedTuple):
    """One line of mountinfo."""

    mount_id: int
    device: int
    directory: str
    fs_type: str
    source: str
    options: str


def parse_mountinfo(text: str) -> Iterator[MountPoint]:
    """The lines of a mountinfo file (proc(5)); lines that are not understood are left out."""
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if not separator or len(fields) < 6 or len(tail) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        if not (fields[0].isdecimal() and major.isdecimal() and minor.isdecimal()):
            continue
        yield MountPoint(
            int(fields[0]),
            os.makedev(int(major), int(minor)),
            _unescape(fields[4]),
            _unescape(tail[0]),
            _unescape(tail[1]),
            fields[5],
        )


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8) & 0xFF), text)


def _mountinfo() -> list[MountPoint]:
    raw = Path("/proc/self/mountinfo").read_bytes()
    return list(parse_mountinfo(os.fsdecode(raw)))


def find_mounts() -> list[MountPoint]:
    """All p2pgz mounts in this mount namespace, oldest first."""
    return [mount for mount in _mountinfo() if is_ours(mount)]


def is_ours(mount: MountPoint) -> bool:
    """Whether p2pgz made it, in either mode."""
    return mount.fs_type == FS_TYPE or (mount.fs_type == EROFS_TYPE and mount.source.endswith(EROFS_SUFFIX))


def top_mount(directory: str | Path) -> MountPoint | None:
    """What is mounted at a directory in this mount namespace, whoever's it is."""
    target = resolve_parent(directory)
    return next((mount for mount in reversed(_mountinfo()) if mount.directory == target), None)


def check_mount_point(directory: str | Path) -> None:
    """Raise MountUnavailable unless this is an empty directory that nothing is mounted on."""
    path = Path(directory)
    resolved = resolve_parent(path)
    there = [mount for mount in _mountinfo() if mount.directory == resolved]
    if there:
        hint = f"`p2pgz umount {path}` first" if is_ours(there[-1]) else "choose another directory"
        raise MountUnavailable(f"{path}: {there[-1].source} is mounted there already", hint=hint)
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise MountUnavailable(f"{path}: no such directory", hint=f"`mkdir -p {path}` first") from None
    except NotADirectoryError:
        raise MountUnavailable(f"{path}: not a directory", hint="give an empty directory") from None
    except OSError as error:
        raise MountUnavailable(f"{path}: {error.strerror}") from error
    if not empty:
        raise MountUnavailable(
            f"{path}: not empty, its content would be hidden", hint="choose an empty directory"
        )


def resolve_parent(path: str | Path) -> str:
    """The real path, without touching the last component: it may be a mount that hangs."""
    absolute = os.path.abspath(path)  # noqa: PTH100
    return os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))  # noqa: PTH118,PTH120,PTH119


def unmount(directory: str | Path, *, lazy: bool = False) -> None:
    """Unmount the p2pgz image at a directory; `lazy` detaches it at once and ends it with its last user.

    A mount whose `fs` is gone is detached in any case.
    """
    path = Path(directory)
    target = resolve_parent(path)
    ours = {mount.directory for mount in find_mounts()}
    if target not in ours:
        target = os.path.realpath(path)
    if target not in ours:
        raise MountUnavailable(
            f"{path}: no p2pgz image is mounted there", hint="`p2pgz status` lists the mounts"
        )
    try:
        _unmount(target, lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY and _is_dead(target):
            _unmount(target, lazy=True)
            return
        if error.errno == errno.EBUSY:
            users = ", ".join(_holders(target))
            raise MountUnavailable(
                f"{path}: in use{' by ' + users if users else ''}",
                hint="end the users, or `p2pgz umount --lazy` detaches it now and ends it with its last user",
            ) from error
        raise MountUnavailable(f"{path}: cannot unmount: {error.strerror}") from error


def _unmount(target: str, *, lazy: bool) -> None:
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(target), ctypes.c_int(flags)) == 0:
        return
    code = ctypes.get_errno()
    program = shutil.which("fusermount3")
    if code != errno.EPERM or program is None:
        raise OSError(code, os.strerror(code))
    done = subprocess.run(  # a fixed program; the arguments are no shell text
        [program, "-u", *(["-z"] if lazy else []), "--", target],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=FUSERMOUNT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise OSError(errno.EBUSY if "busy" in said else errno.EPERM, said or "fusermount3 failed")


def clear_dead_mount(directory: str | Path, *, dead_erofs: bool = False) -> bool:
    """Detach a mount of ours that nobody serves any more; whether there was one. A mount that waits for a process is not
    dead: it is left alone. `dead_erofs`: the caller knows that one in erofs mode is, which it does not show."""
    target = resolve_parent(directory)
    there = top_mount(directory)
    if there is None or not is_ours(there):
        return False
    if not (dead_erofs if there.fs_type == EROFS_TYPE else _is_dead(target)):
        return False
    try:
        _unmount(target, lazy=True)
    except OSError as error:
        raise MountUnavailable(
            f"{directory}: the mount there is dead and cannot be detached: {error.strerror}",
            hint=f"`umount -l {directory}` as root",
        ) from error
    return True


def _is_dead(target: str) -> bool:
    codes: list[int | None] = []

    def probe() -> None:
        try:
            os.statvfs(target)  # never answered from a cache, as stat is
        except OSError as error:
            codes.append(error.errno)

    # a mount whose process is missing makes its callers wait: this thread is then left behind, and ends with the mount or us
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(codes) and codes[0] in {errno.ENOTCONN, errno.ECONNABORTED}


def _holders(target: str) -> Iterator[str]:
    """Who uses a mount: `name (pid)`, as far as /proc shows it to us; at most HOLDERS_SHOWN."""
    shown = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or not _uses(process, target):
            continue
        try:
            name = (process / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue
        yield f"{name} ({process.name})"
        shown += 1
        if shown >= HOLDERS_SHOWN:
            return


def _uses(process: Path, target: str) -> bool:
    links = [process / "cwd", process / "root", process / "exe"]
    with suppress(OSError):
        links += (process / "fd").iterdir()
    for link in links:
        try:
            where = os.readlink(link)  # noqa: PTH115
        except OSError:
            continue
        if where == target or where.startswith(target + "/"):
            return True
    return False
