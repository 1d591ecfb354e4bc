"""The file that carries an image to where no registry and no peer is: `p2pgz export` writes it, `p2pgz import` reads it.

A tar archive, compressed with zstd, of three kinds of entries in this order: the head (`p2pgz-export.json`), documents
(`documents/sha256/HEX`: indexes, manifest, config, TOCs), chunks (`chunks/sha256/HEX`). All but the head is named by its
digest, and the head's counts tell a file that was cut short. Sans-io: the writer gives bytes, the reader takes them in
pieces of any size. The reader believes nothing: it raises ExportInvalid, and holds one entry in memory at a time. Called by
`image.exporting`, `image.importing` and, to look before anything is sent, by the command line.
docs/reference/export-format.md
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Final

import msgspec
import zstandard

from p2pgz.core.decompress import Decompressor
from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.messages import DOCUMENT_MAX_BYTES
from p2pgz.core.model import MAX_CHUNK_BYTES
from p2pgz.core.tar import EntryEnd, Event, Header, Payload, TarParser
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ExportInvalid, P2pgzError

VERSION: Final = 1
HEAD_NAME: Final = "p2pgz-export.json"
DOCUMENTS: Final = "documents/sha256/"
CHUNKS: Final = "chunks/sha256/"
# One image: 1 000 plain layers are 150 KB
HEAD_MAX_BYTES: Final = 1 << 20
# All documents are held until the last of them is here: a TOC of 300 000 entries has 109 MB
DOCUMENTS_MAX: Final = 4096
DOCUMENTS_MAX_BYTES: Final = 2 * DOCUMENT_MAX_BYTES
LEVEL: Final = 3
_BLOCK_BYTES: Final = 512
_END_OF_ARCHIVE: Final = bytes(2 * _BLOCK_BYTES)
_HINT: Final = "it was cut short or changed on its way: copy it again, or export again"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the file. All digests as texts; fields may be added."""

    version: int = VERSION
    reference: str
    """what the image is called on the other side"""
    platform: str
    manifest: str
    indexes: list[str] = []
    """of the indexes that led to the manifest"""
    plain: dict[str, str] = {}
    """layer that nobody converted → document that says what is in it"""
    documents: int
    chunks: int
    chunk_bytes: int
    left_out_chunks: int = 0
    """of the image, but said to be on the other side"""


class Document(msgspec.Struct, frozen=True):
    """A manifest, index, config or TOC, checked."""

    digest: Digest
    data: bytes


Part = Head | Document | VerifiedChunk


