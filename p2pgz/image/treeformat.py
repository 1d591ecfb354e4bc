"""The format of tree files, shared by their writer (`treebuild`) and reader (`treefile`)."""

from __future__ import annotations

import struct
from typing import Final, Literal

ROOT_INO: Final = 1
# The last byte is the version of the format.
MAGIC: Final = int.from_bytes(b"p2pgztr\x01", "little")
# magic, inodes, names, segments, bytes of: names, texts (symlinks and attributes), info; total bytes of files
HEADER: Final = struct.Struct("=QQQQQQQQ")
# The columns, in file order: name, code. Rows: one per inode, then one per name.
INODE_COLUMNS: Final[tuple[tuple[str, Literal["Q", "q", "I"]], ...]] = (
    ("size", "Q"),
    ("mtime", "q"),
    ("rdev", "Q"),
    ("where", "Q"),  # directory: first name; file: segment offset; symlink: offset in the texts
    ("mtime_nsec", "I"),
    ("mode", "I"),
    ("uid", "I"),
    ("gid", "I"),
    ("nlink", "I"),
    ("count", "I"),  # directory: names; file: chunks
    ("first_chunk", "I"),
    ("segment", "I"),
    ("xattrs", "I"),  # offset in the texts + 1, or 0
    ("parent", "I"),
)
PREFIX_BYTES: Final = 8
XATTR_LENGTHS: Final = struct.Struct("=II")
XATTR_COUNT: Final = struct.Struct("=I")
