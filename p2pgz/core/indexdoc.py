"""The document in which the own index of a plain layer travels between peers and rests on disk (msgpack).

It comes from others: `from_bytes` takes nothing on trust but the names of chunks, which are checked when they
arrive, and raises ImageInvalid for whatever an honest `core.ownindex` would not have written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.model import Chunk, ChunkKind, Entry, Toc
from p2pgz.core.ownindex import (
    MAX_DEVICE,
    MAX_ID,
    MAX_OTHER_BYTES,
    MAX_PLAIN_CHUNKS,
    MAX_PLAIN_ENTRIES,
    MAX_WARNING_COUNT,
    PlainIndex,
    zeros_digest,
)
from p2pgz.core.tar import MAX_FILE_BYTES, MAX_NAME_BYTES
from p2pgz.core.tarfields import clean_name
from p2pgz.errors import ImageInvalid

MAX_INDEX_BYTES = 512 << 20
_FORMAT = 1
_MIN_CHUNK_BYTES = 4096
_MAX_CHUNK_BYTES = 16 << 20
_MAX_STREAM_BYTES = 1 << 44
_HOLE = -1
_KINDS = frozenset({"dir", "reg", "symlink", "hardlink", "char", "block", "fifo"})
_SECONDS = range(-(1 << 63), 1 << 63)
_NANOSECONDS = range(1_000_000_000)


class _EntryDocument(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_nsec: int
    link: bytes
    dev_major: int
    dev_minor: int
    xattrs: list[tuple[bytes, bytes]]
    runs: list[tuple[int, int, bytes]]
    """a run of chunks: where it starts in the stream (-1: a hole), its bytes, the digests of its chunks"""


class _Document(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A serialised index: the format's number, then the fields of PlainIndex and Toc."""

    format: int
    diff_id: bytes
    chunk_bytes: int
    stream_bytes: int
    # looked at before the first one is made
    entries: Annotated[list[_EntryDocument], msgspec.Meta(max_length=MAX_PLAIN_ENTRIES)]
    other: bytes
    warnings: Annotated[list[str], msgspec.Meta(max_length=MAX_WARNING_COUNT)]


def to_bytes(index: PlainIndex) -> bytes:
    """The index as one document (msgpack); the same index gives the same bytes."""
    entries = [
        _EntryDocument(
            entry.name, entry.kind, entry.mode, entry.uid, entry.gid, entry.size, entry.mtime, entry.mtime_nsec,
            entry.link, entry.dev_major, entry.dev_minor, sorted(entry.xattrs.items()), _runs(entry.chunks),
        )
        for entry in index.toc.entries
    ]  # fmt: skip
    document = _Document(
        _FORMAT,
        index.toc.digest.raw,
        index.chunk_bytes,
        index.stream_bytes,
        entries,
        index.other,
        list(index.toc.warnings),
    )
    return msgspec.msgpack.encode(document)


def _runs(chunks: tuple[Chunk, ...]) -> list[tuple[int, int, bytes]]:
    runs: list[tuple[int, int, bytes]] = []
    digests: list[bytes] = []
    start = size = 0
    previous: Chunk | None = None
    for chunk in chunks:
        hole = chunk.kind is ChunkKind.ZEROS
        if previous is None or hole is not (previous.kind is ChunkKind.ZEROS):
            if previous is not None:
                runs.append((start, size, b"".join(digests)))
            start, size, digests = (-1 if hole else chunk.offset), 0, []
        size += chunk.size
        if not hole:
            digests.append(chunk.digest)
        previous = chunk
    if previous is not None:
        runs.append((start, size, b"".join(digests)))
    return runs


