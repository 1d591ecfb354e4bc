"""A streaming decompressor for whole layers: gzip, zstd or plain, told apart by their first bytes.

For layers that are read from start to end (`core.ownindex`, `convert`, whole-blob verification). Media types
lie, magic bytes do not. Sans-io; output comes in pieces of at most `MAX_PIECE_BYTES`, made one after the
other as they are asked for, so that no input, however it was made, costs more memory than that. RFC 1952
(gzip members follow each other), RFC 8878 (zstd frames and skippable frames).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import zstandard

from p2pgz.core.gzipstream import GZIP_CHOICE_BYTES, GZIP_ERRORS, GzipStream, gzip_stream
from p2pgz.errors import ImageInvalid

MAX_PIECE_BYTES = 1 << 20
MAX_WINDOW_BYTES = 128 << 20  # what zstd's own command line accepts without being told to
_MEASURE_BYTES = (
    1 << 16
)  # input given to zlib at once: it copies what it does not use, and small members leave much
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # after a first byte of 0x50..0x5f
_MAGIC_BYTES = 4
_BLOCK_MAX_BYTES = 128 << 10  # RFC 8878 3.1.1.2.4: no zstd block decompresses to more
_BLOCK_RAW, _BLOCK_RLE = 0, 1

Compression = Literal["gzip", "zstd", "none"]


def detect(head: bytes) -> Compression:
    """What a blob that begins with these (four or more) bytes is compressed with."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == _SKIPPABLE_MAGIC and head[:1] in b"PQRSTUVWXYZ[\\]^_"):
        return "zstd"
    return "none"


def _damaged(what: str) -> ImageInvalid:
    return ImageInvalid(
        f"compressed layer: {what}", hint="the layer is damaged; pull it again or from elsewhere"
    )


