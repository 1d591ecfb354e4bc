"""Layers of the reference writers: footer, TOC, tree and every chunk are what the vectors say."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.footer import parse_footer
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.members import MemberInflater
from p2pgz.core.model import ChunkKind, Entry
from p2pgz.core.ranges import plan_ranges
from p2pgz.core.tail import (
    NeedExternal,
    NeedMore,
    NotLazy,
    Opened,
    open_external,
    open_layer_tail,
    tail_start,
)
from p2pgz.core.verify import verify
from p2pgz.errors import ImageInvalid

VECTORS = Path(__file__).parents[2] / "vectors"
EXPECTED = {
    path.stem: path
    for path in sorted((VECTORS / "expected").glob("*.json"))
    if not path.stem.startswith("image-")
}


def load(name: str) -> dict:
    return json.loads(EXPECTED[name].read_text())


LAZY = [name for name in EXPECTED if load(name)["footer"]["kind"] != "none"]
PLAIN = [name for name in EXPECTED if name not in LAZY]


def open_vector(expected: dict, *, tail_bytes: int | None = None) -> Opened:
    blob = (VECTORS / expected["blob"]).read_bytes()
    annotations = expected.get("annotations", {})
    unverified = not annotations
    start = tail_start(len(blob)) if tail_bytes is None else max(0, len(blob) - tail_bytes)
    answer = open_layer_tail(blob[start:], len(blob), annotations, allow_unverified=unverified)
    if isinstance(answer, NeedMore):
        answer = open_layer_tail(blob[answer.start :], len(blob), annotations, allow_unverified=unverified)
    if isinstance(answer, NeedExternal):
        toc_layer = (VECTORS / expected["external_toc"]).read_bytes()
        answer = open_external(answer.footer, len(blob), toc_layer, annotations)
    assert isinstance(answer, Opened)
    return answer


def read_chunks(blob: bytes, table: SegmentTable, *, step: int) -> Iterator[tuple[int, bytes]]:
    """What fetch does: ranges, members, pieces; everything in `step` bytes at a time."""
    parts: dict[int, dict[int, bytes]] = {}
    plans = plan_ranges(table, range(table.chunk_count), gap_bytes=1 << 10, max_bytes=1 << 16)
    for plan in plans:
        response = blob[plan.start : plan.end]
        for member in plan.members:
            data = response[member.start - plan.start : member.end - plan.start]
            inflater = MemberInflater(table.compression, [(w.inner, w.size) for w in member.wanted])
            for at in range(0, len(data), step):
                for index, payload in inflater.feed(data[at : at + step]):
                    wanted = member.wanted[index]
                    parts.setdefault(wanted.chunk_no, {})[wanted.piece_no] = payload
            inflater.close()
            assert inflater.finished
    for n, pieces in parts.items():
        yield n, b"".join(pieces[k] for k in range(len(table.pieces(n))))


@pytest.mark.parametrize("name", LAZY)
def test_footer_says_where_the_toc_is(name: str) -> None:
    expected = load(name)
    blob = (VECTORS / expected["blob"]).read_bytes()
    footer = parse_footer(blob[-64:], len(blob))
    assert footer is not None
    says = expected["footer"]
    assert (footer.footer_bytes, footer.toc_offset) == (says["size"], says["toc_offset"])
    if "toc_rawlen" in says:
        assert (footer.toc_compressed_bytes, footer.toc_raw_bytes) == (says["toc_clen"], says["toc_rawlen"])
    kinds = {40: "zstd-sgz", 64: "zstd-containers"}
    assert footer.kind == (kinds[says["size"]] if says["kind"] == "zstd-chunked" else says["kind"])


@pytest.mark.parametrize("name", PLAIN)
def test_plain_layer_is_not_lazy(name: str) -> None:
    blob = (VECTORS / load(name)["blob"]).read_bytes()
    assert open_layer_tail(blob[tail_start(len(blob)) :], len(blob), {}) == NotLazy()


@pytest.mark.parametrize("name", LAZY)
def test_toc_is_the_same_however_little_the_first_request_brings(name: str) -> None:
    expected = load(name)
    opened = open_vector(expected)
    assert str(opened.toc.digest) == expected["toc_digest"]
    assert len(opened.toc_json) == expected["toc_size"]
    assert open_vector(expected, tail_bytes=64) == opened


@pytest.mark.parametrize("name", LAZY)
def test_chunks_are_those_of_the_toc(name: str) -> None:
    expected = load(name)
    opened = open_vector(expected)
    found = []
    for entry in opened.toc.entries:
        for chunk in entry.chunks:
            path = os.fsdecode(entry.name)
            if chunk.more:
                at = 0
                for piece in chunk.pieces():
                    found.append((path, at, piece.size, None, piece.offset, piece.inner, piece.end))
                    at += piece.size
            else:
                digest = str(Digest(chunk.digest))
                found.append(
                    (path, chunk.file_offset, chunk.size, digest, chunk.offset, chunk.inner, chunk.end)
                )
    hidden = {".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"}
    multi = {path for path, _, _, digest, *_ in found if digest is None}
    containers = expected["writer"] in ("zctr", "zskopeo")
    wanted = [
        (
            c["path"],
            c["chunkOffset"],
            c["chunkSize"],
            None if c["path"] in multi else c["chunkDigest"],
            c["offset"],
            c["innerOffset"],
            c["rangeEnd"],
        )
        for c in expected["chunks"]
        if containers or c["path"] not in hidden
    ]
    assert sorted(found, key=str) == sorted(wanted, key=str)


@pytest.mark.parametrize("step", [1, 1 << 30], ids=["byte-by-byte", "whole"])
@pytest.mark.parametrize("name", LAZY)
def test_every_chunk_verifies(name: str, step: int) -> None:
    expected = load(name)
    if step == 1 and expected["blob_size"] > 60_000 and not name.startswith("basic.esgzmin"):
        step = 997
    opened = open_vector(expected)
    blob = (VECTORS / expected["blob"]).read_bytes()
    layout = SegmentLayout.build(opened.toc, compression=opened.compression)
    table = SegmentTable(layout.to_bytes())
    content: dict[int, bytes] = {}
    for n, payload in read_chunks(blob, table, step=step):
        content[n] = bytes(verify(table.digest(n), payload, source="blob").data)
    for n in range(table.chunk_count):
        if table.kind[n] == ChunkKind.ZEROS:
            content[n] = bytes(verify(table.digest(n), bytes(table.size[n]), source="zeros").data)
    assert sorted(content) == list(range(table.chunk_count))

    segment = bytearray(layout.segment_bytes)
    for n, payload in content.items():
        segment[table.segment_offset[n] : table.segment_offset[n] + len(payload)] = payload
    shown = tree(opened.toc.entries)
    sha_of = {}
    for index, entry in enumerate(opened.toc.entries):
        extent = layout.extents.get(index)
        start = extent.segment_offset if extent else 0
        assert start % 4096 == 0
        sha_of[entry.name] = hashlib.sha256(segment[start : start + entry.size]).hexdigest()
    for e in tree_by_toc(expected):
        path = os.fsencode(e["path"])
        if e["type"] == "reg" and path in shown and not e.get("same_inode_as"):
            assert sha_of[resolve(shown, path).name] == e["sha256"], e["path"]


def tree_by_toc(expected: dict) -> list[dict]:
    """Where the blob's tar stream says something else, the TOC's word."""
    return expected["entries"] if expected["use"] == "entries" else expected["entries_toc"]


def resolve(shown: dict[bytes, Entry], path: bytes) -> Entry:
    entry = shown[path]
    while entry.kind == "hardlink":
        entry = shown[entry.link]
    return entry


def tree(entries: list[Entry]) -> dict[bytes, Entry]:
    return {entry.name: entry for entry in entries if not entry.name.rpartition(b"/")[2].startswith(b".wh.")}


@pytest.mark.parametrize("name", LAZY)
def test_entries_are_the_tree(name: str) -> None:
    expected = load(name)
    opened = open_vector(expected)
    shown = tree(opened.toc.entries)
    wanted = {os.fsencode(e["path"]): e for e in tree_by_toc(expected)}
    assert shown.keys() <= wanted.keys()
    assert {path for path, e in wanted.items() if not e.get("implied")} <= shown.keys()
    for path in shown:
        e, entry = wanted[path], resolve(shown, path)
        assert entry.kind == e["type"], path
        assert (entry.mode, entry.uid, entry.gid) == (e["mode"], e["uid"], e["gid"]), path
        if e["mtime"] is not None:
            assert (entry.mtime, entry.mtime_nsec) == (e["mtime"], e["mtime_nsec"]), path
        if e["type"] == "reg":
            assert entry.size == e["size"], path
        if e["type"] == "symlink":
            assert entry.link == os.fsencode(e["linkname"]), path
        assert (entry.dev_major, entry.dev_minor) == (e["devmajor"], e["devminor"]), path
        xattrs = {key.encode(): base64.b64decode(value) for key, value in e["xattrs"].items()}
        assert entry.xattrs == xattrs, path


def test_recorded_start_up_files_end_at_the_landmark() -> None:
    opened = open_vector(load("basic.esgzprio"))
    landmark = next(c for c in load("basic.esgzprio")["chunks"] if c["path"] == ".prefetch.landmark")
    assert opened.toc.prefetch_end == landmark["offset"]
    assert open_vector(load("basic.esgz")).toc.prefetch_end == 0


def test_names_that_lost_bytes_are_warned_about() -> None:
    assert "not UTF-8" in open_vector(load("latin1.esgz64k")).toc.warnings[0]
    assert open_vector(load("meta.esgz64k")).toc.warnings == ()


def test_toc_nothing_vouches_for_is_refused_unless_allowed() -> None:
    blob = (VECTORS / load("basic.sgz")["blob"]).read_bytes()
    with pytest.raises(ImageInvalid, match="--allow-unverified-toc"):
        open_layer_tail(blob, len(blob), {})
    opened = open_layer_tail(blob, len(blob), {}, allow_unverified=True)
    assert isinstance(opened, Opened)
    assert not opened.vouched
    assert open_vector(load("basic.esgz")).vouched
    assert open_vector(load("basic.zskopeo")).vouched
