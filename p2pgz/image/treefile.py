"""A merged tree as one file that is read where it lies: opening it parses nothing, whatever its size.

`build_tree` writes it when an image is opened for the first time; the mount's process and the node map it and
answer every question about names and attributes from the map, so a mounted image costs next to no memory of
its own. The file holds no content, only where each file's chunks are. It must never be changed after it was
written: pages of it are cached by the kernel and by us.

Layout: a fixed header, then arrays of one kind of number each (largest first, so that all are aligned), then
three heaps of bytes. Inodes are numbered from 1 (the root) in breadth-first order without gaps; the names of
a directory are neighbours, in byte order. Numbers have the machine's byte order, and the magic with them: a
file carried to a machine of the other order is refused.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.errors import ImageNotFound, StateError
from p2pgz.image.treebuild import build_tree
from p2pgz.image.treeformat import (
    HEADER,
    INODE_COLUMNS,
    MAGIC,
    PREFIX_BYTES,
    ROOT_INO,
    XATTR_COUNT,
    XATTR_LENGTHS,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ROOT_INO", "Extent", "Inode", "TreeFile", "build_tree"]

_ITEM_BYTES: Final = {"Q": 8, "q": 8, "I": 4}
_REBUILD: Final = "delete it; it is built again from the image's TOCs"
SYMLINKS_MAX: Final = 40  # as Linux (MAXSYMLINKS)


class Inode(NamedTuple):
    """The attributes of one inode. `mode` has the type bits."""

    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    mtime_ns: int


class Extent(NamedTuple):
    """Where a file's bytes are: the segment (an index of `TreeFile.segments`), the place, its chunks."""

    segment: int
    segment_offset: int
    first_chunk: int
    chunk_count: int


