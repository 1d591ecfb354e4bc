"""Detached mounts of EROFS: metadata from a file on the local disk, contents from one device per segment.

Called by the segment host (in a thread: opening a device that the same process serves sends it requests) and by the
self-test. Blocks; needs CAP_SYS_ADMIN. Failures are MountUnavailable and say what the kernel said.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from p2pgz.errors import MountUnavailable
from p2pgz.mount import attach

FS_NAME: Final = "erofs"
PARAMETER_BYTES_MAX: Final = 255  # fsconfig(2) takes no longer strings
BDI_FOLDER: Final = Path("/sys/class/bdi")
BDI_PATTERN: Final = "erofs-*"
_USE_TREE: Final = "use --mode tree"


class ErofsMount(NamedTuple):
    """A detached mount, its st_dev, and the name of its knobs under /sys/class/bdi (empty: not known)."""

    mount_fd: int
    device: int
    bdi_name: str


def make_detached_erofs(
    metadata_path: str | Path,
    devices: Sequence[str | Path],
    *,
    suid: bool = False,
    dev: bool = False,
    context: str = "",
) -> ErofsMount:
    """Mount nowhere yet; the devices in the order of the metadata's table. Not to be called twice at a time, for the
    new mount's knobs are told by their being new."""
    before = _bdi_names()
    with ExitStack() as stack:
        context_fd = _new_context()
        stack.callback(os.close, context_fd)
        step = "source"
        try:
            source = _short(metadata_path, stack)
            attach.set_string(context_fd, "source", source)
            step = "ro"
            attach.set_flag(context_fd, "ro")
            if context:
                step = "context"
                attach.set_string(context_fd, "context", context)
            for path in devices:
                step = f"device {path}"
                attach.set_string(context_fd, "device", _short(path, stack))
            step = "create"
            mount_fd = attach.create_and_mount(context_fd, suid=suid, dev=dev)
        except OSError as error:
            said = attach.context_messages(context_fd)
            raise MountUnavailable(
                f"cannot make an EROFS mount ({step}): {error.strerror}{': ' + said if said else ''}",
                hint=_hint(error.errno or 0, step),
            ) from error
    new = _bdi_names() - before
    return ErofsMount(mount_fd, attach.device_of(mount_fd), new.pop() if len(new) == 1 else "")


def _hint(code: int, step: str) -> str:
    if step == "context":
        return "SELinux is not in use on this host, or does not know that context: leave --context out"
    if code == errno.ENOTBLK:
        return (
            f"the kernel does not mount EROFS from files, or not from files on this file system; {_USE_TREE}"
        )
    if code == errno.EPERM:
        return "mounting needs root or CAP_SYS_ADMIN"
    return _USE_TREE


def _new_context() -> int:
    try:
        return attach.open_context(FS_NAME)
    except OSError as error:
        raise MountUnavailable(
            f"cannot make an EROFS mount: {error.strerror}",
            hint=f"`modprobe erofs`; {_USE_TREE}" if error.errno == errno.ENODEV else _USE_TREE,
        ) from error


def _short(path: str | Path, stack: ExitStack) -> str:
    """The path, or a short name of the same file; the kernel copies it away before the directory is closed."""
    text = os.fspath(path)
    if len(os.fsencode(text)) <= PARAMETER_BYTES_MAX:
        return text
    directory = os.open(os.path.dirname(text), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    stack.callback(os.close, directory)
    return f"/proc/self/fd/{directory}/{os.path.basename(text)}"  # noqa: PTH119


def _bdi_names() -> set[str]:
    return {path.name for path in BDI_FOLDER.glob(BDI_PATTERN)}


def set_read_ahead(bdi_name: str, kilobytes: int) -> bool:
    """How far the kernel reads ahead in files of the mount that are opened from now on. Best effort."""
    if not bdi_name:
        return False
    try:
        (BDI_FOLDER / bdi_name / "read_ahead_kb").write_text(f"{kilobytes}\n", "ascii")
    except OSError:
        return False
    return True
