"""Writes a merged tree as EROFS metadata: names and attributes for the kernel, the bytes in segments as further devices.

Called once per image, when it is mounted in erofs mode for the first time; sans-io. The result holds no content. Device n
is segment n-1 of the tree, the last device (`watch_device`) holds nothing: whoever mounts gets to know by its closing that
the last user of the file system is gone. The bytes are a function of the tree alone, so they are kept under its name.

Inodes follow each other in the tree's order, so those of a directory are neighbours; directories and symlinks end inside the
block of their inode where that saves one. A file is one contiguous range of its segment, hence a single chunk of the format,
however large. Raises StateError for what the format cannot express; the image is then served in tree mode.
"""

from __future__ import annotations

import stat
from typing import Final

from p2pgz.core.digest import Digest
from p2pgz.errors import StateError
from p2pgz.image.erofsformat import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BITS_MAX,
    CHUNK_INDEX,
    CHUNK_INDEX_ALIGN,
    CHUNK_INDEXES,
    DEVICE,
    DEVICE_TABLE_OFFSET,
    DEVICE_TABLE_SLOT,
    DEVICES_MAX,
    DIRENT,
    EXTENDED,
    HOLE_BLOCK,
    INCOMPAT_CHUNKED_FILE,
    INCOMPAT_DEVICE_TABLE,
    INODE,
    LAYOUT_CHUNK,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    MAGIC,
    NAME_BYTES_MAX,
    SLOT_BYTES,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    encode_xattrs,
    xattr_units,
)
from p2pgz.image.treefile import ROOT_INO, TreeFile

FORMAT_VERSION: Final = 1
"""part of the file's name: another version writes another file"""
# A tail longer than this gets a block of its own: placing it beside its inode would leave as much of a block unused
INLINE_BYTES_MAX: Final = BLOCK_BYTES // 2
_BLOCKS_MAX: Final = 0xFFFF_FFFF
_INODE_END_MAX: Final = BLOCK_BYTES - INODE.size
_ROOT_NID: Final = 1  # as in the tree; a nid of 0 would make `.` look like a deleted name
_FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_USE_TREE: Final = "tree mode serves it"


def watch_device(tree: TreeFile) -> int:
    """The number of the device that holds nothing."""
    return len(tree.segments) + 1


def write_metadata(tree: TreeFile) -> bytearray:
    """The EROFS image of a tree, without the bytes of its files."""
    return _Writer(tree).write()


