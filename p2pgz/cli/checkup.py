"""What `p2pgz doctor` looks at on this host: kernel, FUSE, rights, clock, disk, configuration, ports. Nothing is changed.

Each check is a function that returns what it found; whatever goes wrong in one is its finding, and the others go on.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from p2pgz.errors import P2pgzError

State = Literal["ok", "warning", "failed", "skipped"]

KERNEL_NEEDED: Final = (5, 2)  # fsopen and move_mount; docs/reference say so, too
KERNEL_RESENDS: Final = (6, 9, 4)  # FUSE_NOTIFY_RESEND that loses nothing
FREE_BYTES_WANTED: Final = 2 << 30
CAP_SYS_ADMIN: Final = 21  # capabilities(7)
# A host that was set up has a clock later than this; certificates are refused long before
EARLIEST_CLOCK_SECONDS: Final = 1_760_000_000  # October 2025
TIME_ERROR: Final = 5  # adjtimex(2)
_TIMEX_BYTES: Final = 512  # struct timex has 208 on 64-bit Linux


class Finding(NamedTuple):
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    hint: str = ""


Check = Callable[[], Finding]


def examine(checks: Iterable[tuple[str, Callable[[], Finding | list[Finding]]]]) -> list[Finding]:
    """Make all checks, one after the other."""
    found: list[Finding] = []
    for name, check in checks:
        try:
            finding = check()
        except P2pgzError as error:
            finding = Finding(name, "failed", error.what, error.hint)
        except OSError as error:
            finding = Finding(name, "failed", str(error), "")
        found += finding if isinstance(finding, list) else [finding]
    return found


def version_of(release: str) -> tuple[int, ...]:
    """`6.1.0-18-amd64` → (6, 1, 0)."""
    numbers = []
    for part in release.partition("-")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers[:3])


def kernel(release: str) -> Finding:
    """Whether this kernel can mount as we do."""
    version = version_of(release)
    if version < KERNEL_NEEDED:
        return Finding(
            "kernel", "failed", f"Linux {release}", "Linux 5.2 or later is needed; `p2pgz ls` and `cat` work"
        )
    if version < KERNEL_RESENDS:
        return Finding(
            "kernel",
            "ok",
            f"Linux {release}; readers get an error if a file system process is killed",
            "from Linux 6.9.4 on they would only wait",
        )
    return Finding("kernel", "ok", f"Linux {release}")


def fuse(device: Path, *, is_root: bool) -> Finding:
    """Whether a file system of ours can be made."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hints = {
            errno.ENOENT: "modprobe fuse; in a container pass the device: --device /dev/fuse",
            errno.EPERM: "the container's device rules forbid it: --device /dev/fuse, or a privileged pod",
            errno.EACCES: "its mode should be 0666: chmod 666 /dev/fuse",
        }
        return Finding(
            "fuse", "failed", f"{device}: {error.strerror}", hints.get(error.errno or 0, "modprobe fuse")
        )
    if not is_root and shutil.which("fusermount3") is None:
        return Finding(
            "fuse", "failed", "fusermount3 is missing", "install the package fuse3, or run as root"
        )
    return Finding("fuse", "ok", f"{device} can be used" + ("" if is_root else ", and fusermount3 is there"))


def rights(status: str, *, is_root: bool) -> Finding:
    """Whether this process may mount; `status` is the text of /proc/self/status."""
    if not is_root:
        return Finding(
            "rights",
            "warning",
            "not root",
            "mounts are for this user alone; as root containers and other users see them, too",
        )
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            if int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1:
                return Finding("rights", "ok", "root, with CAP_SYS_ADMIN")
            return Finding(
                "rights",
                "failed",
                "root without CAP_SYS_ADMIN",
                "run the container privileged, or with --cap-add SYS_ADMIN",
            )
    return Finding("rights", "warning", "capabilities are not known")


