"""The parts of the EROFS on-disk format that `erofs` writes: numbers, records and extended attributes.

Everything is little-endian. Facts from fs/erofs/erofs_fs.h of Linux 6.12; nothing later is used, so any kernel that can
mount an image from a plain file understands it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from p2pgz.errors import StateError

BLOCK_BYTES: Final = 4096
BLOCK_BITS: Final = 12
SUPERBLOCK_OFFSET: Final = 1024
MAGIC: Final = 0xE0F5E1E2
INCOMPAT_CHUNKED_FILE: Final = 4
INCOMPAT_DEVICE_TABLE: Final = 8

# magic, checksum (unused), feature_compat, block bits, extension slots, root nid, inodes, build time s and ns, blocks,
# meta block, xattr block, uuid, volume name, feature_incompat, compression, extra devices, device table slot,
# directory block bits, xattr prefixes and their place, packed nid, reserved
SUPERBLOCK: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24s")
assert SUPERBLOCK.size == 128
# tag, blocks, mapped block, reserved
DEVICE: Final = struct.Struct("<64sII56s")
assert DEVICE.size == 128
DEVICE_TABLE_OFFSET: Final = SUPERBLOCK_OFFSET + SUPERBLOCK.size
DEVICE_TABLE_SLOT: Final = DEVICE_TABLE_OFFSET // DEVICE.size
DEVICES_MAX: Final = 0xFFFF  # 16 bits in the superblock and in each chunk index

# format, xattr count, mode, reserved, size, start block or device number or chunk format, ino, uid, gid, mtime s and ns,
# nlink, reserved
INODE: Final = struct.Struct("<HHHHQIIIIQII16s")
assert INODE.size == 64
SLOT_BYTES: Final = 32  # an inode's number is its place in these units
EXTENDED: Final = 1
LAYOUT_PLAIN: Final = 0 << 1
LAYOUT_INLINE: Final = 2 << 1
LAYOUT_CHUNK: Final = 4 << 1

CHUNK_INDEXES: Final = 0x20
CHUNK_BITS_MAX: Final = 31  # above the block's: chunks of 8 TiB at most
CHUNK_INDEX: Final = struct.Struct("<HHI")  # start block's upper bits (unused), device, start block
CHUNK_INDEX_ALIGN: Final = 8
HOLE_BLOCK: Final = 0xFFFF_FFFF

DIRENT: Final = struct.Struct("<QHBB")  # nid, offset of the name, file type, reserved
assert DIRENT.size == 12
NAME_BYTES_MAX: Final = 255

XATTR_HEADER: Final = struct.Struct("<IB7s")  # name filter (unused), shared attributes, reserved
XATTR_ENTRY: Final = struct.Struct("<BBH")  # bytes of the name without its prefix, prefix, bytes of the value
assert (XATTR_HEADER.size, XATTR_ENTRY.size) == (12, 4)
_ALIGN_XATTR: Final = 4
_XATTR_VALUE_BYTES_MAX: Final = 0xFFFF
_XATTR_UNITS_MAX: Final = 0xFFFF
_ACL_NAMES: Final = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_PREFIXES: Final = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_USE_TREE: Final = "tree mode shows it"


def encode_xattrs(attributes: Mapping[bytes, bytes]) -> bytes:
    """An inode's attributes as they follow it; empty without any. Raises StateError for what EROFS cannot hold."""
    if not attributes:
        return b""
    parts = [XATTR_HEADER.pack(0, 0, b"")]
    for name, value in sorted(attributes.items()):
        prefix, rest = _split_name(name)
        if len(rest) > NAME_BYTES_MAX or len(value) > _XATTR_VALUE_BYTES_MAX:
            raise StateError(
                f"attribute {_shown(name)} of {len(value)} bytes does not fit into EROFS", hint=_USE_TREE
            )
        entry = XATTR_ENTRY.pack(len(rest), prefix, len(value)) + rest + value
        parts.append(entry + bytes(-len(entry) % _ALIGN_XATTR))
    encoded = b"".join(parts)
    if xattr_units(encoded) > _XATTR_UNITS_MAX:
        raise StateError(f"attributes of {len(encoded)} bytes do not fit into EROFS", hint=_USE_TREE)
    return encoded


def xattr_units(encoded: bytes) -> int:
    """What an inode says about the size of its attributes."""
    return (len(encoded) - XATTR_HEADER.size) // _ALIGN_XATTR + 1 if encoded else 0


def _split_name(name: bytes) -> tuple[int, bytes]:
    acl = _ACL_NAMES.get(name)
    if acl is not None:
        return acl, b""
    for prefix, number in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return number, name[len(prefix) :]
    raise StateError(f"attribute {_shown(name)} is of no kind that EROFS knows", hint=_USE_TREE)


def _shown(name: bytes) -> str:
    return name[:100].decode(errors="backslashreplace")
