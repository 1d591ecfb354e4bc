"""Checks that a layer's TOC tells of its tar, and what the tar's diff id is.

For layers that containerd is to take on a snapshotter's word: a diff id alone does not do, since a TOC that lies outside the
tar (external, zstd:chunked) may show other files than the tar of the same diff id. Feed it the decompressed stream. The
entries must come in the same order, with the same attributes, and every chunk of the TOC must be what the tar has there.
"""

from __future__ import annotations

import hashlib
from typing import Final

from p2pgz.core.digest import Digest
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.ownindex import entry_of
from p2pgz.core.tar import EntryEnd, Header, Hole, Payload, TarParser
from p2pgz.core.toc_entries import NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_FILE_NAME
from p2pgz.errors import ImageInvalid

# what writers add for themselves, at the root: not part of the tree
OWN_FILES: Final = frozenset(
    name.encode() for name in (TOC_FILE_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)
)
# writers of eStargz round times to the nearest second
MTIME_OFF_SECONDS: Final = 1
_ZEROS: Final = bytes(1 << 20)


class TarCheck:
    """One layer; raises ImageInvalid where TOC and tar differ."""

    def __init__(self, toc: Toc) -> None:
        self._parser = TarParser()
        self._stream_hash = hashlib.sha256()
        self._expected = iter(toc.entries)
        self._chunks: list[Chunk] = []
        self._name = b""
        self._ours = True
        self._hash = hashlib.sha256()
        self._filled = 0

    def feed(self, data: bytes) -> None:
        """The next bytes of the tar."""
        self._stream_hash.update(data)
        for event in self._parser.feed(data):
            if isinstance(event, Header):
                self._begin(event)
            elif isinstance(event, Payload):
                self._content(event.data)
            elif isinstance(event, Hole):
                self._hole(event.size)
            elif isinstance(event, EntryEnd) and self._chunks:
                raise self._other("has more content in the TOC")

    def finish(self) -> Digest:
        """The stream ended: its diff id."""
        self._parser.finish()
        if (left := next(self._expected, None)) is not None:
            self._name = left.name
            raise self._other("is in the TOC alone")
        return Digest(self._stream_hash.digest())

    def _begin(self, header: Header) -> None:
        try:
            entry = entry_of(header, ())
        except ValueError as error:
            raise ImageInvalid(f"{header.name[:200]!r} in the layer's tar: {error}") from None
        self._chunks = []
        self._filled = 0
        self._ours = entry is None or entry.name in OWN_FILES
        if entry is None or self._ours:
            return
        self._name = entry.name
        expected = next(self._expected, None)
        if expected is None:
            raise self._other("is in the tar alone")
        if _facts(entry) != _facts(expected) or abs(entry.mtime - expected.mtime) > MTIME_OFF_SECONDS:
            raise self._other("is another one in the TOC")
        self._chunks = list(reversed(expected.chunks))

    def _content(self, data: bytes) -> None:
        if self._ours:
            return
        at = 0
        while at < len(data):
            if not self._chunks:
                raise self._other("has more content in the tar")
            chunk = self._chunks[-1]
            taken = min(chunk.size - self._filled, len(data) - at)
            self._hash.update(data[at : at + taken])
            self._filled += taken
            at += taken
            if self._filled == chunk.size:
                if self._hash.digest() != chunk.digest:
                    raise self._other("has other content in the TOC")
                self._chunks.pop()
                self._hash = hashlib.sha256()
                self._filled = 0

    def _hole(self, size: int) -> None:
        while size:
            taken = min(size, len(_ZEROS))
            self._content(_ZEROS[:taken])
            size -= taken

    def _other(self, what: str) -> ImageInvalid:
        return ImageInvalid(
            f"{self._name[:200]!r} of the layer {what}",
            hint="its table of contents does not tell of its tar: do not trust this image",
        )


def _facts(entry: Entry) -> tuple[object, ...]:
    """What must agree; of links and devices also what they lead to."""
    link = entry.link if entry.kind in ("symlink", "hardlink") else b""
    device = (entry.dev_major, entry.dev_minor) if entry.kind in ("char", "block") else None
    # what the header of a hard link says of its inode is ignored by everybody, and not in every TOC
    own = None if entry.kind == "hardlink" else (entry.mode, entry.uid, entry.gid, entry.xattrs)
    size = entry.size if entry.kind == "reg" else 0
    return entry.name, entry.kind, size, link, device, own
