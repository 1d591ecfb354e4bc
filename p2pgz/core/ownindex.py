"""The own index of a layer that nobody converted: a TOC in our chunking plus the tar's other bytes.

`PlainIndexer` reads the decompressed stream once and gives every chunk's payload on the way; the index it
ends with is what peers offer under the layer's diffID. A receiver (`core.indexcheck`) rebuilds the stream from
chunks and `other` and trusts nothing before it has made the same index of it. The same stream gives the same
index everywhere: chunks are cut at fixed offsets inside each file (and where a sparse file's stored runs end),
never by content. Design, "Reading an image".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import zstandard

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, ChunkKind, Entry, Toc
from p2pgz.core.tar import EntryEnd, Header, Hole, Other, Payload, TarParser
from p2pgz.core.tarfields import clean_name
from p2pgz.errors import ImageInvalid

PLAIN_CHUNK_BYTES = 1 << 20
MAX_PLAIN_ENTRIES = 2_000_000
MAX_PLAIN_CHUNKS = 4_000_000  # a terabyte of hole would make a million
MAX_OTHER_BYTES = 4 << 30  # headers and padding of the largest layer we take, before compression
MAX_WARNING_COUNT = 256
_OTHER_LEVEL = 3
_PIECE_BYTES = 1 << 20
MAX_ID = (1 << 32) - 2  # -1 means "leave as is" to chown
MAX_DEVICE = (1 << 32) - 1
_SEGMENT_LABEL: Final = b"p2pgz plain segment 1\0"
_FILE: Final = struct.Struct(">I")  # chunks of a file
_CHUNK: Final = struct.Struct(">BQI32s")  # kind, offset in the stream, size, digest


class PlainIndex(msgspec.Struct, frozen=True):
    """The index of one plain layer. `toc.digest` is the diffID: the sha256 of the `stream_bytes` bytes of
    tar.
    """

    toc: Toc
    stream_bytes: int
    other: bytes
    """zstd: the stream's bytes that are in no chunk, in order"""
    chunk_bytes: int = PLAIN_CHUNK_BYTES


