"""Writing one layer: the tar stream entry by entry into members, then the TOC and the footer of eStargz.

`LayerWriter` knows what all formats share; `EstargzWriter` and `zstd_writer.ZstdChunkedWriter` how members
are compressed and how the blob ends. Called by `layer`. Boundaries are those of the reference writer: a
member begins at each chunk of a file and holds the headers that follow it; the TOC has its own member.
eStargz specification, "The structure".
"""

from __future__ import annotations

import hashlib
from typing import Literal

import deflate
import msgspec

from p2pgz.convert.packer import Compress, MemberPacker
from p2pgz.convert.tarheader import make_header, padding
from p2pgz.convert.tocwriter import Written, toc_json
from p2pgz.core.digest import Digest
from p2pgz.core.footer import make_estargz_footer
from p2pgz.core.ownindex import entry_of
from p2pgz.core.tar import Header
from p2pgz.core.tarfields import clean_name
from p2pgz.core.toc import (
    MAX_TOC_ENTRIES,
    NO_PREFETCH_LANDMARK,
    PREFETCH_LANDMARK,
    TOC_DIGEST_ANNOTATION,
    TOC_FILE_NAME,
    UNCOMPRESSED_SIZE_ANNOTATION,
)
from p2pgz.errors import ImageInvalid

DEFAULT_CHUNK_BYTES = 1 << 20
LANDMARK_CONTENT = b"\x0f"  # eStargz specification, "Prioritized Files and Landmark Files"
MAX_WARNINGS = 256
_ZEROS = bytes(1 << 20)
END_OF_ARCHIVE = bytes(1024)
_LANDMARKS = {PREFETCH_LANDMARK.encode(), NO_PREFETCH_LANDMARK.encode()}
_RESERVED = _LANDMARKS | {TOC_FILE_NAME.encode()}


class WrittenLayer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a layer."""

    digest: Digest
    size: int
    diff_id: Digest
    stream_bytes: int
    toc_digest: Digest
    annotations: dict[str, str]
    warnings: tuple[str, ...]
    absent: tuple[bytes, ...] = ()
    """prioritized paths that are not in this layer"""


def plain_header(name: bytes, size: int) -> Header:
    """The header of a file that the format adds; like the reference writer's, all but name and size is zero."""
    return Header(
        name=name, kind="reg", mode=0, uid=0, gid=0, size=size, mtime=0, mtime_nsec=0, link=b"", user=b"", group=b"",
        dev_major=0, dev_minor=0, xattrs={}, raw=b"", plain=False,
    )  # fmt: skip


def is_landmark(header: Header) -> bool:
    """Whether an entry has the name of a landmark."""
    return clean_name(header.name) in _LANDMARKS


