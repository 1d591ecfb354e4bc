"""zstd:chunked as podman reads it in parts: containers' schema of the TOC, tar-split, a footer of 64 bytes.

Called by `layer`. podman takes a layer in parts only when TOC and tar-split say the same of every entry, field by field
as Go's archive/tar reads the headers, and each path comes once. So headers that Go would read otherwise than the TOC can
say are made anew; and where a layer cannot be told so at all, tar-split is left out, with which podman pulls that layer
whole instead of failing. This writer must never set stargz-snapshotter's annotations: podman refuses a layer with both.
containers/storage, `pkg/chunked`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from p2pgz.convert.packer import MemberPacker, Place
from p2pgz.convert.tarheader import make_header, padding
from p2pgz.convert.tarsplit import TarSplit, crc64
from p2pgz.convert.tocwriter import FIRST_SECOND, LAST_SECOND, Written, settle, toc_moment, toc_text
from p2pgz.convert.writer import DEFAULT_CHUNK_BYTES, END_OF_ARCHIVE, LayerWriter, WrittenLayer, is_text
from p2pgz.core.digest import Digest
from p2pgz.core.footer import SKIPPABLE_HEADER_BYTES, make_skippable_frame, make_zstd_containers_footer
from p2pgz.core.tar import Header
from p2pgz.core.tarfields import BLOCK_BYTES, clean_name, number
from p2pgz.core.toc import (
    CONTAINERS_CHECKSUM_ANNOTATION,
    CONTAINERS_POSITION_ANNOTATION,
    TAR_SPLIT_POSITION_ANNOTATION,
)

_MANIFEST_TYPE = 1  # the only schema of TOCs
_VERSION = 1
_TAR_SPLIT_LEVEL = 3


class ContainersEntry(msgspec.Struct, omit_defaults=True, gc=False, rename="camel"):
    """One element of the TOC; a file of one chunk has its digest only as a file."""

    type: str
    name: str
    link_name: str = ""
    mode: int = 0
    size: int = 0
    uid: int = 0
    gid: int = 0
    modtime: str = ""
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes] = {}
    digest: str = ""
    offset: int = 0
    end_offset: int = 0
    chunk_size: int = 0
    chunk_offset: int = 0
    chunk_digest: str = ""


class _Toc(msgspec.Struct, omit_defaults=True):
    version: int
    entries: list[ContainersEntry]
    tar_split_digest: str = msgspec.field(default="", name="tarSplitDigest")


class ContainersWriter(LayerWriter):
    """The stream ends as a tar does; TOC, tar-split and footer are no part of it."""

    def __init__(
        self, packer: MemberPacker, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, rewritten: bool = False
    ) -> None:
        super().__init__(packer, chunk_bytes=chunk_bytes, rewritten=rewritten)
        # Readers of this dialect know no reserved names: these are the user's files, unless the input is lazily readable
        self._reserves_names = rewritten
        self._split: TarSplit | None = TarSplit(_TAR_SPLIT_LEVEL)
        self._pad = b""  # of the entry before, which goes with the next headers
        self._crc = 0
        self._paths: dict[bytes, bool] = {}  # whether a hard link to it can be made: podman makes no devices

    def landmark(self, kind: Literal["prefetch", "no-prefetch"]) -> None:
        """None: podman would show it as a file, and no reader of this dialect looks for it."""

    def _header_bytes(self, header: Header) -> bytes:
        return header.raw if header.plain and _reads_alike(header) else make_header(header)

    def _write(self, header: Header, name: bytes) -> bytes:
        if self._split is not None:
            lost = self._untellable(header, name)
            if lost:
                self._split = None
                self._paths.clear()
                self.warn(f"podman will pull this layer whole: {lost}")
            else:
                self._paths[name] = header.kind in ("reg", "symlink", "hardlink")
        raw = super()._write(header, name)
        if self._split is not None:
            self._split.segment(self._pad + raw)
        self._pad = bytes(padding(header.size))
        self._crc = 0
        return raw

    def data(self, data: bytes) -> None:
        """The next bytes of the current file."""
        if self._current is not None and self._split is not None:
            self._crc = crc64(data, self._crc)
        super().data(data)

    def end(self) -> None:
        """The current entry is complete."""
        if self._current is not None and self._split is not None:
            header = self._current.header
            self._split.file(header.name.decode(), header.size, self._crc)
        super().end()

    def _untellable(self, header: Header, name: bytes) -> str:
        """Why TOC and tar-split cannot say the same of an entry; empty when they can."""
        shown = repr(header.name[:200].decode(errors="replace"))
        if not (is_text(header.name) and is_text(header.link) and all(map(is_text, header.xattrs))):
            return f"the name {shown} is not UTF-8"
        if name in self._paths:
            return f"{shown} comes twice in it"
        if header.kind == "hardlink" and not self._paths.get(clean_name(header.link)):
            return f"{shown} is a hard link to what is no file before it in the layer"
        if any(b"=" in key or b"\0" in key for key in header.xattrs):
            return f"{shown} has an attribute whose name Go's tar reader refuses"
        if not FIRST_SECOND <= header.mtime <= LAST_SECOND:
            return f"{shown} has a time that the table of contents cannot hold"
        return ""

    def finish(self) -> WrittenLayer:
        """Write TOC, tar-split and footer."""
        self._packer.add(END_OF_ARCHIVE)
        toc_offset = self._packer.flush() + SKIPPABLE_HEADER_BYTES
        self._complete_digests()
        names = settle(self._entries)
        if self._split is not None and any(name is None for name, _ in names):
            self._split = None
            self.warn("podman will pull this layer whole: a directory in it is written over by a file")
        packed_split, split_digest, split_bytes = b"", "", 0
        if self._split is not None:
            self._split.segment(self._pad + END_OF_ARCHIVE)
            packed_split, digest = self._split.finish()
            split_digest, split_bytes = str(digest), self._split.raw_bytes
        toc = msgspec.json.encode(_Toc(_VERSION, self._listed(names), split_digest))
        packed = bytes(self._packer.compress(toc))
        self._packer.write_raw(make_skippable_frame(packed))
        annotations = {
            CONTAINERS_CHECKSUM_ANNOTATION: str(Digest.of(packed)),
            CONTAINERS_POSITION_ANNOTATION: f"{toc_offset}:{len(packed)}:{len(toc)}:{_MANIFEST_TYPE}",
        }
        split_offset = 0
        if self._split is not None:
            split_offset = self._packer.blob_bytes + SKIPPABLE_HEADER_BYTES
            self._packer.write_raw(make_skippable_frame(packed_split))
            annotations[TAR_SPLIT_POSITION_ANNOTATION] = f"{split_offset}:{len(packed_split)}:{split_bytes}"
        footer = make_zstd_containers_footer(
            toc_offset, len(packed), len(toc),
            tar_split_offset=split_offset, tar_split_compressed_bytes=len(packed_split), tar_split_raw_bytes=split_bytes,
        )  # fmt: skip
        self._packer.write_raw(make_skippable_frame(footer))
        return self._result(toc, annotations)

    def _listed(self, names: list[tuple[bytes | None, bytes]]) -> list[ContainersEntry]:
        listed: list[ContainersEntry] = []
        for written, (name, link) in zip(self._entries, names, strict=True):
            if name is not None:
                listed.append(_entry(written, name, link))
                if len(written.places) > 1:
                    _add_chunks(listed, written.places, written.header.size, self._chunk_bytes)
        return listed


def _entry(written: Written, name: bytes, link: bytes) -> ContainersEntry:
    header = written.header
    entry = ContainersEntry(
        type=header.kind, name=toc_text(name), link_name=toc_text(link), mode=header.mode, size=header.size,
        uid=header.uid, gid=header.gid, modtime=toc_moment(header.mtime, header.mtime_nsec),
        dev_major=header.dev_major, dev_minor=header.dev_minor,
    )  # fmt: skip
    if header.xattrs:
        entry.xattrs = {toc_text(key): value for key, value in sorted(header.xattrs.items())}
    if header.kind == "reg":
        entry.digest = f"sha256:{written.digest.hex()}"
    if written.places:
        entry.offset, entry.end_offset = written.places[0].offset, written.places[-1].end
    return entry


def _add_chunks(listed: list[ContainersEntry], places: list[Place], size: int, chunk_bytes: int) -> None:
    """Make the file that was listed last one of several chunks."""
    part = listed[-1]
    name = part.name
    for index, place in enumerate(places):
        if index:
            part = ContainersEntry(
                type="chunk", name=name, chunk_offset=index * chunk_bytes, offset=place.offset
            )
            listed.append(part)
        part.chunk_size = min(chunk_bytes, size - index * chunk_bytes)
        part.chunk_digest = f"sha256:{place.digest.hex()}"
    # podman takes the end of a file's bytes from its last chunk
    part.end_offset = places[-1].end


_REST = slice(500, BLOCK_BYTES)
_MODE = slice(100, 108)
_LINK_AT, _FLAG_AT = 157, 156
_MAGIC = slice(257, 265)
_DEVICE = slice(329, 345)


def _reads_alike(header: Header) -> bool:
    """Whether Go's archive/tar takes from the raw header what `header` says, and nothing more.

    One block of POSIX's ustar with nothing in the fields that do not matter for its type. Go fills these in, and reads times
    of access and change from extended and GNU headers.
    """
    block = header.raw
    return (
        len(block) == BLOCK_BYTES
        and block[_MAGIC] == b"ustar\x0000"
        and not block[_REST].strip(b"\0")
        and block[_FLAG_AT] != 0
        and (header.kind in ("symlink", "hardlink") or not block[_LINK_AT])
        and (header.kind in ("char", "block") or not block[_DEVICE].strip(b"0 \0"))
        and number(block[_MODE]) == header.mode
    )
