"""Converting one layer: a blob in, a lazily readable blob out. Synchronous, for a worker thread; called by
`convert`.

Without a list of prioritized files the layer is written as it is read. With one, the payload rests in a
scratch file until the order is known: entries on the list come first, with the directories above them and the
targets of hard links, then the landmark, then the rest in their own order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from p2pgz.convert.containers_writer import ContainersWriter
from p2pgz.convert.packer import MemberPacker
from p2pgz.convert.writer import (
    DEFAULT_CHUNK_BYTES,
    EstargzWriter,
    LayerWriter,
    WrittenLayer,
    gzip_compressor,
    is_landmark,
)
from p2pgz.convert.zstd_writer import StargzZstdWriter, zstd_compressor
from p2pgz.core.decompress import Decompressor
from p2pgz.core.tar import EntryEnd, Event, Header, Hole, Payload, TarParser
from p2pgz.core.tarfields import clean_name
from p2pgz.core.toc import PREFETCH_LANDMARK
from p2pgz.errors import ConfigError, ImageInvalid

LayerFormat = Literal["estargz", "zstd:chunked", "zstd:chunked-stargz"]
# libdeflate 2: 0.99 of the bytes of Go's gzip at 6 (a python image) in less than a quarter of its CPU time; 4 would
# save 1.3 % more in a tenth more time. zstd 3 is zstd's default
DEFAULT_LEVELS = {"estargz": 2, "zstd:chunked": 3, "zstd:chunked-stargz": 3}
_ZSTD_LEVELS = range(1, 23)
_LEVELS = {"estargz": range(1, 13), "zstd:chunked": _ZSTD_LEVELS, "zstd:chunked-stargz": _ZSTD_LEVELS}
_WRITERS: dict[str, type[LayerWriter]] = {
    "estargz": EstargzWriter, "zstd:chunked": ContainersWriter, "zstd:chunked-stargz": StargzZstdWriter,
}  # fmt: skip
MIN_CHUNK_BYTES = 64 << 10  # every chunk is a member, a digest and 150 bytes of TOC
MAX_CHUNK_BYTES = 64 << 20  # readers hold a chunk in memory
READ_BYTES = 1 << 20
_MAX_STEPS = 4_000_000  # runs and holes remembered for reordering
_ZEROS_WRITTEN_LIMIT = 64 << 30  # holes are written out: a small sparse file must not become an endless layer

Progress = Callable[[int], None]
"""Told how many bytes of the input have been read; may raise to stop the conversion."""


class LayerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How layers are written. `level` None means the format's default."""

    format: LayerFormat = "estargz"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    level: int | None = None
    prioritized: tuple[bytes, ...] = ()
    threads: int = 2

    def check(self) -> None:
        """Raise ConfigError for values that no writer takes."""
        if self.format not in _LEVELS:
            raise ConfigError(
                f"format {self.format!r} is unknown", hint="estargz, zstd:chunked or zstd:chunked-stargz"
            )
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(
                f"chunks of {self.chunk_bytes} bytes",
                hint=f"{MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes are possible",
            )
        levels = _LEVELS[self.format]
        if self.level is not None and self.level not in levels:
            raise ConfigError(
                f"level {self.level} of {self.format}", hint=f"{levels[0]} to {levels[-1]} are possible"
            )
        if not 0 <= self.threads <= 64:
            raise ConfigError(f"{self.threads} compression threads", hint="0 to 64 are possible")


def convert_layer(
    blob: BinaryIO,
    out: BinaryIO,
    options: LayerOptions,
    *,
    progress: Progress | None = None,
    rewritten: bool = False,
    scratch_directory: Path | None = None,
) -> WrittenLayer:
    """Convert the layer in `blob` (tar, tar.gz or tar.zst) into `out`.

    `rewritten`: the input is itself lazily readable, so its own landmarks and TOC are not the user's. Raises
    ImageInvalid.
    """
    options.check()
    level = options.level if options.level is not None else DEFAULT_LEVELS[options.format]
    estargz = options.format == "estargz"
    compress = gzip_compressor(level) if estargz else zstd_compressor(level)
    kind = _WRITERS[options.format]
    parser = TarParser()
    events = _events(blob, parser, progress or (lambda done: None))
    with MemberPacker(out, compress, threads=options.threads) as packer:
        writer = kind(packer, chunk_bytes=options.chunk_bytes, rewritten=rewritten)
        if options.prioritized:
            _write_reordered(events, writer, options.prioritized, scratch_directory)
        else:
            _write_in_order(events, writer, rewritten=rewritten)
        for text in parser.warnings:
            writer.warn(text)
        return writer.finish()


def _events(blob: BinaryIO, parser: TarParser, progress: Progress) -> Iterator[Event]:
    decompressor = Decompressor()
    done = 0
    while data := blob.read(READ_BYTES):
        for piece in decompressor.feed(data):
            yield from parser.feed(piece)
        done += len(data)
        progress(done)
    for piece in decompressor.finish():
        yield from parser.feed(piece)
    parser.finish()