class TreeFile:
    """A view of a tree file. Keeps `buffer` alive.

    Raises StateError for a buffer that is no tree file of this version, at once or when a damaged place is
    met; an inode number that the tree does not have is the caller's mistake and raises IndexError.
    """

    def __init__(self, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B").toreadonly()
        if len(view) < HEADER.size:
            raise StateError(f"tree file of {len(view)} bytes is cut short", hint=_REBUILD)
        magic, inodes, names, segments, names_bytes, texts_bytes, info_bytes, total_bytes = (
            HEADER.unpack_from(view)
        )
        if magic != MAGIC:
            raise StateError("not a tree file of this version", hint=_REBUILD)
        sizes = [_ITEM_BYTES[code] * inodes for _, code in INODE_COLUMNS]
        sizes += [PREFIX_BYTES * names, 4 * names, 4 * (names + 1)]
        expected_bytes = (
            HEADER.size + sum(sizes) + SHA256_BYTES * segments + names_bytes + texts_bytes + info_bytes
        )
        if len(view) != expected_bytes or not inodes:
            raise StateError(f"tree file has {len(view)} bytes instead of {expected_bytes}", hint=_REBUILD)
        at = HEADER.size

        def take(size_bytes: int) -> memoryview:
            nonlocal at
            at += size_bytes
            return view[at - size_bytes : at]

        # 8-byte columns first: every column starts where its numbers are aligned
        eight = {name: take(8 * inodes).cast(code) for name, code in INODE_COLUMNS if _ITEM_BYTES[code] == 8}
        self._prefix = take(PREFIX_BYTES * names).cast("Q")
        four = {name: take(4 * inodes).cast(code) for name, code in INODE_COLUMNS if _ITEM_BYTES[code] == 4}
        self._size, self._mtime, self._rdev, self._where = (
            eight[name] for name in ("size", "mtime", "rdev", "where")
        )
        self._mtime_nsec, self._mode, self._uid, self._gid, self._nlink = (
            four[name] for name in ("mtime_nsec", "mode", "uid", "gid", "nlink")
        )
        self._count, self._first_chunk, self._segment, self._xattrs, self._parent = (
            four[name] for name in ("count", "first_chunk", "segment", "xattrs", "parent")
        )
        self._child = take(4 * names).cast("I")
        self._name_start = take(4 * (names + 1)).cast("I")
        digests = bytes(take(SHA256_BYTES * segments))
        self._names = take(names_bytes)
        self._texts = take(texts_bytes)
        self.info: Final = bytes(take(info_bytes))
        self.segments: Final = [
            Digest(digests[n : n + SHA256_BYTES]) for n in range(0, len(digests), SHA256_BYTES)
        ]
        self.inode_count: Final[int] = inodes
        self.total_bytes: Final[int] = total_bytes
        if not stat.S_ISDIR(self._mode[0]):
            raise StateError("tree file has a root that is no directory", hint=_REBUILD)

    def inode(self, ino: int) -> Inode:
        """The attributes of an inode."""
        n = self._row(ino)
        return Inode(
            self._mode[n],
            self._uid[n],
            self._gid[n],
            self._nlink[n],
            self._rdev[n],
            self._size[n],
            self._mtime[n] * 1_000_000_000 + self._mtime_nsec[n],
        )

    def lookup(self, parent: int, name: bytes) -> int:
        """The inode called `name` in `parent`; 0 if there is none, or `parent` is no directory."""
        low, high = self._children(parent)
        # Eight bytes of each name are a column of numbers, searched in C; only names that share them are
        # compared here.
        key = int.from_bytes(name[:PREFIX_BYTES].ljust(PREFIX_BYTES, b"\0"), "big")
        prefix = self._prefix
        low = bisect_left(prefix, key, low, high)
        if low == high or prefix[low] != key:
            return 0
        start, names = self._name_start, self._names
        if low + 1 < high and prefix[low + 1] == key:
            high = bisect_left(prefix, key + 1, low, high)
            while low < high:
                middle = (low + high) // 2
                if names[start[middle] : start[middle + 1]].tobytes() < name:
                    low = middle + 1
                else:
                    high = middle
            if low == len(prefix):
                return 0
        if names[start[low] : start[low + 1]] != name or prefix[low] != key:
            return 0
        return self._checked(self._child[low])

    def parent(self, ino: int) -> int:
        """The directory that holds this inode (one of them if it has several names); the root's is the root."""
        return self._checked(self._parent[self._row(ino)])

    def entries(self, ino: int, start: int = 0) -> Iterator[tuple[bytes, int, int]]:
        """A directory's names from position `start`: (name, inode, next position). No `.` and `..`."""
        low, high = self._children(ino)
        offsets, names, child = self._name_start, self._names, self._child
        for n in range(low + max(start, 0), high):
            yield names[offsets[n] : offsets[n + 1]].tobytes(), self._checked(child[n]), n - low + 1

    def readlink(self, ino: int) -> bytes:
        """The target of a symlink; empty for anything else."""
        n = self._row(ino)
        if not stat.S_ISLNK(self._mode[n]):
            return b""
        return self._text(self._where[n], self._size[n])

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """All extended attributes of an inode."""
        at = self._xattrs[self._row(ino)]
        if not at:
            return {}
        found: dict[bytes, bytes] = {}
        at -= 1
        (count,) = XATTR_COUNT.unpack(self._text(at, XATTR_COUNT.size))
        at += XATTR_COUNT.size
        for _ in range(count):
            name_bytes, value_bytes = XATTR_LENGTHS.unpack(self._text(at, XATTR_LENGTHS.size))
            at += XATTR_LENGTHS.size
            name = self._text(at, name_bytes)
            found[name] = self._text(at + name_bytes, value_bytes)
            at += name_bytes + value_bytes
        return found

    def extent(self, ino: int) -> Extent | None:
        """Where a regular file's bytes are; None for an empty file and for everything else."""
        n = self._row(ino)
        if not stat.S_ISREG(self._mode[n]) or not self._count[n]:
            return None
        segment = self._segment[n]
        if segment >= len(self.segments):
            raise StateError(f"tree file is damaged: inode {ino} refers to segment {segment}", hint=_REBUILD)
        return Extent(segment, self._where[n], self._first_chunk[n], self._count[n])

    def walk(self, path: bytes, follow: bool = True) -> int:
        """The inode of a path inside the tree; symlinks, also absolute ones and `..`, stay inside.

        `follow` says whether a symlink at the very end is followed too. Raises ImageNotFound.
        """
        stack = [ROOT_INO]
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            ino = self.lookup(stack[-1], name)
            if not ino:
                raise ImageNotFound(f"{_shown(path)}: no such file or directory in the image")
            if stat.S_ISLNK(self._mode[ino - 1]) and (follow or todo):
                links += 1
                if links > SYMLINKS_MAX:
                    raise ImageNotFound(f"{_shown(path)}: more than {SYMLINKS_MAX} symlinks on the way")
                target = self.readlink(ino)
                if target.startswith(b"/"):
                    stack = [ROOT_INO]
                todo += target.split(b"/")[::-1]
                continue
            if todo and not stat.S_ISDIR(self._mode[ino - 1]):
                raise ImageNotFound(f"{_shown(path)}: {_shown(name)} is not a directory")
            stack.append(ino)
        return stack[-1]

    def _row(self, ino: int) -> int:
        if not 1 <= ino <= self.inode_count:
            raise IndexError(f"inode {ino} of {self.inode_count}")
        return ino - 1

    def _checked(self, ino: int) -> int:
        if not 1 <= ino <= self.inode_count:
            raise StateError(
                f"tree file is damaged: it refers to inode {ino} of {self.inode_count}", hint=_REBUILD
            )
        return ino

    def _children(self, ino: int) -> tuple[int, int]:
        """The rows of a directory's names; an empty range for anything else."""
        n = self._row(ino)
        if not stat.S_ISDIR(self._mode[n]):
            return 0, 0
        low, count = self._where[n], self._count[n]
        if low + count > len(self._child):
            raise StateError(f"tree file is damaged: names of inode {ino} are beyond its end", hint=_REBUILD)
        return low, low + count

    def _text(self, at: int, size_bytes: int) -> bytes:
        if at + size_bytes > len(self._texts):
            raise StateError("tree file is damaged: a text is beyond its end", hint=_REBUILD)
        return self._texts[at : at + size_bytes].tobytes()


def _shown(path: bytes) -> str:
    return path[:200].decode(errors="backslashreplace") or "/"
