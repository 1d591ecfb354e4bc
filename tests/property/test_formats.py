"""Footers, TOCs, members and ranges under generated input: right answers, or the one error that is promised."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.footer import (
    make_estargz_footer,
    make_zstd_containers_footer,
    make_zstd_sgz_footer,
    parse_footer,
)
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.members import MemberInflater
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.ranges import plan_ranges
from p2pgz.core.tail import Opened, open_layer_tail
from p2pgz.core.toc import parse_toc
from p2pgz.core.toc_fields import clean_name, parse_time
from p2pgz.errors import ChunkCorrupt, ImageInvalid, StateError

BLOBS = Path(__file__).parents[1] / "vectors" / "blobs"
SAMPLES = [
    (BLOBS / name).read_bytes()
    for name in (
        "badbase.esgz64k.tar.gz",
        "badbase.esgzmin.tar.gz",
        "badbase.sgz.tar.gz",
        "badbase.zsgz64k.tar.zst",
        "badbase.zctr.tar.zst",
    )
]


@st.composite
def mutated(draw: st.DrawFn, samples: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        action = draw(st.sampled_from(["set", "cut", "insert"]))
        if action == "set":
            data[at] = draw(st.integers(0, 255))
        elif action == "cut" and len(data) > 100:
            del data[at : at + draw(st.integers(1, 50))]
        else:
            data[at:at] = draw(st.binary(max_size=20))
    return bytes(data)


@given(st.binary(max_size=80), st.integers(0, 1 << 40))
def test_any_bytes_are_a_footer_or_none_or_invalid(tail: bytes, blob_size: int) -> None:
    for made in (
        b"",
        make_estargz_footer(100),
        make_zstd_sgz_footer(9, 9, 9),
        make_zstd_containers_footer(9, 9, 9),
    ):
        with contextlib.suppress(ImageInvalid):
            footer = parse_footer(tail[: len(made)] + made[min(len(tail), len(made) // 2) :], blob_size)
            if footer is not None:
                assert -1 <= footer.toc_offset < blob_size
                assert footer.payload_end <= blob_size


@settings(max_examples=200)
@given(mutated(SAMPLES))
def test_mutated_blob_opens_or_is_invalid(blob: bytes) -> None:
    with contextlib.suppress(ImageInvalid):
        opened = open_layer_tail(blob, len(blob), {}, allow_unverified=True)
        if isinstance(opened, Opened):
            check_invariants(opened.toc, opened.footer.payload_end)


def check_invariants(toc: Toc, payload_end: int) -> None:
    for entry in toc.entries:
        assert not entry.name.startswith(b"/")
        assert b".." not in entry.name.split(b"/")
        at = 0
        for chunk in entry.chunks:
            assert chunk.file_offset == at
            at += chunk.size
            for piece in chunk.pieces():
                assert 0 < piece.offset < piece.end <= payload_end
        assert at == entry.size
    layout = SegmentLayout.build(toc, compression="gzip")
    table = SegmentTable(layout.to_bytes())
    spans = sorted((e.segment_offset, toc.entries[k].size) for k, e in layout.extents.items())
    end = 0
    for start, size in spans:
        assert start >= end
        assert start % 4096 == 0
        end = start + size
    assert end <= layout.segment_bytes == table.segment_bytes


numbers = st.sampled_from(
    [0, 1, 2, 5, 10, 100, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, -1, 0.5, True, None, "1"]
)
texts = st.sampled_from(
    ["", "a", "b", "a/b", "..", "/", ".prefetch.landmark", "a\0", "é", "x" * 300, 5, None]
)
digests = st.sampled_from(["", "sha256:" + "a" * 64, "sha256:" + "b" * 64, "sha256:" + "A" * 64, "md5:0"])
raw_entries = st.fixed_dictionaries(
    {
        "name": texts,
        "type": st.sampled_from(["dir", "reg", "chunk", "chunk", "hardlink", "symlink", "char", "x"]),
    },
    optional={
        "size": numbers,
        "offset": numbers,
        "innerOffset": numbers,
        "chunkOffset": numbers,
        "chunkSize": numbers,
        "linkName": texts,
        "digest": digests,
        "chunkDigest": digests,
        "chunkType": st.sampled_from(["", "zeros", "x"]),
        "mode": numbers,
        "xattrs": st.sampled_from([{}, None, {"user.a": "YQ=="}, {"": ""}, {"a": 1}]),
        "modtime": st.sampled_from(["", "2020-01-01T00:00:00Z", "x"]),
    },
)


@settings(max_examples=300)
@given(
    st.lists(raw_entries, max_size=6), st.sampled_from(["estargz", "stargz", "zstd-sgz", "zstd-containers"])
)
def test_any_entries_parse_or_are_invalid(entries: list[dict], kind: str) -> None:
    toc_json = json.dumps({"version": 1, "entries": entries}).encode()
    with contextlib.suppress(ImageInvalid):
        check_invariants(parse_toc(toc_json, kind=kind, payload_end=1000, blob_size=2000), 1000)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_as_toc_are_invalid(data: bytes) -> None:
    with contextlib.suppress(ImageInvalid):
        parse_toc(data, kind="estargz", payload_end=10, blob_size=10)


@given(st.text())
def test_clean_names_are_below_the_root(text: str) -> None:
    with contextlib.suppress(ImageInvalid, UnicodeEncodeError):
        name = clean_name(text)
        assert clean_name(name.decode()) == name
        assert not any(part in (b"", b".", b"..") for part in name.split(b"/")) or name == b""


@given(st.text(alphabet="0123456789-:TZ.+", max_size=30))
def test_any_time_parses_or_is_invalid(text: str) -> None:
    with contextlib.suppress(ImageInvalid):
        parse_time(text)


@given(st.datetimes())
def test_times_agree_with_the_standard_library(moment: datetime) -> None:
    moment = moment.replace(tzinfo=UTC)
    seconds, nanoseconds = parse_time(moment.isoformat())
    if moment.isoformat() != "0001-01-01T00:00:00Z":
        assert nanoseconds == moment.microsecond * 1000
        assert seconds == (moment.replace(microsecond=0) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


@st.composite
def member_cases(draw: st.DrawFn) -> tuple[str, bytes, bytes, list[tuple[int, int]], list[int]]:
    content = draw(st.binary(min_size=1, max_size=400)) * draw(st.integers(1, 60))
    compression = draw(st.sampled_from(["gzip", "zstd"]))
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=3)))
    data = b""
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        part = content[start:end]
        data += gzip.compress(part) if compression == "gzip" else zstandard.ZstdCompressor().compress(part)
    edges = sorted(set(draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=12))))
    wanted = [(a, b - a) for a, b in itertools.pairwise(edges) if draw(st.booleans())]
    wanted = draw(st.permutations(wanted + wanted[:1]))
    splits = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return compression, content, data, list(wanted), splits


@settings(max_examples=150)
@given(member_cases())
def test_payloads_do_not_depend_on_how_the_bytes_arrive(case: tuple) -> None:
    compression, content, data, wanted, splits = case
    expected = {k: content[inner : inner + size] for k, (inner, size) in enumerate(wanted)}
    for cuts in ([], splits, range(len(data)) if len(data) < 2000 else []):
        inflater = MemberInflater(compression, wanted)
        found: dict[int, bytes] = {}
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            found.update(inflater.feed(data[start:end]))
        inflater.close()
        assert found == expected


@settings(max_examples=200)
@given(
    mutated(
        [gzip.compress(b"some content " * 50), zstandard.ZstdCompressor().compress(b"some content " * 50)]
    ),
    st.sampled_from(["gzip", "zstd"]),
)
def test_mutated_members_give_bytes_or_are_corrupt(data: bytes, compression: str) -> None:
    inflater = MemberInflater(compression, [(0, 10), (600, 50)])
    with contextlib.suppress(ChunkCorrupt):
        for at in range(0, len(data), 7):
            for index, payload in inflater.feed(data[at : at + 7]):
                assert len(payload) == (10, 50)[index]
        inflater.close()


@st.composite
def tables(draw: st.DrawFn) -> SegmentTable:
    count = draw(st.integers(1, 12))
    offsets = sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count)))
    ends = dict(zip(offsets, [*offsets[1:], offsets[-1] + 5], strict=True))
    entries = []
    for n in range(draw(st.integers(1, 15))):
        offset = draw(st.sampled_from(offsets))
        size = draw(st.integers(1, 20))
        chunk = Chunk(
            hashlib.sha256(bytes([n])).digest(), 0, size, offset, ends[offset], draw(st.integers(0, 30))
        )
        entries.append(Entry(b"%d" % n, "reg", size=size, chunks=(chunk,)))
    return SegmentTable(SegmentLayout.build(Toc(Digest.of(b""), entries), compression="gzip").to_bytes())


@settings(max_examples=200)
@given(tables(), st.data())
def test_plans_bring_each_chunk_once_within_the_limits(table: SegmentTable, data: st.DataObject) -> None:
    chunks = data.draw(st.lists(st.integers(0, table.chunk_count - 1)))
    gap_bytes, max_bytes = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 60))
    plans = plan_ranges(table, chunks, gap_bytes=gap_bytes, max_bytes=max_bytes)
    brought = [w.chunk_no for plan in plans for member in plan.members for w in member.wanted]
    assert sorted(brought) == sorted(set(chunks))
    for plan in plans:
        assert plan.end - plan.start <= max_bytes or len(plan.members) == 1
        at = plan.start
        for member in plan.members:
            assert 0 <= member.start - at <= (gap_bytes if at > plan.start else 0)
            at = member.end
            MemberInflater("gzip", [(w.inner, w.size) for w in member.wanted])  # refuses what it cannot serve
        assert at == plan.end


@given(st.binary(max_size=400))
def test_any_bytes_are_a_segment_table_or_refused(data: bytes) -> None:
    good = SegmentLayout.build(Toc(Digest.of(b""), []), compression="gzip").to_bytes()
    for bad in (data, good[:24] + data, good + data[1:2]):
        with contextlib.suppress(StateError):
            SegmentTable(bad)