class ExportWriter:
    """Gives the bytes of a file: `head`, then `document` as often as announced, then `chunk`, then `end`."""

    def __init__(self) -> None:
        self._packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()

    def head(self, head: Head) -> bytes:
        """The beginning."""
        return self._entry(HEAD_NAME, msgspec.json.format(msgspec.json.encode(head), indent=2))

    def document(self, digest: Digest, data: bytes) -> bytes:
        """A document, whose digest the caller has checked."""
        return self._entry(DOCUMENTS + digest.hex, data)

    def chunk(self, chunk: VerifiedChunk) -> bytes:
        """A chunk."""
        return self._entry(CHUNKS + chunk.digest.hex(), bytes(chunk.data))

    def end(self) -> bytes:
        """The last bytes."""
        return self._packer.compress(_END_OF_ARCHIVE) + self._packer.flush()

    def _entry(self, name: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        padding = bytes(-len(data) % _BLOCK_BYTES)
        return self._packer.compress(info.tobuf(format=tarfile.USTAR_FORMAT) + data + padding)


class ExportReader:
    """Feed it a file in pieces of any size, take what it yields, and call `finish` at the end. `name` is for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._unpacker = Decompressor()
        self._tar = TarParser()
        self._entry: Header | None = None
        self._data = bytearray()
        self.head: Head | None = None
        self.documents = 0
        self.documents_bytes = 0
        self.chunks = 0
        self.chunk_bytes = 0

    def feed(self, data: bytes) -> Iterator[Part]:
        """What these bytes complete; raises ExportInvalid, after which the reader must not be used."""
        try:
            for piece in self._unpacker.feed(data):
                for event in self._tar.feed(piece):
                    yield from self._take(event)
        except ExportInvalid:
            raise
        except P2pgzError as error:
            raise self._bad(error.what) from error

    def finish(self) -> None:
        """The file ended; raises ExportInvalid unless all that its head announces has come."""
        try:
            for piece in self._unpacker.finish():  # fewer bytes than any archive has
                self._tar.feed(piece)
            self._tar.finish()
        except P2pgzError as error:
            raise self._bad(error.what) from error
        head = self.head
        if head is None:
            raise self._bad("it is empty")
        announced = (head.documents, head.chunks, head.chunk_bytes)
        if announced != (self.documents, self.chunks, self.chunk_bytes):
            raise self._bad(
                f"{self.documents} of {head.documents} documents, {self.chunks} of {head.chunks} chunks and "
                f"{self.chunk_bytes} of {head.chunk_bytes} bytes are in it"
            )

    def _bad(self, what: str) -> ExportInvalid:
        return ExportInvalid(f"{self._name}: {what}", hint=_HINT)

    def _take(self, event: Event) -> Iterator[Part]:
        if isinstance(event, Header):
            self._begin(event)
        elif isinstance(event, Payload):
            self._data += event.data
        elif isinstance(event, EntryEnd):
            data = bytes(self._data)
            self._data.clear()
            yield self._complete(data)

    def _begin(self, entry: Header) -> None:
        """Refuse what does not belong here before a byte of it is held."""
        name = entry.name.decode("ascii", "replace")
        if entry.kind != "reg" or not entry.plain or entry.xattrs:
            raise self._bad(f"{name!r} is no plain file")
        head = self.head
        if head is None:
            if name != HEAD_NAME:
                raise ExportInvalid(
                    f"{self._name}: not an export of p2pgz", hint="`p2pgz export` makes such a file"
                )
            most = HEAD_MAX_BYTES
        elif name.startswith(DOCUMENTS) and not self.chunks:
            most = min(DOCUMENT_MAX_BYTES, DOCUMENTS_MAX_BYTES - self.documents_bytes)
            if self.documents >= head.documents:
                raise self._bad(f"more than {head.documents} documents")
        elif name.startswith(CHUNKS) and self.documents == head.documents:
            most = MAX_CHUNK_BYTES
            if self.chunks >= head.chunks:
                raise self._bad(f"more than {head.chunks} chunks")
        else:
            raise self._bad(f"{name!r} does not belong there")
        if entry.size > most:
            raise self._bad(f"{name!r} has {entry.size} bytes, more than {most}")
        self._entry = entry

    def _complete(self, data: bytes) -> Part:
        assert self._entry is not None
        name = self._entry.name.decode("ascii", "replace")
        if name == HEAD_NAME:
            self.head = self._parse_head(data)
            return self.head
        folder, _, text = name.rpartition("/")
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if len(raw) != SHA256_BYTES or raw.hex() != text:
            raise self._bad(f"{name!r} does not belong there")
        if folder + "/" == CHUNKS:
            self.chunks += 1
            self.chunk_bytes += len(data)
            try:
                return verify(raw, data, source=self._name)
            except ChunkCorrupt as error:
                raise ExportInvalid(error.what, hint=_HINT) from None
        if hashlib.sha256(data).digest() != raw:
            raise self._bad(f"document {Digest(raw)} has other bytes")
        self.documents += 1
        self.documents_bytes += len(data)
        return Document(Digest(raw), data)

    def _parse_head(self, data: bytes) -> Head:
        try:
            head = msgspec.json.decode(data, type=Head)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._bad(f"its head cannot be read: {error}") from None
        if head.version != VERSION:
            raise ExportInvalid(
                f"{self._name}: an export of version {head.version}, this p2pgz reads {VERSION}",
                hint="use the same version of p2pgz on both sides",
            )
        if min(head.documents, head.chunks, head.chunk_bytes) < 0 or head.documents > DOCUMENTS_MAX:
            raise self._bad("its head announces what cannot be")
        for text in [head.manifest, *head.indexes, *head.plain, *head.plain.values()]:
            Digest.parse(text, where=f"{self._name}: {HEAD_NAME}")
        return head
