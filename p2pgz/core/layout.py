"""Where each chunk of a layer lives in its segment file, and the table that says so.

Called by the layer opener when a TOC has been parsed (`SegmentLayout`), and by pool, fetch, mount and peers
afterwards (`SegmentTable`, a view of the mapped file: opening one costs no parsing). The layout is a pure
function of the TOC: an address never comes to mean another chunk, so pages that the kernel has cached can
never be stale. Anything that changes an address needs a new `_MAGIC`.

Chunks are numbered in TOC order. Files lie in the segment in the order of their first byte in the blob (files
recorded for start-up come first there), each one contiguous, aligned to a page and padded with zeros.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.model import ChunkKind, Piece, Toc
from p2pgz.errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Compression = Literal["gzip", "zstd", "none"]

PAGE_BYTES: Final = 4096
_COMPRESSIONS: Final[tuple[Compression, ...]] = ("gzip", "zstd", "none")
# The last byte is the version. Written in the machine's byte order like the arrays, so that a table carried
# to a machine of the other order is refused here.
_MAGIC: Final = int.from_bytes(b"p2pgzst\x01", "little")
# magic, compression, chunks, pieces beyond the first, segment bytes, TOC digest
_HEADER: Final = struct.Struct("=QQQQQ32s")


class FileExtent(NamedTuple):
    """A regular file in the segment: its bytes start at `segment_offset`, its chunks are numbered from
    `first_chunk`."""

    segment_offset: int
    first_chunk: int
    chunk_count: int


class SegmentLayout:
    """The segment of one layer. `extents` maps indexes of `toc.entries` to places, for regular files that
    have bytes."""

    def __init__(
        self, toc: Toc, compression: Compression, extents: dict[int, FileExtent], segment_bytes: int
    ) -> None:
        self.extents = extents
        self.segment_bytes = segment_bytes
        self._toc = toc
        self._compression = compression

    @classmethod
    def build(cls, toc: Toc, *, compression: Compression) -> SegmentLayout:
        """Lay out the files of a TOC. `compression` is how the members of its blob are packed."""
        entries = toc.entries
        numbered: list[tuple[int, int, int, int]] = []  # blob offset, inner, index, first chunk
        chunk_count = 0
        for index, entry in enumerate(entries):
            if chunks := entry.chunks:
                head = chunks[0]
                numbered.append((head.offset, head.inner, index, chunk_count))
                chunk_count += len(chunks)
        extents: dict[int, FileExtent] = {}
        at = 0
        numbered.sort()
        for _, _, index, first_chunk in numbered:
            entry = entries[index]
            extents[index] = FileExtent(at, first_chunk, len(entry.chunks))
            at += (entry.size + PAGE_BYTES - 1) & -PAGE_BYTES
        return cls(toc, compression, extents, at)

    def to_bytes(self) -> bytes:
        """The segment table as a file, for `SegmentTable`."""
        digests: list[bytes] = []
        segment_offset: list[int] = []
        blob_offset: list[int] = []
        blob_end: list[int] = []
        inner: list[int] = []
        size: list[int] = []
        kind: list[int] = []
        # four arrays of one row per further piece, sorted by chunk number
        more: tuple[list[int], list[int], list[int], list[int], list[int]] = ([], [], [], [], [])
        extents = self.extents
        for index, entry in enumerate(self._toc.entries):
            if not entry.chunks:
                continue
            base = extents[index].segment_offset
            for chunk in entry.chunks:
                if chunk.more:
                    for piece in chunk.more:
                        row = (len(digests), piece.offset, piece.end, piece.inner, piece.size)
                        for column, value in zip(more, row, strict=True):
                            column.append(value)
                digests.append(chunk.digest)
                segment_offset.append(base + chunk.file_offset)
                blob_offset.append(chunk.offset)
                blob_end.append(chunk.end)
                inner.append(chunk.inner)
                size.append(chunk.size)
                kind.append(chunk.kind)
        count = len(digests)
        columns = [
            _HEADER.pack(
                _MAGIC,
                _COMPRESSIONS.index(self._compression),
                count,
                len(more[0]),
                self.segment_bytes,
                self._toc.digest.raw,
            ),
            *(array("Q", column).tobytes() for column in (segment_offset, blob_offset, blob_end, inner)),
            *(array("Q", column).tobytes() for column in more),
            b"".join(digests),
            array("I", size).tobytes(),
            bytes(kind),
        ]
        return b"".join(columns)


class SegmentTable:
    """The table of a segment, read where it lies. Keeps `buffer` alive; closing a map under it is the
    caller's fault.

    `digest(n)`, `pieces(n)` and the columns are indexed by chunk number. Raises StateError when the buffer is
    not a table of this version; it is written by `SegmentLayout.to_bytes` only, so the numbers in it are
    trusted.
    """

    __slots__ = (
        "_digests",
        "_more",
        "_view",
        "blob_end",
        "blob_offset",
        "chunk_count",
        "compression",
        "id",
        "inner",
        "kind",
        "segment_bytes",
        "segment_offset",
        "size",
    )

    def __init__(self, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B")
        if len(view) < _HEADER.size:
            raise StateError(
                f"segment table of {len(view)} bytes is cut short", hint="it is made again from the TOC"
            )
        magic, compression, count, more_count, segment_bytes, raw = _HEADER.unpack_from(view)
        if magic != _MAGIC or compression >= len(_COMPRESSIONS):
            raise StateError("not a segment table of this version", hint="it is made again from the TOC")
        expected_bytes = _HEADER.size + count * (4 * 8 + SHA256_BYTES + 4 + 1) + more_count * 5 * 8
        if len(view) != expected_bytes:
            raise StateError(
                f"segment table has {len(view)} bytes instead of {expected_bytes}",
                hint="it is made again from the TOC",
            )
        at = _HEADER.size

        def column(code: Literal["B", "I", "Q"], item_bytes: int, items: int) -> memoryview:
            nonlocal at
            start, at = at, at + item_bytes * items
            return view[start:at].cast(code)

        self._view = view
        self.id = Digest(raw)
        self.compression: Compression = _COMPRESSIONS[compression]
        self.chunk_count: int = count
        self.segment_bytes: int = segment_bytes
        self.segment_offset = column("Q", 8, count)
        self.blob_offset = column("Q", 8, count)
        self.blob_end = column("Q", 8, count)
        self.inner = column("Q", 8, count)
        self._more = tuple(column("Q", 8, more_count) for _ in range(5))
        self._digests = column("B", SHA256_BYTES, count)
        self.size = column("I", 4, count)
        self.kind = column("B", 1, count)

    def digest(self, n: int) -> bytes:
        """The sha256 of chunk n, 32 raw bytes."""
        if not 0 <= n < self.chunk_count:
            raise IndexError(f"chunk {n} of {self.chunk_count}")
        return bytes(self._digests[n * SHA256_BYTES : (n + 1) * SHA256_BYTES])

    def find(self, digest: bytes) -> int | None:
        """The first chunk with this digest (32 raw bytes); a scan, for people's questions rather than reads."""
        raw = bytes(self._digests)
        at = raw.find(digest)
        while at >= 0 and at % SHA256_BYTES:
            at = raw.find(digest, at + 1)
        return at // SHA256_BYTES if at >= 0 else None

    def pieces(self, n: int) -> tuple[Piece, ...]:
        """The runs of chunk n in the blob, in file order; none for a chunk of zeros."""
        if self.kind[n] == ChunkKind.ZEROS:
            return ()
        owner, offset, end, inner, size = self._more
        first = last = 0
        if owner:
            first = bisect_left(owner, n)
            last = bisect_left(owner, n + 1)
        more = tuple(Piece(offset[k], end[k], inner[k], size[k]) for k in range(first, last))
        head_size = self.size[n] - sum(piece.size for piece in more)
        return (Piece(self.blob_offset[n], self.blob_end[n], self.inner[n], head_size), *more)