def erofs(file_systems: str, modules: Path, kept_result: Path, *, boot_id: str) -> Finding:
    """Whether `--mode erofs` can be used: what the self-test of this boot said, else whether the kernel has EROFS."""
    try:
        kept = json.loads(kept_result.read_bytes())
        if kept["boot_id"] == boot_id:
            if kept["passed"]:
                return Finding("erofs", "ok", "the self-test of this boot was passed")
            return Finding(
                "erofs",
                "warning",
                f"the self-test failed: {kept['reason']}",
                "tree mode is used; a newer kernel may pass",
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    has_it = "erofs" in file_systems.split() or any(modules.glob("kernel/fs/erofs/erofs.ko*"))
    if not has_it:
        return Finding(
            "erofs",
            "warning",
            "this kernel has no EROFS",
            "tree mode is used; --mode erofs needs CONFIG_EROFS_FS",
        )
    return Finding("erofs", "ok", "the kernel has EROFS; the first mount tests whether it can be trusted")


def clock(now: float, adjtimex: Callable[[], int]) -> Finding:
    """Whether certificates, tokens and records with a time in them will be understood."""
    if now < EARLIEST_CLOCK_SECONDS:
        return Finding(
            "clock",
            "failed",
            time.strftime("it is %Y-%m-%d here", time.gmtime(now)),
            "set it, and start an NTP client: registries' certificates are refused",
        )
    if adjtimex() == TIME_ERROR:
        return Finding(
            "clock",
            "warning",
            "no NTP client keeps the clock",
            "start one, such as systemd-timesyncd or chrony",
        )
    return Finding("clock", "ok", "kept by NTP")


def kernel_clock_state() -> int:
    """What adjtimex(2) returns when nothing is to be changed."""
    return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))


def disk(state_path: Path, *, check_filesystem: bool) -> list[Finding]:
    """Whether the pool can be here."""
    from p2pgz.pool.disk import refuse_unfit_file_system

    folder = state_path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return [
            Finding(
                "disk",
                "failed",
                f"{folder} cannot be written to",
                "choose another place with --state-dir, or run as its owner",
            )
        ]
    if check_filesystem:
        refuse_unfit_file_system(folder)
    space = os.statvfs(folder)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    text = f"{state_path}: {free / (1 << 30):.1f} of {total / (1 << 30):.1f} GiB free"
    findings = [Finding("disk", "ok", text)]
    if free < FREE_BYTES_WANTED:
        findings = [
            Finding(
                "disk",
                "warning",
                text,
                "what does not fit is fetched again: free some space, or set pool.quota_bytes elsewhere",
            )
        ]
    if space.f_files and space.f_favail < 1000:
        findings.append(Finding("disk", "failed", f"{state_path}: no inodes left", "remove files there"))
    return findings


def port(name: str, host: str, number: int, *, ours: bool) -> Finding:
    """Whether an address can be listened at, or is by our own node."""
    where = f"{host or '*'}:{number}"
    if ours:
        return Finding(name, "ok", f"{where} is this node's")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, number))
        except OSError as error:
            hint = (
                "another program has it: `ss -ltnp` says which"
                if error.errno == errno.EADDRINUSE
                else "is the address this host's?"
            )
            return Finding(name, "failed", f"{where}: {error.strerror}", hint)
    return Finding(name, "ok", f"{where} is free")


def host_checks(
    state_path: Path, run_path: Path, *, is_root: bool, check_filesystem: bool
) -> list[tuple[str, Any]]:
    """All of this module that need no configuration but the disk's."""
    from p2pgz.directories import boot_id
    from p2pgz.mount.erofs_mode import RESULT_NAME

    release = os.uname().release
    return [
        ("kernel", lambda: kernel(release)),
        ("fuse", lambda: fuse(Path("/dev/fuse"), is_root=is_root)),
        ("rights", lambda: rights(Path("/proc/self/status").read_text("ascii", "replace"), is_root=is_root)),
        (
            "erofs",
            lambda: erofs(
                Path("/proc/filesystems").read_text("ascii", "replace"),
                Path("/lib/modules") / release,
                run_path / RESULT_NAME,
                boot_id=boot_id(),
            ),
        ),
        ("clock", lambda: clock(time.time(), kernel_clock_state)),
        ("disk", lambda: disk(state_path, check_filesystem=check_filesystem)),
    ]
