"""Compressing the members of a layer in worker threads and writing them in order.

A member is what one random access decompresses: a chunk of a file, the padding after it and the headers up to
the next chunk. Members are handed to threads in batches, since a hand-over costs as much as compressing 3
KiB; what comes out does not depend on their number. At most `_BATCHES_IN_FLIGHT` batches are in memory. Used
by `writer` only.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

BATCH_BYTES = 1 << 20
_BATCHES_IN_FLIGHT = 6  # with 1 MiB chunks: 12 MiB of input and as much of output

Compress = Callable[[bytes], bytes | bytearray]
"""One member to its compressed form; called from several threads at once"""


class Place:
    """Where a chunk ended up, and where its member ends: filled in when that is written."""

    __slots__ = ("digest", "end", "offset")

    def __init__(self) -> None:
        self.offset = self.end = 0
        self.digest = b""


class _Member:
    __slots__ = ("payload", "place", "rest")

    def __init__(self, place: Place | None) -> None:
        self.place = place
        self.payload: list[bytes] = []
        self.rest: list[bytes] = []


class MemberPacker:
    """Collects the bytes of the stream, member by member. Use as a context manager; `threads` of 0 compress
    inline.
    """

    def __init__(self, out: BinaryIO, compress: Compress, *, threads: int) -> None:
        self._out = out
        self.compress = compress
        self._pool = ThreadPoolExecutor(threads, "convert") if threads else None
        self._member = _Member(None)
        self._batch: list[_Member] = []
        self._batch_bytes = 0
        self._flying: deque[tuple[list[_Member], Future[list[tuple[bytes | bytearray, bytes]]]]] = deque()
        self._blob_hash = hashlib.sha256()
        self._stream_hash = hashlib.sha256()
        self.blob_bytes = 0
        self.stream_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, data: bytes) -> None:
        """Bytes of the stream that are no chunk: they go with the current member."""
        self._member.rest.append(data)
        self._count(data)

    def add_payload(self, data: bytes) -> None:
        """Bytes of the chunk that the current member began with."""
        self._member.payload.append(data)
        self._count(data)

    def _count(self, data: bytes) -> None:
        self._stream_hash.update(data)
        self.stream_bytes += len(data)
        self._batch_bytes += len(data)

    def begin_chunk(self) -> Place:
        """Begin a member whose first bytes are a chunk's."""
        place = Place()
        self.close_member(place)
        return place

    def close_member(self, place: Place | None = None) -> None:
        """End the current member; the next one begins with the chunk at `place`, or with no chunk."""
        if self._member.payload or self._member.rest:
            self._batch.append(self._member)
            if self._batch_bytes >= BATCH_BYTES:
                self._send()
        self._member = _Member(place)

    def _send(self) -> None:
        batch, self._batch = self._batch, []
        self._batch_bytes = 0
        if self._pool is None:
            self._write(batch, _pack(batch, self.compress))
            return
        if len(self._flying) >= _BATCHES_IN_FLIGHT:
            self._land()
        self._flying.append((batch, self._pool.submit(_pack, batch, self.compress)))
        while self._flying and self._flying[0][1].done():
            self._land()

    def _land(self) -> None:
        batch, packed = self._flying.popleft()
        self._write(batch, packed.result())

    def _write(self, batch: list[_Member], packed: list[tuple[bytes | bytearray, bytes]]) -> None:
        for member, (compressed, digest) in zip(batch, packed, strict=True):
            if member.place is not None:
                member.place.offset = self.blob_bytes
                member.place.end = self.blob_bytes + len(compressed)
                member.place.digest = digest
            self.blob_bytes += len(compressed)
        blob = b"".join([compressed for compressed, _ in packed])
        self._blob_hash.update(blob)
        self._out.write(blob)

    def flush(self) -> int:
        """Write everything that was added; gives the position in the blob."""
        self.close_member()
        if self._batch:
            self._send()
        while self._flying:
            self._land()
        return self.blob_bytes

    def write_raw(self, data: bytes) -> None:
        """Bytes of the blob that are not of the stream; `flush` comes first."""
        self._blob_hash.update(data)
        self._out.write(data)
        self.blob_bytes += len(data)

    @property
    def blob_digest(self) -> bytes:
        """sha256 of what was written."""
        return self._blob_hash.digest()

    @property
    def stream_digest(self) -> bytes:
        """sha256 of the uncompressed stream: the diffID."""
        return self._stream_hash.digest()


def _pack(batch: list[_Member], compress: Compress) -> list[tuple[bytes | bytearray, bytes]]:
    """(compressed, digest of the chunk) for each member; frees what it has packed."""
    packed: list[tuple[bytes | bytearray, bytes]] = []
    for member in batch:
        digest = b""
        if member.place is not None:
            whole = hashlib.sha256()
            for piece in member.payload:
                whole.update(piece)
            digest = whole.digest()
        packed.append((compress(b"".join(member.payload + member.rest)), digest))
        member.payload = member.rest = []
    return packed
