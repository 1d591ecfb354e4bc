"""What containerd mounts for a snapshot: a bind of one directory, or an overlay of several.

Called by the service with the directories that belong to a snapshot and to those below it. A merged tree of an image is one
lower directory however many layers it has, and holds no whiteouts: they were applied when it was merged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from p2pgz.errors import SnapshotError
from p2pgz.pool.disk import is_full
from p2pgz.snapshotter.records import Kind, Usage


class Mount(NamedTuple):
    """One mount(2) for containerd to make."""

    type: str
    source: str
    options: tuple[str, ...]


def mounts(kind: Kind, directory: Path, lowers: Sequence[Path], extra: Sequence[str] = ()) -> list[Mount]:
    """The mounts of a snapshot in `directory` on top of `lowers`, the nearest first."""
    upper = directory / "fs"
    if not lowers:
        return [Mount("bind", str(upper), ("ro" if kind == "view" else "rw", "rbind"))]
    if kind == "view" and len(lowers) == 1:
        return [Mount("bind", str(lowers[0]), ("ro", "rbind"))]
    options = [] if kind == "view" else [f"workdir={directory / 'work'}", f"upperdir={upper}"]
    options.append("lowerdir=" + ":".join(map(str, lowers)))
    return [Mount("overlay", "overlay", (*options, *extra))]


def like_below(upper: Path, lower: Path) -> None:
    """Give a new upper directory owner and mode of the one below: it is what a container sees as its root."""
    try:
        below = lower.stat()
        os.chown(upper, below.st_uid, below.st_gid)
        upper.chmod(below.st_mode & 0o7777)
    except OSError as error:
        status = "RESOURCE_EXHAUSTED" if is_full(error) else "UNAVAILABLE"
        raise SnapshotError(status, f"{error.filename}: {error.strerror}") from error  # type: ignore[arg-type]


def usage_of(directory: Path) -> Usage:
    """Bytes on the disk and inodes below a directory, hard links once; what vanishes meanwhile is not counted."""
    seen: set[tuple[int, int]] = set()
    total = 0
    waiting = [str(directory)]
    while waiting:
        path = waiting.pop()
        with suppress(OSError):
            entries = [os.lstat(path)]
            with os.scandir(path) as found:
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        with suppress(FileNotFoundError):
                            entries.append(entry.stat(follow_symlinks=False))
            for status in entries:
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return Usage(total, len(seen))