class PlainIndexer:
    """Feed it the tar stream; `finish` gives the index. Chunks of holes have no payload and are in the TOC
    only.
    """

    def __init__(self, *, chunk_bytes: int = PLAIN_CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._parser = TarParser()
        self._stream_hash = hashlib.sha256()
        self._stream_bytes = 0
        self._entries: list[Entry] = []
        self._chunk_count = 0
        self._header: Header | None = None
        self._chunks: list[Chunk] = []
        self._filled = 0  # bytes of the current file in `_chunks`
        self._parts: list[bytes] = []  # of the chunk that is being filled
        self._part_bytes = 0
        self._packer = zstandard.ZstdCompressor(level=_OTHER_LEVEL).compressobj()
        self._packed: list[bytes] = []
        self._other_bytes = 0
        self._position = 0
        self._warnings: list[str] = []

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """(digest, payload) of the chunks that these bytes complete, in the order of the stream."""
        self._stream_hash.update(data)
        self._stream_bytes += len(data)
        found: list[tuple[bytes, bytes]] = []
        for event in self._parser.feed(data):
            if isinstance(event, Header):
                self._other(event.raw)
                self._begin(event)
            elif isinstance(event, Payload):
                self._payload(event.data, found)
            elif isinstance(event, Other):
                self._other(event.data)
            elif isinstance(event, Hole):
                self._cut(found)
                self._hole(event.size)
            else:
                assert isinstance(event, EntryEnd)
                self._end(found)
        return found

    def finish(self) -> PlainIndex:
        """The stream ended; raises ImageInvalid when it is cut short."""
        self._parser.finish()
        self._packed.append(self._packer.flush())
        warnings = (self._parser.warnings + self._warnings)[:MAX_WARNING_COUNT]
        toc = Toc(Digest(self._stream_hash.digest()), self._entries, warnings=tuple(warnings))
        return PlainIndex(toc, self._stream_bytes, b"".join(self._packed), self._chunk_bytes)

    def _other(self, data: bytes) -> None:
        self._position += len(data)
        self._other_bytes += len(data)
        if self._other_bytes > MAX_OTHER_BYTES:
            raise ImageInvalid(f"tar stream: more than {MAX_OTHER_BYTES} bytes of headers and padding")
        packed = self._packer.compress(data)
        if packed:
            self._packed.append(packed)

    def _begin(self, header: Header) -> None:
        self._header = header
        self._chunks = []
        self._filled = 0
        if len(self._entries) >= MAX_PLAIN_ENTRIES:
            raise ImageInvalid(f"tar stream: more than {MAX_PLAIN_ENTRIES} entries")

    def _payload(self, data: bytes, found: list[tuple[bytes, bytes]]) -> None:
        at, size = 0, len(data)
        while at < size:
            taken = min(self._chunk_bytes - self._part_bytes, size - at)
            self._parts.append(data[at : at + taken] if taken < size else data)
            self._part_bytes += taken
            at += taken
            if self._part_bytes == self._chunk_bytes:
                self._cut(found)

    def _cut(self, found: list[tuple[bytes, bytes]]) -> None:
        """Make a chunk of what has gathered."""
        if not self._part_bytes:
            return
        payload = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        digest = hashlib.sha256(payload).digest()
        start = self._position
        self._position += len(payload)
        self._add(Chunk(digest, self._filled, len(payload), start, self._position, 0))
        self._parts = []
        self._part_bytes = 0
        found.append((digest, payload))

    def _add(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._filled += chunk.size
        self._chunk_count += 1
        if self._chunk_count > MAX_PLAIN_CHUNKS:
            raise ImageInvalid(
                f"tar stream: more than {MAX_PLAIN_CHUNKS} chunks of {self._chunk_bytes} bytes"
            )

    def _hole(self, size: int) -> None:
        if size > (MAX_PLAIN_CHUNKS - self._chunk_count) * self._chunk_bytes:
            raise ImageInvalid(f"tar stream: holes of more than {MAX_PLAIN_CHUNKS} chunks")
        while size:
            taken = min(size, self._chunk_bytes)
            self._add(
                Chunk(
                    zeros_digest(taken),
                    self._filled,
                    taken,
                    0,
                    0,
                    0,
                    ChunkKind.ZEROS,
                )
            )
            size -= taken

    def _end(self, found: list[tuple[bytes, bytes]]) -> None:
        self._cut(found)
        header = self._header
        assert header is not None
        try:
            entry = entry_of(header, tuple(self._chunks))
        except ValueError as error:
            raise ImageInvalid(f"tar stream: {header.name[:200]!r}: {error}") from None
        if entry is None:
            self._warnings.append(f"an entry was left out: {header.name[:200]!r}")
        else:
            self._entries.append(entry)


_zeros_digests: dict[int, bytes] = {}


def zeros_digest(size: int) -> bytes:
    """The digest of so many zero bytes; the few sizes of an image's holes are remembered."""
    digest = _zeros_digests.get(size)
    if digest is None:
        digest = hashlib.sha256(bytes(size)).digest()
        if len(_zeros_digests) < 1024:
            _zeros_digests[size] = digest
    return digest


def entry_of(header: Header, chunks: tuple[Chunk, ...]) -> Entry | None:
    """The entry that a tar header describes, None if it cannot be in a tree; raises ValueError with the
    reason.
    """
    name = clean_name(header.name)
    kind = header.kind
    if not name and kind != "dir":
        return None
    link = header.link
    if kind == "hardlink":
        link = clean_name(link)
        if not link or link == name:
            raise ValueError("a hard link to nothing or to itself")
    elif kind == "symlink" and not link:
        raise ValueError("a symlink without a target")
    if not 0 <= header.uid <= MAX_ID or not 0 <= header.gid <= MAX_ID:
        raise ValueError(f"an owner of {header.uid}:{header.gid}")
    if not 0 <= header.dev_major <= MAX_DEVICE or not 0 <= header.dev_minor <= MAX_DEVICE:
        raise ValueError("a device number beyond 32 bits")
    return Entry(
        name, kind, header.mode, header.uid, header.gid, header.size, header.mtime, header.mtime_nsec, link,
        header.dev_major, header.dev_minor, header.xattrs, chunks[0].digest if len(chunks) == 1 else b"", chunks,
    )  # fmt: skip


def rebuild(index: PlainIndex, read: Callable[[Chunk], bytes]) -> Iterator[bytes]:
    """Yield the tar stream, asking `read` for each chunk's payload in the order of the stream.

    The caller hashes what comes and compares it with the diffID it got from the image's config; `read` checks
    each chunk's digest. Raises ImageInvalid when the index does not describe a stream.
    """
    others = OtherBytes(index.other)
    at = 0
    for chunk in stored_chunks(index.toc):
        yield from others.take(chunk.offset - at)
        yield read(chunk)
        at = chunk.end
    yield from others.take(index.stream_bytes - at)
    others.finish()


def segment_toc(toc: Toc) -> Toc:
    """The TOC under the name of its segment: a hash over the diffID, and over where which chunk lies.

    The diffID alone would not do. Who has only somebody's word for an index would ask honest peers by (diffID,
    number) for the chunks of a lie, and blame them for what they give; and a segment made by a lie would stand
    where the true one belongs.
    """
    parts = [_SEGMENT_LABEL, toc.digest.raw]
    for entry in toc.entries:
        if entry.chunks:
            parts.append(_FILE.pack(len(entry.chunks)))
            parts += [_CHUNK.pack(c.kind, c.offset, c.size, c.digest) for c in entry.chunks]
    return msgspec.structs.replace(toc, digest=Digest.of(b"".join(parts)))


def stored_chunks(toc: Toc) -> list[Chunk]:
    """The chunks that the stream holds, in its order."""
    chunks = [chunk for entry in toc.entries for chunk in entry.chunks if chunk.kind is ChunkKind.DATA]
    chunks.sort(key=lambda chunk: chunk.offset)
    return chunks


class OtherBytes:
    """The stream's other bytes, decompressed as far as they are asked for."""

    def __init__(self, packed: bytes) -> None:
        self._reader = zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(packed)

    def take(self, size: int) -> Iterator[bytes]:
        """Yield the next `size` bytes; raises ImageInvalid."""
        while size:
            try:
                piece = self._reader.read(min(size, _PIECE_BYTES))
            except zstandard.ZstdError as error:
                raise ImageInvalid(f"index of a plain layer: its other bytes are damaged: {error}") from None
            if not piece:
                raise ImageInvalid("index of a plain layer: its other bytes are too few")
            size -= len(piece)
            yield piece

    def finish(self) -> None:
        """There must be no more of them; raises ImageInvalid."""
        if self._reader.read(1):
            raise ImageInvalid("index of a plain layer: its other bytes are too many")
