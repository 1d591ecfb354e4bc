"""Writes a merged tree as a tree file (`treefile` reads it).

Called once per image; 50 000 names cost a tenth of a second, so the columns are made by whole lists rather
than row by row. The same layers always give the same bytes: inode numbers never change while a tree is
mounted, however often it is built.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from itertools import accumulate
from typing import Final

from p2pgz.core.content import FileRef, SharedFiles, content_key
from p2pgz.core.digest import Digest
from p2pgz.core.model import Entry
from p2pgz.errors import ImageInvalid
from p2pgz.image.merge import IMPLIED, Directory, MergedTree
from p2pgz.image.treeformat import (
    HEADER,
    INODE_COLUMNS,
    MAGIC,
    PREFIX_BYTES,
    ROOT_INO,
    XATTR_COUNT,
    XATTR_LENGTHS,
)

DIRECTORY_SIZE_BYTES: Final = 4096  # what most file systems show
_HEAP_BYTES_MAX: Final = 0xFFFF_FFFF  # offsets have 32 bits
_IMPLIED_ENTRY: Final = Entry(name=b"", kind="dir", mode=0o755)
_TYPE_BITS: Final = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}


def build_tree(merged: MergedTree, *, shared_files: SharedFiles | None = None, info: bytes = b"") -> bytes:
    """The tree file of a merged tree. `info` is kept in it for the caller.

    A file whose chunks another segment holds, as `shared_files` says, is referred to there; of equal files in
    this image the first one's place is taken for all.
    """
    try:
        return _Builder(merged).build(shared_files, info)
    except (OverflowError, struct.error) as error:
        raise ImageInvalid(
            f"a number in the image's layers is beyond what file systems hold: {error}"
        ) from error


class _Builder:
    def __init__(self, merged: MergedTree) -> None:
        self._merged = merged
        self._numbers: list[int] = []  # entry number per inode
        self._parents: list[int] = []
        self._names: list[bytes] = []
        self._children: list[int] = []  # inode per name
        self._columns: dict[str, list[int]] = {}

    def build(self, shared_files: SharedFiles | None, info: bytes) -> bytes:
        self._number_inodes()
        entries = self._merged.entries
        rows = [_IMPLIED_ENTRY if number == IMPLIED else entries[number] for number in self._numbers]
        columns = self._columns
        columns["parent"] = self._parents
        columns["uid"] = [row.uid for row in rows]
        columns["gid"] = [row.gid for row in rows]
        columns["mtime"] = [row.mtime for row in rows]
        columns["mtime_nsec"] = [row.mtime_nsec for row in rows]
        texts = bytearray()
        total_bytes = self._fill_by_kind(rows, texts)
        self._fill_xattrs(rows, texts)
        segments = self._fill_extents(rows, shared_files)
        return self._encode(segments, bytes(texts), info, total_bytes)

    def _number_inodes(self) -> None:
        """Breadth first, names in byte order: fills inodes, names, and the columns that count children."""
        linked = self._merged.linked
        known: dict[int, int] = {}
        numbers, parents, names, children = self._numbers, self._parents, self._names, self._children
        numbers.append(self._merged.root.entry)
        parents.append(ROOT_INO)
        nlink, where, count = [2], [0], [0]
        queue: list[tuple[int, Directory]] = [(ROOT_INO, self._merged.root)]
        for ino, directory in queue:
            items = directory.children
            where[ino - 1] = len(names)
            count[ino - 1] = len(items)
            ordered = sorted(items)
            names += ordered
            for name in ordered:
                child = items[name]
                child_ino = len(numbers) + 1
                if isinstance(child, Directory):
                    queue.append((child_ino, child))
                    nlink[ino - 1] += 1
                    numbers.append(child.entry)
                    nlink.append(2)
                else:
                    if child in linked:
                        first = known.setdefault(child, child_ino)
                        if first != child_ino:
                            nlink[first - 1] += 1
                            children.append(first)
                            continue
                    numbers.append(child)
                    nlink.append(1)
                children.append(child_ino)
                parents.append(ino)
                where.append(0)
                count.append(0)
        self._columns |= {"nlink": nlink, "where": where, "count": count}

    def _fill_by_kind(self, rows: list[Entry], texts: bytearray) -> int:
        """Mode, size, device and symlink targets; returns the bytes of all files."""
        where = self._columns["where"]
        sizes: list[int] = []
        modes: list[int] = []
        devices = [0] * len(rows)
        total_bytes = 0
        for n, row in enumerate(rows):
            kind = row.kind
            size = 0
            if kind == "reg":
                size = row.size
                total_bytes += size
            elif kind == "dir":
                size = DIRECTORY_SIZE_BYTES
            elif kind == "symlink":
                size = len(row.link)
                where[n] = len(texts)
                texts += row.link
            elif kind in ("char", "block"):
                devices[n] = os.makedev(row.dev_major, row.dev_minor)
            elif kind not in _TYPE_BITS:
                raise ImageInvalid(f"entry of kind {kind!r} in a merged tree")
            sizes.append(size)
            modes.append(_TYPE_BITS[kind] | (row.mode & 0o7777))
        self._columns |= {"size": sizes, "mode": modes, "rdev": devices}
        return total_bytes

    def _fill_xattrs(self, rows: list[Entry], texts: bytearray) -> None:
        """Attributes, each set of them once: thousands of files may carry the same label."""
        known: dict[bytes, int] = {}
        column = [0] * len(rows)
        for n, row in enumerate(rows):
            if row.xattrs:
                parts = [XATTR_COUNT.pack(len(row.xattrs))]
                for name, value in sorted(row.xattrs.items()):
                    parts += (XATTR_LENGTHS.pack(len(name), len(value)), name, value)
                packed = b"".join(parts)
                at = known.get(packed)
                if at is None:
                    at = known[packed] = len(texts) + 1
                    texts += packed
                column[n] = at
        self._columns["xattrs"] = column

    def _fill_extents(self, rows: list[Entry], shared_files: SharedFiles | None) -> list[Digest]:
        """Where the files' bytes are; returns the segments that are referred to."""
        merged, numbers, columns = self._merged, self._numbers, self._columns
        where, count = columns["where"], columns["count"]
        first_chunks = columns["first_chunk"] = [0] * len(rows)
        segment_column = columns["segment"] = [0] * len(rows)
        keys: dict[int, bytes] = {n: content_key(row.chunks) for n, row in enumerate(rows) if row.chunks}
        places: dict[bytes, FileRef] = {}
        if shared_files is not None and keys:
            places.update(shared_files(list(set(keys.values()))))
        segments: dict[Digest, int] = {}
        last_segment: Digest | None = None
        last_index = 0
        for n, key in keys.items():
            place = places.get(key)
            if place is None or place.chunk_count != len(rows[n].chunks):
                found = merged.extent(numbers[n])
                if found is None:
                    raise ImageInvalid(f"{rows[n].name!r} has chunks, but no place in its layer's segment")
                place = places[key] = FileRef(found[0], *found[1])
            if place.segment is not last_segment:
                last_segment = place.segment
                last_index = segments.setdefault(last_segment, len(segments))
            segment_column[n] = last_index
            where[n] = place.segment_offset
            first_chunks[n] = place.first_chunk
            count[n] = place.chunk_count
        return list(segments)

    def _encode(self, segments: list[Digest], texts: bytes, info: bytes, total_bytes: int) -> bytes:
        names = self._names
        names_heap = b"".join(names)
        if max(len(names_heap), len(texts), len(names), len(self._numbers)) > _HEAP_BYTES_MAX:
            raise ImageInvalid("the image's names, links or attributes together exceed 4 GiB")
        prefixes = array("Q", b"".join([name[:PREFIX_BYTES].ljust(PREFIX_BYTES, b"\0") for name in names]))
        if int.from_bytes(b"\0\1", "big") != array("H", b"\0\1")[0]:
            prefixes.byteswap()
        starts = [0, *accumulate(map(len, names))]
        parts = [
            HEADER.pack(
                MAGIC,
                len(self._numbers),
                len(names),
                len(segments),
                len(names_heap),
                len(texts),
                len(info),
                total_bytes,
            )
        ]
        parts += [array(code, self._columns[name]).tobytes() for name, code in INODE_COLUMNS if code in "Qq"]
        parts.append(prefixes.tobytes())
        parts += [array(code, self._columns[name]).tobytes() for name, code in INODE_COLUMNS if code == "I"]
        parts += [
            array("I", self._children).tobytes(),
            array("I", starts).tobytes(),
            b"".join([segment.raw for segment in segments]),
            names_heap,
            texts,
            info,
        ]
        return b"".join(parts)