class LayerWriter:
    """Takes entries in order (`begin`, then `data` and `zeros` until the size is reached, `end`), then
    `finish`.
    """

    def __init__(
        self, packer: MemberPacker, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, rewritten: bool = False
    ) -> None:
        self._packer = packer
        self._chunk_bytes = chunk_bytes
        self._rewritten = (
            rewritten  # the input was made by such a writer: its landmarks and TOC go without a word
        )
        self._reserves_names = True
        self._entries: list[Written] = []
        self._dropped: set[bytes] = set()
        self._current: Written | None = None
        self._left = 0  # bytes of the current file to come
        self._chunk_left = 0
        self._whole_hash: hashlib._Hash | None = None
        self.warnings: list[str] = []
        self.absent: list[bytes] = []

    def landmark(self, kind: Literal["prefetch", "no-prefetch"]) -> None:
        """Mark this place of the blob: what is before it is prefetched, or nothing is."""
        name = PREFETCH_LANDMARK if kind == "prefetch" else NO_PREFETCH_LANDMARK
        self._write(plain_header(name.encode(), len(LANDMARK_CONTENT)), name.encode())
        self.data(LANDMARK_CONTENT)
        self.end()

    def begin(self, header: Header) -> None:
        """The next entry; raises ImageInvalid when no file system could hold it."""
        name = clean_name(header.name)
        reserved = self._reserves_names and name in _RESERVED
        if reserved or (header.kind == "hardlink" and clean_name(header.link) in self._dropped):
            self._dropped.add(name)
            if not (self._rewritten and header.kind == "reg"):
                self.warn(
                    f"{header.name.decode(errors='replace')!r} was left out: the format reserves its name"
                )
            return
        try:
            keep = entry_of(header, ()) is not None
        except ValueError as error:
            raise ImageInvalid(f"layer: {header.name[:200]!r}: {error}") from None
        if not keep:
            self.warn(f"{header.name.decode(errors='replace')!r} was left out: it cannot be the root")
            return
        self._write(header, name)

    def _header_bytes(self, header: Header) -> bytes:
        """The headers of an entry as they are to stand in the stream."""
        return header.raw if header.plain else make_header(header)

    def _write(self, header: Header, name: bytes) -> bytes:
        """Begin an entry; gives its headers."""
        if len(self._entries) >= MAX_TOC_ENTRIES:
            raise ImageInvalid(f"layer: more than {MAX_TOC_ENTRIES} entries")
        raw = self._header_bytes(header)
        self._packer.add(raw)
        header.raw = b""
        self._current = Written(header, name, [])
        self._entries.append(self._current)
        self._left = header.size
        self._whole_hash = hashlib.sha256() if header.size > self._chunk_bytes else None
        self._chunk_left = 0
        return raw

    def data(self, data: bytes) -> None:
        """The next bytes of the current file."""
        if self._current is None:
            return
        at, size = 0, len(data)
        self._left -= size
        if self._whole_hash is not None:
            self._whole_hash.update(data)
        while at < size:
            if not self._chunk_left:
                self._current.places.append(self._packer.begin_chunk())
                self._chunk_left = self._chunk_bytes
            taken = min(self._chunk_left, size - at)
            self._packer.add_payload(data[at : at + taken] if taken < size else data)
            self._chunk_left -= taken
            at += taken

    def zeros(self, size: int) -> None:
        """A hole of the current file: it is written out, since no reader of these formats knows holes."""
        if self._current is None:
            return
        while size:
            taken = min(size, len(_ZEROS))
            self.data(_ZEROS[:taken])
            size -= taken

    def end(self) -> None:
        """The current entry is complete."""
        written, self._current = self._current, None
        if written is None:
            return
        assert self._left == 0
        size = written.header.size
        if size:
            if pad := padding(size):
                self._packer.add(_ZEROS[:pad])
            if self._whole_hash is not None:
                written.digest = self._whole_hash.digest()
        elif written.header.kind == "reg":
            written.digest = hashlib.sha256().digest()

    def warn(self, text: str) -> None:
        """A fact that a person should see."""
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _complete_digests(self) -> None:
        """Know every file's digest; `flush` of the packer comes first."""
        unclear = 0
        for written in self._entries:
            if not written.digest and written.places:
                written.digest = written.places[0].digest
            unclear += not is_text(written.header.name) or not is_text(written.header.link)
        if unclear:
            self.warn(
                f"{unclear} names are not UTF-8; readers of the TOC show replacement characters in them"
            )

    def _toc_json(self) -> bytes:
        """The TOC of all that was written, in eStargz's schema; `flush` of the packer comes first."""
        self._complete_digests()
        return toc_json(self._entries, chunk_bytes=self._chunk_bytes)

    def finish(self) -> WrittenLayer:
        """Write TOC and footer."""
        raise NotImplementedError

    def _result(self, toc: bytes, annotations: dict[str, str]) -> WrittenLayer:
        size = {UNCOMPRESSED_SIZE_ANNOTATION: str(self._packer.stream_bytes)}
        return WrittenLayer(
            digest=Digest(self._packer.blob_digest), size=self._packer.blob_bytes,
            diff_id=Digest(self._packer.stream_digest), stream_bytes=self._packer.stream_bytes,
            toc_digest=Digest.of(toc), annotations=size | annotations,
            warnings=tuple(self.warnings),
            absent=tuple(self.absent),
        )  # fmt: skip


def is_text(name: bytes) -> bool:
    """Whether a name is UTF-8."""
    if name.isascii():
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


class EstargzWriter(LayerWriter):
    """eStargz: gzip members, the TOC as the last file of the archive, a footer of 51 bytes."""

    def finish(self) -> WrittenLayer:
        toc_offset = self._packer.flush()
        toc = self._toc_json()
        self._packer.add(make_header(plain_header(TOC_FILE_NAME.encode(), len(toc))))
        self._packer.add(toc)
        self._packer.add(_ZEROS[: padding(len(toc))])
        self._packer.add(END_OF_ARCHIVE)
        self._packer.flush()
        self._packer.write_raw(make_estargz_footer(toc_offset))
        return self._result(toc, {TOC_DIGEST_ANNOTATION: str(Digest.of(toc))})


def gzip_compressor(level: int) -> Compress:
    """One gzip member at a libdeflate level (1..12), with no time or name in its header."""

    def compress(member: bytes) -> bytes | bytearray:
        return deflate.gzip_compress(member, level)

    return compress
