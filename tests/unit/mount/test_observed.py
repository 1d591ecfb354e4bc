"""First reads: each chunk is told once, in the order of the reads, as runs."""

from __future__ import annotations

from p2pgz.mount.channel import Kind, Record
from p2pgz.mount.observed import FirstReads


def test_each_chunk_is_told_once() -> None:
    told: list[Record] = []
    reads = FirstReads([10, 3], told.extend)
    reads.note(0, range(2, 5))
    reads.note(0, range(3, 6))
    reads.note(0, range(2, 6))
    reads.note(1, [2, 0, 1])
    reads.note(0, range(10))
    assert {record.kind for record in told} == {Kind.OBSERVED}
    assert [(record.segment, record.first, record.amount) for record in told] == [
        (0, 2, 3), (0, 5, 1), (1, 2, 1), (1, 0, 2), (0, 0, 2), (0, 6, 4),
    ]  # fmt: skip


def test_what_is_known_is_not_told() -> None:
    told: list[list[Record]] = []
    reads = FirstReads([4], told.append)
    reads.note(0, range(4))
    reads.note(0, range(4))
    assert len(told) == 1
