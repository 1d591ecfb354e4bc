"""Cuts chunks out of the compressed members of a blob, byte stream in, payloads out.

Called by fetch for every byte that a registry sends, and for TOCs (`core.toc`). Sans-io: the caller feeds
what has arrived, in pieces of any size, and may do so in a worker thread (the codecs release the interpreter
lock). Inflating never goes further than the last wanted byte, because what stands behind it is another file's
business or a bomb; and nothing is allocated by what a frame says about its own size.

A member is whatever decompresses from one offset on: a gzip member or zstd frame, and the ones that follow
it. Parallel writers leave a second, header-only member in the range, and a payload may go on in the next
member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Final, Literal, cast

import zstandard

from p2pgz.core.gzipstream import GZIP_CHOICE_BYTES, GZIP_ERRORS, GzipStream, gzip_stream
from p2pgz.errors import ChunkCorrupt

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Output is made in steps of at most this, or of what the chunk in hand still needs; bounds what is thrown
# away between chunks
STEP_BYTES: Final = 256 << 10
# Input is given to the codec in slices, because it hands back a copy of what it has not used yet after every
# step
_INPUT_SLICE_BYTES: Final = 1 << 20
# The window that zstd's strongest level asks for (2^27). Frames that want more, or lie about their size, are
# refused.
MAX_ZSTD_WINDOW_BYTES: Final = 128 << 20
# The codec hands out pieces of this size; larger ones cost more in page faults than they save in calls
# (measured: 128 KiB takes 1.3 times as long)
_ZSTD_OUTPUT_BYTES: Final = 32 << 10


class MemberInflater:
    """Inflates one member and gives the payloads at `wanted`, (inner offset, size) pairs in any order.

    Equal pairs are fine, pairs that overlap otherwise are refused with ValueError (`core.ranges` never plans
    them). After ChunkCorrupt the object is of no use.
    """

    __slots__ = ("_at", "_codec", "_end", "_next", "_partial", "_ranges", "finished")

    def __init__(self, compression: Literal["gzip", "zstd"], wanted: Sequence[tuple[int, int]]) -> None:
        self._ranges = _disjoint(wanted)
        self._end = self._ranges[-1][1] if self._ranges else 0
        self._next = 0
        self._at = 0
        self._partial: list[bytes] = []
        self._codec: _Gzip | _Zstd = _Gzip() if compression == "gzip" else _Zstd()
        self.finished = not self._ranges

    def feed(self, data: Buffer) -> list[tuple[int, bytes]]:
        """Take the next compressed bytes; returns (index into `wanted`, payload) of what became complete.

        Raises ChunkCorrupt when the bytes cannot be decompressed.
        """
        done: list[tuple[int, bytes]] = []
        view = memoryview(data).cast("B")
        while not self.finished and view:
            self._codec.run(view[:_INPUT_SLICE_BYTES], self._room, lambda out: self._absorb(out, done))
            view = view[_INPUT_SLICE_BYTES:]
        return done

    def close(self) -> None:
        """Say that no byte follows; raises ChunkCorrupt when payloads are still missing."""
        if not self.finished:
            missing = len(self._ranges) - self._next
            raise ChunkCorrupt(f"the member ends after {self._at} bytes, before {missing} of its chunks do")

    def _room(self) -> int:
        """How many bytes the codec may make next; 0 ends it."""
        if self.finished:
            return 0
        start, end, _ = self._ranges[self._next]
        if self._at < start:
            return min(STEP_BYTES, self._end - self._at)
        return min(max(STEP_BYTES, end - self._at), self._end - self._at)

    def _absorb(self, out: bytes, done: list[tuple[int, bytes]]) -> None:
        base = self._at
        self._at = at = base + len(out)
        ranges = self._ranges
        while self._next < len(ranges):
            start, end, indexes = ranges[self._next]
            if start >= at:
                return
            if at < end:
                self._partial.append(out[start - base :] if start > base else out)
                return
            part = out[max(0, start - base) : end - base]
            if self._partial:
                part = b"".join((*self._partial, part))
                self._partial.clear()
            done.extend((index, part) for index in indexes)
            self._next += 1
        self.finished = True


def _disjoint(wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(start, end, indexes into `wanted`), sorted, equal ones together."""
    ranges: list[tuple[int, int, tuple[int, ...]]] = []
    for index in sorted(range(len(wanted)), key=wanted.__getitem__):
        inner, size = wanted[index]
        if inner < 0 or size < 1:
            raise ValueError(f"a chunk of {size} bytes at {inner} cannot be wanted")
        if ranges and inner < ranges[-1][1]:
            if ranges[-1][:2] != (inner, inner + size):
                raise ValueError(f"wanted chunks overlap at {inner}")
            ranges[-1] = (inner, inner + size, (*ranges[-1][2], index))
        else:
            ranges.append((inner, inner + size, (index,)))
    return ranges


class _Gzip:
    """Gzip members one after the other, stopped by size."""

    __slots__ = ("_head", "_stream")

    def __init__(self) -> None:
        self._head = b""
        self._stream: GzipStream | None = None

    def run(self, data: memoryview | bytes, room: Callable[[], int], absorb: Callable[[bytes], None]) -> None:
        """Inflate `data` into `absorb` while `room()` is not 0."""
        try:
            while limit := room():
                if self._stream is None:
                    if self._head:
                        data = self._head + data
                    if len(data) < GZIP_CHOICE_BYTES:
                        self._head = bytes(data)
                        return
                    self._head = b""
                    self._stream = gzip_stream(data)
                out = self._stream.decompress(data, limit)
                if out:
                    absorb(out)
                if self._stream.eof:
                    data = self._stream.unused_data
                    self._stream = None
                    if not data:
                        return
                    continue
                data = self._stream.unconsumed_tail
                # a full `out` may leave bytes inside the codec although no input is left
                if not data and len(out) < limit:
                    return
        except GZIP_ERRORS as error:
            raise ChunkCorrupt(f"cannot inflate: {error}") from error


class _Zstd:
    """Zstandard frames in a row, also skippable ones."""

    __slots__ = ("_sink", "_writer")

    def __init__(self) -> None:
        self._sink = _Sink()
        self._writer = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES).stream_writer(
            cast("IO[bytes]", self._sink),
            write_size=_ZSTD_OUTPUT_BYTES,
            closefd=False,
        )

    def run(self, data: memoryview, room: Callable[[], int], absorb: Callable[[bytes], None]) -> None:
        """Decompress `data` into `absorb` while `room()` is not 0."""
        self._sink.room, self._sink.absorb = room, absorb
        try:
            self._writer.write(data)
        except _EnoughError:
            return
        except zstandard.ZstdError as error:
            raise ChunkCorrupt(f"cannot decompress: {error}") from error
        finally:
            del (
                self._sink.room,
                self._sink.absorb,
            )  # they lead back to the inflater: a cycle would keep its window


class _Sink:
    """Where the codec pushes its output; only an exception can stop it in the middle of its input."""

    __slots__ = ("absorb", "room")

    room: Callable[[], int]
    absorb: Callable[[bytes], None]

    def write(self, out: bytes) -> int:
        """Take a piece of output."""
        self.absorb(out)
        if not self.room():
            raise _EnoughError
        return len(out)


class _EnoughError(Exception):
    """Everything wanted is there."""
