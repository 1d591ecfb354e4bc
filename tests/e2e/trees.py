"""Compares two trees on disk, the mounted one and the one that a foreign tool unpacked, entry by entry."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

SHOWN_AT_MOST = 50  # differences; the first few tell the story


def describe(path: bytes, links: dict[tuple[int, int], bytes], name: bytes) -> dict[str, object]:
    """All that a program can see of one entry. A further name of a file is described by its first name."""
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    seen: dict[str, object] = {
        "type": kind,
        "mode": stat.S_IMODE(info.st_mode),
        "owner": (info.st_uid, info.st_gid),
        "mtime": info.st_mtime_ns,
        "xattrs": {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        },
    }
    if kind != stat.S_IFDIR:
        seen["nlink"] = info.st_nlink
        seen["first name"] = links.setdefault((info.st_dev, info.st_ino), name)
    if kind == stat.S_IFREG:
        seen["size"] = info.st_size
        with open(path, "rb") as file:
            seen["content"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        seen["target"] = os.readlink(path)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        seen["device"] = (os.major(info.st_rdev), os.minor(info.st_rdev))
    return seen


def read_tree(root: Path) -> dict[bytes, dict[str, object]]:
    """Every entry below root, by its path relative to it (the root itself is b"")."""
    top = os.fsencode(root)
    links: dict[tuple[int, int], bytes] = {}
    tree = {b"": describe(top, links, b"")}
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        for name in sorted(os.listdir(os.path.join(top, folder))):
            path = os.path.join(folder, name)
            tree[path] = describe(os.path.join(top, path), links, path)
            if tree[path]["type"] == stat.S_IFDIR:
                waiting.append(path)
    return tree


def differences(
    expected: Path, actual: Path, *, ignore: Callable[[bytes, str], bool] = lambda path, field: False
) -> list[str]:
    """What differs, a line each; empty when the trees are the same. `ignore(path, field)` leaves a field out."""
    want, got = read_tree(expected), read_tree(actual)
    lines = [f"{path!r}: missing" for path in sorted(want.keys() - got.keys())]
    lines += [f"{path!r}: should not be there" for path in sorted(got.keys() - want.keys())]
    for path in sorted(want.keys() & got.keys()):
        for field in want[path].keys() | got[path].keys():
            pair = want[path].get(field), got[path].get(field)
            if pair[0] != pair[1] and not ignore(path, field):
                lines.append(f"{path!r}: {field}: expected {pair[0]!r}, found {pair[1]!r}")
    return lines[:SHOWN_AT_MOST]
