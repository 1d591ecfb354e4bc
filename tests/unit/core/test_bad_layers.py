"""Every bad layer of the vectors: refused when it must be, by the one error, in bounded time and memory.

Opened layers are read to the end: what fails must be the files that the vectors name, and no byte may be wrong.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.members import MemberInflater
from p2pgz.core.model import ChunkKind
from p2pgz.core.ranges import plan_ranges
from p2pgz.core.tail import NeedExternal, NeedMore, Opened, open_external, open_layer_tail, tail_start
from p2pgz.core.toc import TOC_DIGEST_ANNOTATION
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkCorrupt, ImageInvalid

VECTORS = Path(__file__).parents[2] / "vectors"
ITEMS = {
    Path(item["file"]).stem: item
    for item in json.loads((VECTORS / "bad" / "expected.json").read_text())["items"].values()
    if item["file"].endswith(".blob")
}
MEMORY_BYTES = 800 << 20
CPU_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """A bomb that goes off fails its test with MemoryError, or by its time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    started = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < CPU_SECONDS


def open_item(item: dict) -> Opened:
    blob = (VECTORS / item["file"]).read_bytes()
    annotations = dict(item.get("annotations", {}))
    if item["toc_digest"]:
        annotations[TOC_DIGEST_ANNOTATION] = item["toc_digest"]
    answer = open_layer_tail(blob[tail_start(len(blob)) :], len(blob), annotations)
    if isinstance(answer, NeedMore):
        answer = open_layer_tail(blob[answer.start :], len(blob), annotations)
    if isinstance(answer, NeedExternal):
        toc_layer = (VECTORS / item["external_toc"]).read_bytes()
        answer = open_external(answer.footer, len(blob), toc_layer, annotations)
    assert isinstance(answer, Opened)
    return answer


def failing_paths(blob: bytes, opened: Opened) -> set[str]:
    layout = SegmentLayout.build(opened.toc, compression=opened.compression)
    table = SegmentTable(layout.to_bytes())
    good = {n for n in range(table.chunk_count) if table.kind[n] == ChunkKind.ZEROS}
    parts: dict[int, list[bytes]] = {}
    for plan in plan_ranges(table, range(table.chunk_count), gap_bytes=0, max_bytes=1 << 20):
        for member in plan.members:
            inflater = MemberInflater(table.compression, [(w.inner, w.size) for w in member.wanted])
            try:
                done = inflater.feed(blob[member.start : member.end])
                inflater.close()
            except ChunkCorrupt:
                continue
            for index, payload in done:
                n = member.wanted[index].chunk_no
                pieces = parts.setdefault(n, [])
                pieces.append(payload)
                if len(pieces) == len(table.pieces(n)):
                    try:
                        verify(table.digest(n), b"".join(pieces), source="blob")
                    except ChunkCorrupt:
                        continue
                    good.add(n)
    failing = set()
    for index, extent in layout.extents.items():
        chunks = range(extent.first_chunk, extent.first_chunk + extent.chunk_count)
        if not good.issuperset(chunks):
            failing.add(opened.toc.entries[index].name.decode())
    return failing


@pytest.mark.parametrize("name", ITEMS)
def test_verdict(name: str) -> None:
    item = ITEMS[name]
    answers = [item["must"], *item.get("also_ok", [])]
    may_accept = any(answer.startswith("accept") for answer in answers)
    when = item.get("when", "open") if any(answer == "reject" for answer in answers) else "never"
    opened = None
    with contextlib.suppress(ImageInvalid):
        opened = open_item(item)
    if opened is None:
        assert when in ("open", "either"), "must have been opened"
        return
    failing = failing_paths((VECTORS / item["file"]).read_bytes(), opened)
    if may_accept and not failing:
        return
    assert when in ("read", "either"), "must have been refused at once"
    assert failing == set(item["paths"])


def names(name: str) -> list[str]:
    return [entry.name.decode() for entry in open_item(ITEMS[name]).toc.entries]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("name-up", "x"),
        ("name-upup", "b"),
        ("name-abs", "abs"),
        ("name-inner", "r"),
        ("name-dot", "a/b"),
        ("name-slashes", "a/b"),
        ("name-deepup", "etc/x"),
        ("name-root-dir", ""),
    ],
)
def test_names_are_cleaned_against_the_root(name: str, shown: str) -> None:
    assert shown in names(name)


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("num-mode-type", "z", {"mode": 0o644, "kind": "reg"}),
        ("num-mode-lie", "z", {"mode": 0o755, "kind": "reg"}),
        ("num-mtime-offset", "z", {"mtime": 1577836800, "mtime_nsec": 0}),
        ("num-mtime-nano", "z", {"mtime": 1577836800, "mtime_nsec": 123456789}),
        ("num-mtime-year9999", "z", {"mtime": 253402300799}),
        ("xattr-null", "z", {"xattrs": {b"user.a": b""}}),
        ("hl-up", "early", {}),
        ("hl-later", "early", {"link": b"dir/a"}),
        ("name-root-dir", "", {"mode": 0o700, "uid": 7}),
    ],
)
def test_accepted_values(name: str, path: str, expected: dict) -> None:
    entries = {entry.name.decode(): entry for entry in open_item(ITEMS[name]).toc.entries}
    for key, value in expected.items():
        assert getattr(entries[path], key) == value


def test_other_chunks_of_a_damaged_file_stay_readable() -> None:
    item = ITEMS["payload-flip-mid"]
    blob = (VECTORS / item["file"]).read_bytes()
    opened = open_item(item)
    table = SegmentTable(SegmentLayout.build(opened.toc, compression="gzip").to_bytes())
    good = 0
    for plan in plan_ranges(table, range(table.chunk_count), gap_bytes=0, max_bytes=1):
        for member in plan.members:
            inflater = MemberInflater("gzip", [(w.inner, w.size) for w in member.wanted])
            for index, payload in inflater.feed(blob[member.start : member.end]):
                n = member.wanted[index].chunk_no
                try:
                    verify(table.digest(n), payload, source="blob")
                    good += 1
                except ChunkCorrupt:
                    pass
    assert good == table.chunk_count - 1