def from_bytes(data: bytes, *, chunks_max: int | None = None) -> PlainIndex:
    """Parse what `to_bytes` wrote; raises ImageInvalid.

    A few bytes can name a hole of millions of chunks, so who did not make the document sets `chunks_max`.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise _bad(f"{len(data)} bytes; at most {MAX_INDEX_BYTES} are supported")
    try:
        document = msgspec.msgpack.decode(data, type=_Document)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _bad(str(error)) from None
    if document.format != _FORMAT:
        raise _bad(f"format {document.format}; this version reads {_FORMAT}")
    if len(document.diff_id) != SHA256_BYTES:
        raise _bad("its diffID is not a sha256 digest")
    if not _MIN_CHUNK_BYTES <= document.chunk_bytes <= _MAX_CHUNK_BYTES:
        raise _bad(f"chunks of {document.chunk_bytes} bytes")
    if not 0 <= document.stream_bytes <= _MAX_STREAM_BYTES:
        raise _bad(f"a stream of {document.stream_bytes} bytes")
    limit = MAX_PLAIN_CHUNKS if chunks_max is None else chunks_max
    reader = _Reader(document.chunk_bytes, document.stream_bytes, limit)
    entries = [reader.entry(entry) for entry in document.entries]
    if document.stream_bytes - reader.stored_bytes > MAX_OTHER_BYTES:
        raise _bad("too many bytes outside chunks")
    toc = Toc(Digest(document.diff_id), entries, warnings=tuple(document.warnings))
    return PlainIndex(toc, document.stream_bytes, document.other, document.chunk_bytes)


def _bad(what: str) -> ImageInvalid:
    return ImageInvalid(f"index of a plain layer: {what}", hint="it is taken from another peer, or made anew")


class _Reader:
    """Checks entries in the order of the stream, in which their chunks must lie."""

    def __init__(self, chunk_bytes: int, stream_bytes: int, chunks_max: int) -> None:
        self._chunks_max = chunks_max
        self._chunk_bytes = chunk_bytes
        self._stream_bytes = stream_bytes
        self._position = 0
        self._chunk_count = 0
        self.stored_bytes = 0

    def entry(self, found: _EntryDocument) -> Entry:
        name, kind, link = found.name, found.kind, found.link
        if (
            clean_name(name) != name
            or b"\0" in name
            or len(name) > MAX_NAME_BYTES
            or (not name and kind != "dir")
        ):
            raise _bad("a name that is not clean")
        if b"\0" in link or len(link) > MAX_NAME_BYTES or bool(link) is not (kind in ("symlink", "hardlink")):
            raise _bad(f"the target of {name[:200]!r}")
        if kind == "hardlink" and (clean_name(link) != link or link == name):
            raise _bad(f"the target of {name[:200]!r}")
        if (
            kind not in _KINDS
            or not 0 <= found.mode <= 0o7777
            or not (0 <= found.uid <= MAX_ID and 0 <= found.gid <= MAX_ID)
            or found.mtime not in _SECONDS
            or found.mtime_nsec not in _NANOSECONDS
            or not (0 <= found.dev_major <= MAX_DEVICE and 0 <= found.dev_minor <= MAX_DEVICE)
            or not 0 <= found.size <= (MAX_FILE_BYTES if kind == "reg" else 0)
        ):
            raise _bad(f"the attributes of {name[:200]!r}")
        xattrs = dict(found.xattrs)
        if len(xattrs) != len(found.xattrs) or b"" in xattrs:
            raise _bad(f"the extended attributes of {name[:200]!r}")
        chunks = tuple(self._chunks(found))
        return Entry(
            name, kind, found.mode, found.uid, found.gid, found.size, found.mtime, found.mtime_nsec, link,
            found.dev_major, found.dev_minor, xattrs, chunks[0].digest if len(chunks) == 1 else b"", chunks,
        )  # fmt: skip

    def _chunks(self, found: _EntryDocument) -> Iterator[Chunk]:
        filled = 0
        for start, size, digests in found.runs:
            count = -(-size // self._chunk_bytes)
            self._chunk_count += count
            if size <= 0 or size > found.size - filled or self._chunk_count > self._chunks_max:
                raise _bad(f"the runs of {found.name[:200]!r}")
            hole = start == _HOLE
            if not hole:
                if start < self._position or start + size > self._stream_bytes:
                    raise _bad(f"{found.name[:200]!r} lies outside the stream, or over another file")
                self._position = start
                self.stored_bytes += size
            if len(digests) != (0 if hole else count * SHA256_BYTES):
                raise _bad(f"the number of chunks of {found.name[:200]!r}")
            for index in range(count):
                taken = min(self._chunk_bytes, size - index * self._chunk_bytes)
                if hole:
                    yield Chunk(zeros_digest(taken), filled, taken, 0, 0, 0, ChunkKind.ZEROS)
                else:
                    digest = digests[index * SHA256_BYTES : (index + 1) * SHA256_BYTES]
                    at = self._position
                    self._position = at + taken
                    yield Chunk(digest, filled, taken, at, self._position, 0)
                filled += taken
        if filled != found.size:
            raise _bad(f"the runs of {found.name[:200]!r} do not cover it")
