"""Rows of `p2pgz ls`: the names of a tree as lines for people and as JSON for programs.

Names in images are bytes, and whoever made the image chose them: in lines, control characters and bytes that
are not UTF-8 are escaped, so a name can neither move the cursor nor add a line; in JSON they are kept exactly
(surrogate escapes).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from p2pgz.image.treefile import TreeFile

# As PATH_MAX of Linux. A hostile tree may be 100 000 directories deep, and all their paths together would
# fill the memory.
LISTED_PATH_BYTES_MAX: Final = 4096
_KINDS: Final = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "reg",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One name. `name` is a path relative to what was listed; `mode` has the type bits."""

    name: bytes
    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime_ns: int
    target: bytes

    @property
    def kind(self) -> str:
        """The type, as in TOCs."""
        return _KINDS[stat.S_IFMT(self.mode)]

    def to_json(self) -> dict[str, object]:
        """The row as JSON values; `mode` without the type bits."""
        row: dict[str, object] = {
            "name": os.fsdecode(self.name),
            "type": self.kind,
            "mode": stat.S_IMODE(self.mode),
            "nlink": self.nlink,
            "uid": self.uid,
            "gid": self.gid,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "inode": self.ino,
        }
        if self.kind == "symlink":
            row["target"] = os.fsdecode(self.target)
        if self.kind in ("char", "block"):
            row["device"] = [os.major(self.rdev), os.minor(self.rdev)]
        return row


def list_directory(tree: TreeFile, path: bytes, *, recursive: bool = False) -> list[Row]:
    """The rows of a directory in byte order, or the one row of anything else. Raises ImageNotFound.

    With `recursive` the directories below follow, each before its children, named by their path, as far as
    paths are usable.
    """
    ino = tree.walk(path)
    if not stat.S_ISDIR(tree.inode(ino).mode):
        return [_row(tree, ino, path.strip(b"/"))]
    rows: list[Row] = []
    # A stack of open listings instead of recursion: trees may be deeper than Python's stack.
    open_directories: list[tuple[bytes, Iterator[tuple[bytes, int, int]]]] = [(b"", tree.entries(ino))]
    while open_directories:
        prefix, names = open_directories[-1]
        for name, child, _ in names:
            row = _row(tree, child, prefix + name)
            rows.append(row)
            if recursive and stat.S_ISDIR(row.mode) and len(row.name) < LISTED_PATH_BYTES_MAX:
                open_directories.append((row.name + b"/", tree.entries(child)))
                break
        else:
            open_directories.pop()
    return rows


def format_rows(rows: list[Row]) -> list[str]:
    """Lines as `ls -l` has them, times in UTC."""
    cells = [
        (
            stat.filemode(row.mode),
            str(row.nlink),
            str(row.uid),
            str(row.gid),
            f"{os.major(row.rdev)}, {os.minor(row.rdev)}" if row.kind in ("char", "block") else str(row.size),
        )
        for row in rows
    ]
    widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(5)]
    lines: list[str] = []
    for row, (mode, *numbers) in zip(rows, cells, strict=True):
        columns = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        arrow = f" -> {_shown(row.target)}" if row.kind == "symlink" else ""
        lines.append(f"{mode} {' '.join(columns)} {_time(row.mtime_ns)} {_shown(row.name)}{arrow}")
    return lines


def _row(tree: TreeFile, ino: int, name: bytes) -> Row:
    inode = tree.inode(ino)
    return Row(
        name=name,
        ino=ino,
        mode=inode.mode,
        nlink=inode.nlink,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size,
        rdev=inode.rdev,
        mtime_ns=inode.mtime_ns,
        target=tree.readlink(ino),
    )


def _time(mtime_ns: int) -> str:
    try:
        return datetime.fromtimestamp(mtime_ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"@{mtime_ns // 1_000_000_000}"  # beyond what calendars here know


def _shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text])