class Decompressor:
    """Feed it a blob in pieces of any size, take what it yields, and call `finish` at the end."""

    def __init__(self) -> None:
        self.compression: Compression | None = None
        """known after the first four bytes"""
        self._head = b""
        self._codec: _Gzip | _Zstd | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield decompressed pieces; raises ImageInvalid. Take all of them before feeding again."""
        if self.compression is None:
            data = self._head + data
            if len(data) < _MAGIC_BYTES:
                self._head = data
                return
            self._start(data)
        if self._codec is not None:
            yield from self._codec.feed(data)
        else:
            for at in range(0, len(data), MAX_PIECE_BYTES):
                yield data[at : at + MAX_PIECE_BYTES]

    def finish(self) -> Iterator[bytes]:
        """The blob ended: yield what was held back; raises ImageInvalid when it was cut short."""
        if self.compression is None:
            head, self._head = self._head, b""
            self._start(head)
            if self._codec is None:
                if head:
                    yield head
                return
            yield from self._codec.feed(head)
        if self._codec is not None and not self._codec.complete:
            raise _damaged("the stream is cut short")

    def _start(self, head: bytes) -> None:
        self.compression = detect(head)
        if self.compression == "gzip":
            self._codec = _Gzip()
        elif self.compression == "zstd":
            self._codec = _Zstd()


class _Gzip:
    """Members one after the other; zero bytes may follow the last (tapes were padded so, and some registries'
    layers are).
    """

    def __init__(self) -> None:
        self._head = b""  # a member's first bytes, too few to choose its codec
        self._inflater: GzipStream | None = None
        self._padding = False
        self._any_member = False

    @property
    def complete(self) -> bool:
        return self._any_member and self._inflater is None and not self._head

    def feed(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _MEASURE_BYTES):
            yield from self._feed(data[at : at + _MEASURE_BYTES])

    def _feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._inflater is None:
                data, self._head = self._head + data, b""
                if not self._begin(data):
                    return
                assert self._inflater is not None
            try:
                piece = self._inflater.decompress(data, MAX_PIECE_BYTES)
            except GZIP_ERRORS as error:
                raise _damaged(f"not a gzip stream: {error}") from None
            if piece:
                yield piece
            if self._inflater.eof:
                data = self._inflater.unused_data
                self._inflater = None
                self._any_member = True
                continue
            data = self._inflater.unconsumed_tail
            if not data and len(piece) < MAX_PIECE_BYTES:
                return  # a full piece may leave more inside, though all input is taken

    def _begin(self, data: bytes) -> bool:
        """Start on the member that begins here; False when there is none, or not enough of it."""
        if self._any_member and data[:1] == b"\0":
            self._padding = True
        if self._padding:
            if data.strip(b"\0"):
                raise _damaged("bytes after the end of the gzip stream")
            return False
        if len(data) < GZIP_CHOICE_BYTES:
            self._head = data
            return False
        self._inflater = gzip_stream(data)
        return True


class _Zstd:
    """Frames one after the other.

    The library gives all output of a call at once, and four bytes can stand for 128 KiB. So the frames are
    cut at their blocks, and no call gets more blocks than fit into a piece.
    """

    def __init__(self) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._decoder.decompressobj()
        self._held = bytearray()
        self._state: Literal["magic", "size", "skip", "frame", "block", "body", "sum"] = "magic"
        self._wanted_bytes = _MAGIC_BYTES
        self._has_sum = False
        self._last = False
        self._skip_bytes = 0
        self._batch = bytearray()  # blocks for the next call
        self._batch_blocks = 0

    @property
    def complete(self) -> bool:
        return self._state == "magic" and not self._held

    def feed(self, data: bytes) -> Iterator[bytes]:
        at, size = 0, len(data)
        while at < size:
            if self._state == "skip":
                taken = min(self._skip_bytes, size - at)
                self._skip_bytes -= taken
                at += taken
                if not self._skip_bytes:
                    self._expect("magic", _MAGIC_BYTES)
                continue
            taken = min(self._wanted_bytes - len(self._held), size - at)
            self._held += data[at : at + taken]
            at += taken
            if len(self._held) == self._wanted_bytes:
                piece = bytes(self._held)
                self._held.clear()
                self._step(piece)
                if self._state == "magic" or self._batch_blocks >= MAX_PIECE_BYTES // _BLOCK_MAX_BYTES:
                    yield from self._flush()
        if self._batch and self._state != "frame":
            yield from self._flush()

    def _expect(
        self, state: Literal["magic", "size", "skip", "frame", "block", "body", "sum"], count: int
    ) -> None:
        self._state, self._wanted_bytes = state, count

    def _step(self, piece: bytes) -> None:
        """Take one element of the format, whole."""
        if self._state == "magic":
            if piece == _ZSTD_MAGIC:
                self._batch += piece
                self._expect("frame", 1)
            elif detect(piece) == "zstd":
                self._expect("size", 4)
            else:
                raise _damaged("bytes after the end of the zstd stream")
        elif self._state == "size":
            self._skip_bytes = int.from_bytes(piece, "little")
            if self._skip_bytes:
                self._expect("skip", 0)
            else:
                self._expect("magic", _MAGIC_BYTES)
        elif self._state == "frame":
            self._frame_header(piece)
        elif self._state == "block":
            self._batch += piece
            word = int.from_bytes(piece, "little")
            self._last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
            if size > _BLOCK_MAX_BYTES or kind not in (_BLOCK_RAW, _BLOCK_RLE, 2):
                raise _damaged("a zstd block breaks the format")
            self._batch_blocks += 1
            stored = 1 if kind == _BLOCK_RLE else size
            if stored:
                self._expect("body", stored)
            else:
                self._block_done()
        else:
            self._batch += piece
            if self._state == "body":
                self._block_done()
            else:
                self._expect("magic", _MAGIC_BYTES)

    def _frame_header(self, piece: bytes) -> None:
        descriptor = piece[0] if len(piece) == 1 else self._batch[_MAGIC_BYTES]
        if len(piece) == 1 and self._wanted_bytes == 1 and len(self._batch) == _MAGIC_BYTES:
            single = descriptor >> 5 & 1
            size_bytes = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
            more = (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size_bytes
            self._has_sum = bool(descriptor & 4)
            self._batch += piece
            self._expect("frame", more)
            return
        self._batch += piece
        self._expect("block", 3)

    def _block_done(self) -> None:
        if not self._last:
            self._expect("block", 3)
        elif self._has_sum:
            self._expect("sum", 4)
        else:
            self._expect("magic", _MAGIC_BYTES)

    def _flush(self) -> Iterator[bytes]:
        if not self._batch:
            return
        batch, self._batch = bytes(self._batch), bytearray()
        self._batch_blocks = 0
        try:
            piece = self._frame.decompress(batch)
        except zstandard.ZstdError as error:
            raise _damaged(f"not a zstd stream: {error}") from None
        if self._state == "magic":
            self._frame = self._decoder.decompressobj()
        if piece:
            yield piece