def _write_in_order(events: Iterable[Event], writer: LayerWriter, *, rewritten: bool) -> None:
    marked = False
    zeros = 0
    for event in events:
        if isinstance(event, Payload):
            writer.data(event.data)
        elif isinstance(event, Header):
            if not marked and not rewritten:
                writer.landmark("no-prefetch")
                marked = True
            elif rewritten and is_landmark(event):
                # An optimized layer stays so: the landmark keeps its place among the files
                if not marked:
                    prefetch = clean_name(event.name) == PREFETCH_LANDMARK.encode()
                    writer.landmark("prefetch" if prefetch else "no-prefetch")
                marked = True
            writer.begin(event)
        elif isinstance(event, EntryEnd):
            writer.end()
        elif isinstance(event, Hole):
            zeros = _add_zeros(zeros, event.size)
            writer.zeros(event.size)
    if not marked:
        writer.landmark("no-prefetch")


def _add_zeros(zeros: int, size: int) -> int:
    if zeros + size > _ZEROS_WRITTEN_LIMIT:
        raise ImageInvalid(
            f"layer: its sparse files have more than {_ZEROS_WRITTEN_LIMIT} bytes of holes",
            hint="they would have to be written out",
        )
    return zeros + size


class _Kept(msgspec.Struct, gc=False):
    """An entry that waits in the scratch file: its bytes begin at `offset`; `steps` are (is a hole, size)."""

    header: Header
    name: bytes
    offset: int
    steps: list[tuple[bool, int]]


def _write_reordered(
    events: Iterable[Event],
    writer: LayerWriter,
    prioritized: tuple[bytes, ...],
    scratch_directory: Path | None,
) -> None:
    with tempfile.TemporaryFile(prefix="p2pgz-convert-", dir=scratch_directory) as scratch:
        kept = _keep(events, scratch)
        first, writer.absent = pick(kept, prioritized, writer.warn)
        picked = set(first)
        for index in first:
            _replay(kept[index], scratch, writer)
        writer.landmark("prefetch" if first else "no-prefetch")
        for index, entry in enumerate(kept):
            if index not in picked:
                _replay(entry, scratch, writer)


def _keep(events: Iterable[Event], scratch: BinaryIO) -> list[_Kept]:
    kept: list[_Kept] = []
    at = zeros = steps = 0
    for event in events:
        if isinstance(event, Payload):
            scratch.write(event.data)
            at += len(event.data)
            runs = kept[-1].steps
            if runs and not runs[-1][0]:
                runs[-1] = (False, runs[-1][1] + len(event.data))
            else:
                runs.append((False, len(event.data)))
                steps += 1
        elif isinstance(event, Header):
            kept.append(_Kept(event, clean_name(event.name), at, []))
        elif isinstance(event, Hole):
            zeros = _add_zeros(zeros, event.size)
            kept[-1].steps.append((True, event.size))
            steps += 1
        if steps > _MAX_STEPS:
            raise ImageInvalid(f"layer: more than {_MAX_STEPS} runs of data and holes")
    return kept


def _replay(entry: _Kept, scratch: BinaryIO, writer: LayerWriter) -> None:
    writer.begin(entry.header)
    scratch.seek(entry.offset)
    for is_hole, size in entry.steps:
        if is_hole:
            writer.zeros(size)
            continue
        while size:
            data = scratch.read(min(size, READ_BYTES))
            if not data:
                raise ImageInvalid("layer: the scratch file lost bytes", hint="is the disk full?")
            writer.data(data)
            size -= len(data)
    writer.end()


def pick(
    kept: list[_Kept], prioritized: Iterable[bytes], warn: Callable[[str], None]
) -> tuple[list[int], list[bytes]]:
    """The entries to move to the front, in order, and the paths that are not in this layer.

    Directories come before what is in them, targets before their hard links.
    """
    places: dict[bytes, list[int]] = {}
    for index, entry in enumerate(kept):
        places.setdefault(entry.name, []).append(index)
    chosen: dict[int, None] = {}
    absent: list[bytes] = []
    for path in prioritized:
        name = clean_name(path)
        if name not in places:
            absent.append(path)
            continue
        wanted = _with_needed(name, kept, places)
        if wanted is None:
            warn(
                f"prioritized {path.decode(errors='replace')!r} was not moved: its place in the layer matters"
            )
        else:
            chosen.update(dict.fromkeys(wanted))
    return list(chosen), absent


def _with_needed(name: bytes, kept: list[_Kept], places: dict[bytes, list[int]]) -> list[int] | None:
    """What must come before `name`, and itself; None when it cannot be moved without changing the result.

    An entry whose name comes twice stays where it is, since its place decides which of the two counts.
    """
    wanted: list[int] = []
    chain = [name]
    seen = {name}
    while True:  # a hard link's target may be a link again
        found = places.get(chain[-1])
        if found is None:
            break  # the target is in a lower layer
        entry = kept[found[0]]
        if entry.header.kind != "hardlink":
            break
        target = clean_name(entry.header.link)
        if target in seen:
            return None
        seen.add(target)
        chain.append(target)
    for link in reversed(chain):
        parts = link.split(b"/")
        for depth in range(len(parts)):
            for index in places.get(b"/".join(parts[:depth]), ())[:1]:
                if kept[index].header.kind != "dir":
                    return None
                wanted.append(index)
        found = places.get(link, [])
        if len(found) > 1 and any(kept[index].header.kind != "dir" for index in found):
            return None
        wanted += found[:1]
    return wanted