class _Writer:
    def __init__(self, tree: TreeFile) -> None:
        self._tree = tree
        self._device_count = len(tree.segments) + 1
        if self._device_count > DEVICES_MAX:
            raise StateError(f"an image of {self._device_count - 1} segments", hint=_USE_TREE)
        table_end = DEVICE_TABLE_OFFSET + DEVICE.size * self._device_count
        self._meta_block = -(-table_end // BLOCK_BYTES)
        count = tree.inode_count
        self._at = [0] * (count + 1)  # place of each inode
        self._layout = bytearray(count + 1)
        self._types = bytearray(count + 1)
        self._xattrs: dict[int, bytes] = {}
        self._content: dict[int, list[bytes]] = {}  # names of a directory, or the target of a symlink
        self._sizes: dict[int, int] = {}  # of those
        self._first_block: dict[int, int] = {}  # of what is not beside its inode

    def write(self) -> bytearray:
        inodes_end = self._place()
        data_block = -(-inodes_end // BLOCK_BYTES)
        for ino in self._content:
            blocks = self._blocks_apart(ino)
            if blocks:
                self._first_block[ino] = data_block
                data_block += blocks
        if data_block >= _BLOCKS_MAX:
            raise StateError("the image has more names than EROFS can hold", hint=_USE_TREE)
        image = bytearray(data_block * BLOCK_BYTES)
        self._write_super(image, data_block)
        for ino in range(1, self._tree.inode_count + 1):
            self._write_inode(image, ino)
        return image

    def _place(self) -> int:
        """Decide where each inode lies; returns the end of the last one."""
        tree = self._tree
        at = self._meta_block * BLOCK_BYTES + _ROOT_NID * SLOT_BYTES
        for ino in range(1, tree.inode_count + 1):
            kind = stat.S_IFMT(tree.inode(ino).mode)
            self._types[ino] = _FILE_TYPES[kind]
            head = INODE.size
            attributes = tree.xattrs(ino)
            if attributes:
                encoded = self._xattrs[ino] = encode_xattrs(attributes)
                head += len(encoded)
            at += -at % SLOT_BYTES
            layout = LAYOUT_PLAIN
            beside = 0
            if kind == stat.S_IFREG:
                indexes = self._index_count(ino)
                if indexes:
                    layout = LAYOUT_CHUNK
                    beside = -head % CHUNK_INDEX_ALIGN + indexes * CHUNK_INDEX.size
            elif kind in (stat.S_IFDIR, stat.S_IFLNK):
                beside = self._prepare_content(ino, kind) % BLOCK_BYTES
                if 0 < beside <= INLINE_BYTES_MAX and head + beside <= BLOCK_BYTES:
                    layout = LAYOUT_INLINE
                    if (at + head) // BLOCK_BYTES != (at + head + beside - 1) // BLOCK_BYTES:
                        at += -at % BLOCK_BYTES
                else:
                    beside = 0
            if at % BLOCK_BYTES > _INODE_END_MAX:
                at += -at % BLOCK_BYTES
            self._at[ino] = at
            self._layout[ino] = layout
            at += head + beside
        return at

    def _index_count(self, ino: int) -> int:
        if self._tree.extent(ino) is None:
            return 0
        size = self._tree.inode(ino).size
        return -(-size >> (BLOCK_BITS + CHUNK_BITS_MAX)) if size >> (BLOCK_BITS + CHUNK_BITS_MAX) else 1

    def _prepare_content(self, ino: int, kind: int) -> int:
        """Note what a directory or symlink holds; returns its size."""
        if kind == stat.S_IFLNK:
            target = self._tree.readlink(ino)
            self._content[ino] = [target]
            size = len(target)
        else:
            names = [name for name, _, _ in self._tree.entries(ino)]
            if len(max(names, key=len, default=b"")) > NAME_BYTES_MAX:
                raise StateError(f"a name of more than {NAME_BYTES_MAX} bytes", hint=_USE_TREE)
            names += (b".", b"..")
            names.sort()
            self._content[ino] = names
            blocks = used = 0
            for name in names:
                need = DIRENT.size + len(name)
                if used + need > BLOCK_BYTES:
                    blocks += 1
                    used = 0
                used += need
            size = blocks * BLOCK_BYTES + used
        self._sizes[ino] = size
        return size

    def _blocks_apart(self, ino: int) -> int:
        size = self._sizes[ino]
        if self._layout[ino] == LAYOUT_INLINE:
            return size // BLOCK_BYTES
        return -(-size // BLOCK_BYTES)

    def _nid(self, ino: int) -> int:
        return (self._at[ino] - self._meta_block * BLOCK_BYTES) // SLOT_BYTES

    def _write_super(self, image: bytearray, blocks: int) -> None:
        # `df` adds up the devices: the image's own size, less what the metadata takes, is said of the last one
        total_blocks = -(-self._tree.total_bytes // BLOCK_BYTES)
        watch_blocks = min(max(0, total_blocks - blocks), _BLOCKS_MAX)
        tags = [segment.hex.encode() for segment in self._tree.segments]
        sizes = [0] * len(tags)
        at = DEVICE_TABLE_OFFSET
        for tag, size in zip([*tags, b"watch"], [*sizes, watch_blocks], strict=True):
            DEVICE.pack_into(image, at, tag, size, 0, b"")
            at += DEVICE.size
        SUPERBLOCK.pack_into(
            image,
            SUPERBLOCK_OFFSET,
            MAGIC,
            0,
            0,
            BLOCK_BITS,
            0,
            _ROOT_NID,
            self._tree.inode_count,
            0,
            0,
            blocks,
            self._meta_block,
            0,
            self._uuid(),
            b"p2pgz",
            INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE,
            0,
            self._device_count,
            DEVICE_TABLE_SLOT,
            0,
            0,
            0,
            0,
            b"",
        )

    def _uuid(self) -> bytes:
        """Follows from the segments, as everything else here."""
        return Digest.of(b"".join(segment.raw for segment in self._tree.segments)).raw[:16]

    def _write_inode(self, image: bytearray, ino: int) -> None:
        inode = self._tree.inode(ino)
        at = self._at[ino]
        layout = self._layout[ino]
        xattrs = self._xattrs.get(ino, b"")
        kind = stat.S_IFMT(inode.mode)
        size = self._sizes.get(ino, 0)
        union = 0
        end = at + INODE.size + len(xattrs)
        if kind == stat.S_IFREG:
            size = inode.size
            if layout == LAYOUT_CHUNK:
                union = self._write_indexes(image, end + -end % CHUNK_INDEX_ALIGN, ino, size)
            elif size:
                raise StateError(f"inode {ino} has a size and no chunks", hint=_USE_TREE)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            union = inode.rdev & 0xFFFF_FFFF  # glibc's encoding is the kernel's, below its 2^12 and 2^20
        elif ino in self._content:
            union = self._first_block.get(ino, 0)
            if kind == stat.S_IFLNK:
                [target] = self._content[ino]
                start = end if layout == LAYOUT_INLINE else union * BLOCK_BYTES
                image[start : start + len(target)] = target
            else:
                self._write_names(image, ino, union * BLOCK_BYTES, end)
        seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
        INODE.pack_into(
            image,
            at,
            EXTENDED | layout,
            xattr_units(xattrs),
            inode.mode,
            0,
            size,
            union,
            ino & 0xFFFF_FFFF,
            inode.uid,
            inode.gid,
            seconds & 0xFFFF_FFFF_FFFF_FFFF,
            nanoseconds,
            inode.nlink,
            b"",
        )
        if xattrs:
            image[at + INODE.size : end] = xattrs

    def _write_indexes(self, image: bytearray, at: int, ino: int, size: int) -> int:
        """Where a file's bytes are; returns the chunk format."""
        extent = self._tree.extent(ino)
        assert extent is not None
        first, misplaced = divmod(extent.segment_offset, BLOCK_BYTES)
        last = first + (size - 1) // BLOCK_BYTES
        if misplaced or last >= HOLE_BLOCK:
            raise StateError(
                f"a file that ends at byte {extent.segment_offset + size} of its segment is beyond what EROFS addresses",
                hint=_USE_TREE,
            )
        bits = min(max(0, (size - 1).bit_length() - BLOCK_BITS), CHUNK_BITS_MAX)
        for n in range(self._index_count(ino)):
            CHUNK_INDEX.pack_into(
                image, at + n * CHUNK_INDEX.size, 0, extent.segment + 1, first + (n << bits)
            )
        return bits | CHUNK_INDEXES

    def _write_names(self, image: bytearray, ino: int, apart_at: int, beside_at: int) -> None:
        """A directory's blocks, the last one beside the inode where it was decided so."""
        children = {name: child for name, child, _ in self._tree.entries(ino)}
        children[b"."] = ino
        children[b".."] = self._tree.parent(ino) if ino != ROOT_INO else ino
        full_blocks = self._blocks_apart(ino)
        block: list[bytes] = []
        used = number = 0
        for name in self._content[ino]:
            need = DIRENT.size + len(name)
            if used + need > BLOCK_BYTES:
                self._write_block(image, apart_at + number * BLOCK_BYTES, block, children)
                block, used, number = [], 0, number + 1
            block.append(name)
            used += need
        at = apart_at + number * BLOCK_BYTES if number < full_blocks else beside_at
        self._write_block(image, at, block, children)

    def _write_block(self, image: bytearray, at: int, names: list[bytes], children: dict[bytes, int]) -> None:
        offset = DIRENT.size * len(names)
        start = at + offset
        for name in names:
            child = children[name]
            DIRENT.pack_into(image, at, self._nid(child), offset, self._types[child], 0)
            at += DIRENT.size
            offset += len(name)
        joined = b"".join(names)
        image[start : start + len(joined)] = joined
