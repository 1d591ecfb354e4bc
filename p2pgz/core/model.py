"""The values that the formats are parsed into: what a layer is, whatever it was written by.

A TOC of any flavour (`core.toc`) and a plain tar stream (`core.ownindex`) both end as a `Toc`; everything above (segment
layout, merged tree, fetch) knows only these.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from p2pgz.core.digest import Digest

# A chunk is held in memory while it is verified. eStargz writes 4 MiB, zstd:chunked about 64 KiB; legacy stargz files
# of several parts can be verified only as a whole and become one chunk each, hence the room.
MAX_CHUNK_BYTES = 256 << 20


class ChunkKind(IntEnum):
    """How a chunk's bytes come to be."""

    DATA = 0
    """compressed in the blob"""
    ZEROS = 1
    """zero bytes that the writer left out of the chunk list's storage (containers' zstd:chunked, `chunkType: zeros`)"""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A run of a chunk's bytes inside one compressed member of the blob.

    `offset` .. `end` (exclusive) are the blob bytes to fetch; the payload is `size` bytes at `inner` of what they
    decompress to. A range can hold further members after the payload's.
    """

    offset: int
    end: int
    inner: int
    size: int


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """The unit of verification: `size` bytes of a file at `file_offset`, named by the sha256 in `digest` (32 raw bytes).

    Nearly every chunk has one piece (`more` is empty). A legacy stargz file of several parts is one chunk of many pieces,
    because only its whole-file digest can tell right from wrong bytes.
    """

    digest: bytes
    file_offset: int
    size: int
    offset: int
    end: int
    inner: int
    kind: ChunkKind = ChunkKind.DATA
    more: tuple[Piece, ...] = ()

    def pieces(self) -> tuple[Piece, ...]:
        """All runs, in file order; none for a chunk of zeros."""
        if self.kind is ChunkKind.ZEROS:
            return ()
        head = self.size - sum(piece.size for piece in self.more)
        return (Piece(self.offset, self.end, self.inner, head), *self.more)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One file, directory, link or device of a layer, with the name it has in the root file system.

    `name` is clean: no leading or trailing slash, no `.`/`..`/empty component; `b""` is the root. `kind` is one of
    dir reg symlink hardlink char block fifo. `mode` has the low 12 bits only. `link` is the target text of a symlink, or
    the clean name of a hard link's target. Times are seconds and nanoseconds since 1970. `chunks` cover the file in order.
    """

    name: bytes
    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    mtime_nsec: int = 0
    link: bytes = b""
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[bytes, bytes] = {}
    digest: bytes = b""
    chunks: tuple[Chunk, ...] = ()


class Toc(msgspec.Struct, frozen=True, gc=False):
    """A layer's table of contents after every check that needs no payload byte.

    `digest` names it (sha256 of the TOC's bytes; for plain layers the diffID). Entries are in the order of the TOC: a later
    entry of the same name replaces an earlier one. Landmarks and the TOC's own file are not among them. `prefetch_end` is
    the blob offset up to which a writer recorded start-up files, 0 if none. `warnings` are facts a person should see.
    """

    digest: Digest
    entries: list[Entry]
    prefetch_end: int = 0
    warnings: tuple[str, ...] = ()
