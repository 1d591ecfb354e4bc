"""Lists name chunks by the image's own layers, whichever segments this host's tree refers to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from p2pgz.core.layout import SegmentTable
from p2pgz.image.startup import chunk_counts, spots_of, wanted
from p2pgz.pool.presence import Presence
from p2pgz.testing.conformance_pool import Layer


@dataclass(eq=False)
class Part:
    """What of a segment is looked at."""

    table: SegmentTable
    domain: str = "shared"

    def __post_init__(self) -> None:
        self.id = self.table.id
        self.presence = Presence.private(self.table.chunk_count)

    def number(self, data: bytes) -> int:
        n = self.table.find(hashlib.sha256(data).digest())
        assert n is not None
        return n


class Places:
    """The pool's answer to where a chunk is."""

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def find(self, domain: str, digest: bytes) -> tuple[Part, int] | None:
        found = [(part, n) for part in self.parts if (n := part.table.find(digest)) is not None]
        return found[0] if found else None


def part(name: bytes, *files: bytes) -> Part:
    return Part(SegmentTable(Layer([[data] for data in files], name=name).layout.to_bytes()))


A, B, C, SHARED, FOREIGN = b"a" * 10, b"b" * 11, b"c" * 12, b"shared" * 10, b"foreign" * 9


def image() -> tuple[Any, Part, Part, Part]:
    """Two layers; the tree takes one of their files from another image's segment."""
    base, top, other = part(b"base", A, B, SHARED), part(b"top", C), part(b"other", FOREIGN, SHARED)
    return SimpleNamespace(layers=[base, top], segments=[top, other, base]), base, top, other


def test_what_is_read_elsewhere_is_named_by_the_own_layer() -> None:
    opened, base, top, other = image()
    read = [
        (1, other.number(SHARED)),
        (0, top.number(C)),
        (2, base.number(SHARED)),
        (1, other.number(FOREIGN)),
    ]
    assert spots_of(opened, read) == [(base.id.raw, base.number(SHARED)), (top.id.raw, top.number(C))]
    assert chunk_counts(opened) == {base.id.raw: 3, top.id.raw: 1}


def test_what_the_tree_takes_elsewhere_is_not_fetched_twice() -> None:
    opened, base, top, other = image()
    spots = [(base.id.raw, base.number(data)) for data in (SHARED, B)]
    unknown = [(other.id.raw, 0), (top.id.raw, 1), (b"?" * 32, 0)]
    pool: Any = Places(other)
    assert wanted(opened, [*spots, *unknown], pool) == [(base, base.number(B))]
    nothing: Any = Places()
    assert wanted(opened, spots, nothing) == [(base, n) for _, n in spots]
