"""From the JSON of a TOC to the checked entries of a layer (`parse_toc`).

Called by `core.tail` and `convert`. Every rule that can be decided without a payload byte is decided here,
with one error, so that nothing above has to distrust a `Toc`: chunks cover their file without gap or overlap
and lie inside the blob, every byte has a digest, names stay below the root, links do not run in circles.
Rules of the format: eStargz specification, "TOC". No input may cost more than time and memory in proportion
to its size.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Final

from p2pgz.core.digest import Digest
from p2pgz.core.footer import FooterKind
from p2pgz.core.model import MAX_CHUNK_BYTES, Chunk, ChunkKind, Entry, Piece, Toc
from p2pgz.core.toc_fields import clean_name, parse_sha256, parse_time, parse_xattrs, shown, symlink_target
from p2pgz.core.toc_schema import MAX_TOC_ENTRIES, RawEntry, decode_toc
from p2pgz.errors import ImageInvalid

TOC_FILE_NAME: Final = "stargz.index.json"
PREFETCH_LANDMARK: Final = ".prefetch.landmark"
NO_PREFETCH_LANDMARK: Final = ".no.prefetch.landmark"
# To reach a payload, everything before it in its member is inflated. Writers end a member after some MiB;
# this only keeps a hostile TOC from making us inflate without end.
MAX_INNER_BYTES: Final = 256 << 20
# A hole of a sparse file is one chunk whatever its size. We cut it, since chunks are held in memory.
MAX_ZEROS_CHUNK_BYTES: Final = 4 << 20
# All files of a layer together: half of what ext4 allows one sparse file, and a segment is one
MAX_LAYER_BYTES: Final = 8 << 40

_LANDMARKS = frozenset((PREFETCH_LANDMARK.encode(), NO_PREFETCH_LANDMARK.encode()))
_HIDDEN = _LANDMARKS | {TOC_FILE_NAME.encode()}
_KINDS = frozenset(("dir", "reg", "symlink", "hardlink", "char", "block", "fifo"))
_NO_XATTRS: dict[bytes, bytes] = {}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def parse_toc(toc_json: bytes, *, kind: FooterKind, payload_end: int, blob_size: int) -> Toc:
    """Parse and check a TOC; raises ImageInvalid, naming the entry, for whatever breaks the format or a
    limit.

    `kind` is the footer's; `payload_end` is where file content ends in the blob of `blob_size` bytes that the
    TOC describes.
    """
    raw_entries = decode_toc(toc_json)
    ends = _member_ends(raw_entries, min(payload_end, blob_size))
    hides_reserved = not _written_by_containers(raw_entries, kind)
    builder = _Builder(ends)
    entries: list[Entry] = []
    prefetch_end = 0
    at, count = 0, len(raw_entries)
    while at < count:
        raw = raw_entries[at]
        first = at = at + 1
        if raw.type == "reg":
            while at < count and raw_entries[at].type == "chunk":
                at += 1
        entry = builder.build(raw, raw_entries[first:at])
        if hides_reserved and entry.name in _HIDDEN:
            if entry.name in _LANDMARKS and entry.kind != "reg":
                raise ImageInvalid(f"TOC: the landmark {shown(raw.name)} is a {entry.kind}, not a file")
            if entry.name == PREFETCH_LANDMARK.encode() and entry.size:
                prefetch_end = raw.offset
            continue
        entries.append(entry)
    _check_hard_links(entries)
    return Toc(Digest.of(toc_json), entries, prefetch_end, _warnings(entries))


def _member_ends(raw_entries: list[RawEntry], payload_end: int) -> dict[int, int]:
    """Where the bytes to fetch end for each offset: at the next distinct one.

    Offsets are sorted here because TOC order need not be blob order. Those of entries without content are
    noise.
    """
    offsets = sorted(
        {raw.offset for raw in raw_entries if (raw.size and raw.type == "reg") or raw.type == "chunk"}
    )
    if not offsets:
        return {}
    # offset 0 is the first tar header, never content
    if offsets[0] <= 0 or offsets[-1] >= payload_end:
        wrong = offsets[0] if offsets[0] <= 0 else offsets[-1]
        name = next(raw.name for raw in raw_entries if raw.offset == wrong and raw.type in ("reg", "chunk"))
        raise ImageInvalid(
            f"TOC: content of {shown(name)} at {wrong} is outside the blob's payload, 1 to {payload_end}"
        )
    return dict(zip(offsets, [*offsets[1:], payload_end], strict=True))


def _written_by_containers(raw_entries: list[RawEntry], kind: FooterKind) -> bool:
    """Whether root files with eStargz's reserved names are the user's own.

    They are for containers' writers. An old one of theirs has the other writer's footer, but only theirs
    notes an endOffset for every file.
    """
    if kind != "zstd-sgz":
        return kind == "zstd-containers"
    return all(raw.end_offset for raw in raw_entries if raw.size and raw.type == "reg")


class _Builder:
    """Makes entries of raw ones; remembers what repeats and what adds up over the layer."""

    def __init__(self, ends: dict[int, int]) -> None:
        self._ends = ends
        self._times: dict[str, tuple[int, int]] = {}
        self._bytes = 0
        self._chunks = 0

    def build(self, raw: RawEntry, more: list[RawEntry]) -> Entry:
        """The entry of `raw`, whose further chunks are `more`."""
        kind = raw.type
        if kind not in _KINDS:
            if kind == "chunk":
                raise ImageInvalid(f"TOC: a chunk that belongs to no file (name {shown(raw.name)})")
            raise ImageInvalid(f"TOC: {shown(raw.name)} is of unknown type {shown(kind)}")
        name = clean_name(raw.name)
        if not name and kind != "dir":
            raise ImageInvalid(f"TOC: {shown(raw.name)}, a {kind}, cannot be the root")
        moment = self._times.get(raw.modtime)
        if moment is None:
            moment = self._times[raw.modtime] = parse_time(raw.modtime)
        size = 0
        link = digest = b""
        chunks: tuple[Chunk, ...] = ()
        if kind == "reg":
            size = raw.size
            if raw.digest:
                digest = parse_sha256(raw.digest, "digest", raw.name)
            if size:
                chunks = self._file(raw, more, digest)
            elif more:
                raise ImageInvalid(f"TOC: {shown(raw.name)} is empty but has a chunk")
        elif kind == "symlink":
            link = symlink_target(raw.link_name, raw.name)
        elif kind == "hardlink":
            link = clean_name(raw.link_name)
            if not link or link == name:
                raise ImageInvalid(
                    f"TOC: hard link {shown(raw.name)} to {shown(raw.link_name)} is impossible"
                )
        device = kind in ("char", "block")
        return Entry(
            name,
            kind,
            raw.mode & 0o7777,
            raw.uid,
            raw.gid,
            size,
            moment[0],
            moment[1],
            link,
            raw.dev_major if device else 0,
            raw.dev_minor if device else 0,
            parse_xattrs(raw.xattrs, raw.name) if raw.xattrs else _NO_XATTRS,
            digest,
            chunks,
        )

    def _file(self, raw: RawEntry, more: list[RawEntry], digest: bytes) -> tuple[Chunk, ...]:
        self._bytes += raw.size
        if self._bytes > MAX_LAYER_BYTES:
            raise ImageInvalid(f"TOC: the files are larger than {MAX_LAYER_BYTES} bytes together")
        if more:
            return self._chunk_list(raw, more, digest)
        if raw.chunk_offset or raw.chunk_size not in (0, raw.size):
            raise ImageInvalid(f"TOC: the only chunk of {shown(raw.name)} does not cover it")
        if raw.chunk_digest and raw.chunk_digest != raw.digest:
            digest = parse_sha256(raw.chunk_digest, "chunkDigest", raw.name)
        elif not digest:
            raise ImageInvalid(f"TOC: {shown(raw.name)} has no digest, its content could not be verified")
        return self._chunk(raw, raw, digest, 0, raw.size)

    def _chunk_list(self, raw: RawEntry, more: list[RawEntry], digest: bytes) -> tuple[Chunk, ...]:
        parts = [raw, *more]
        sizes: list[int] = []
        at = 0
        for part in parts:
            if part.name not in ("", raw.name) and clean_name(part.name) != clean_name(raw.name):
                raise ImageInvalid(
                    f"TOC: a chunk of {shown(part.name)} stands among those of {shown(raw.name)}"
                )
            left = raw.size - at
            size = part.chunk_size or raw.size - part.chunk_offset
            if part.chunk_offset != at or not 0 < size <= left:
                raise ImageInvalid(
                    f"TOC: chunk {len(sizes)} of {shown(raw.name)} has {size} bytes at {part.chunk_offset},"
                    f" but {left} of the file are left at {at}"
                )
            sizes.append(size)
            at += size
        if at != raw.size:
            raise ImageInvalid(f"TOC: the chunks of {shown(raw.name)} end at {at} of {raw.size} bytes")
        if not any(part.chunk_digest for part in parts):
            return self._whole(raw, parts, sizes, digest)
        chunks: list[Chunk] = []
        at = 0
        for part, size in zip(parts, sizes, strict=True):
            chunk_digest = parse_sha256(part.chunk_digest, "chunkDigest", raw.name)
            chunks += self._chunk(raw, part, chunk_digest, at, size)
            at += size
        return tuple(chunks)

    def _whole(
        self, raw: RawEntry, parts: list[RawEntry], sizes: list[int], digest: bytes
    ) -> tuple[Chunk, ...]:
        """The one chunk of a legacy file of several parts, which only its file digest can verify."""
        if not digest:
            raise ImageInvalid(f"TOC: {shown(raw.name)} has no digest, its content could not be verified")
        if raw.size > MAX_CHUNK_BYTES:
            raise ImageInvalid(
                f"TOC: {shown(raw.name)} of {raw.size} bytes has no digests of its chunks",
                hint=f"files above {MAX_CHUNK_BYTES} bytes need them; convert the image to eStargz",
            )
        pieces: list[Piece] = []
        for part, size in zip(parts, sizes, strict=True):
            if pieces and part.offset != pieces[-1].end:
                raise ImageInvalid(f"TOC: the parts of {shown(raw.name)} are apart in the blob")
            self._check_place(raw, part)
            pieces.append(Piece(part.offset, self._ends[part.offset], part.inner_offset, size))
        head = pieces[0]
        return (
            Chunk(
                digest,
                0,
                raw.size,
                head.offset,
                head.end,
                head.inner,
                ChunkKind.DATA,
                tuple(pieces[1:]),
            ),
        )

    def _chunk(self, raw: RawEntry, part: RawEntry, digest: bytes, at: int, size: int) -> tuple[Chunk, ...]:
        """The chunk that `part` describes; a large hole becomes several."""
        offset = part.offset
        if part.chunk_type or part.inner_offset:
            self._check_place(raw, part)
            if part.chunk_type:
                return self._zeros(raw, digest, at, size, offset)
        if size > MAX_CHUNK_BYTES:
            raise ImageInvalid(
                f"TOC: a chunk of {shown(raw.name)} has {size} bytes, more than {MAX_CHUNK_BYTES}"
            )
        return (Chunk(digest, at, size, offset, self._ends[offset], part.inner_offset),)

    def _check_place(self, raw: RawEntry, part: RawEntry) -> None:
        if part.inner_offset > MAX_INNER_BYTES:
            raise ImageInvalid(f"TOC: innerOffset {part.inner_offset} of {shown(raw.name)} is beyond reason")
        if part.chunk_type not in ("", "zeros"):
            raise ImageInvalid(f"TOC: {shown(raw.name)} has a chunk of unknown type {shown(part.chunk_type)}")

    def _zeros(self, raw: RawEntry, digest: bytes, at: int, size: int, offset: int) -> tuple[Chunk, ...]:
        end = self._ends[offset]
        if size <= MAX_ZEROS_CHUNK_BYTES:
            return (Chunk(digest, at, size, offset, end, 0, ChunkKind.ZEROS),)
        self._chunks += size // MAX_ZEROS_CHUNK_BYTES
        if self._chunks > MAX_TOC_ENTRIES:
            raise ImageInvalid(f"TOC: the hole of {size} bytes in {shown(raw.name)} is too large")
        chunks: list[Chunk] = []
        # Powers of two, so that few lengths of zeros are ever hashed, however many holes there are
        length = MAX_ZEROS_CHUNK_BYTES
        while size:
            while length > size:
                length >>= 1
            chunks.append(Chunk(_zeros_digest(length), at, length, offset, end, 0, ChunkKind.ZEROS))
            at += length
            size -= length
        return tuple(chunks)


@cache
def _zeros_digest(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


def _check_hard_links(entries: list[Entry]) -> None:
    """Refuse circles and links to directories. A target that is not in this layer may be in one below:
    merging decides."""
    if not any(entry.kind == "hardlink" for entry in entries):
        return
    final = {entry.name: entry for entry in entries}
    settled: set[bytes] = set()
    for entry in final.values():
        trail: set[bytes] = set()
        at: Entry | None = entry
        while at is not None and at.kind == "hardlink" and at.name not in settled:
            if at.name in trail:
                raise ImageInvalid(f"TOC: hard link {_text(entry.name)} leads back to itself")
            trail.add(at.name)
            at = final.get(at.link)
        if trail and at is not None and at.kind == "dir":
            raise ImageInvalid(f"TOC: hard link {_text(entry.name)} leads to a directory")
        settled |= trail


def _warnings(entries: list[Entry]) -> tuple[str, ...]:
    lossy = [entry.name for entry in entries if _REPLACEMENT in entry.name or _REPLACEMENT in entry.link]
    if not lossy:
        return ()
    return (
        f"{len(lossy)} names hold U+FFFD, which TOC writers put in place of bytes that are not UTF-8, so they may not be"
        f" what the image's author wrote: {_text(lossy[0])}",
    )


def _text(name: bytes) -> str:
    return shown(name.decode(errors="replace"))
