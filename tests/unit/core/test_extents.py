"""Extents cut a layer where all nodes cut it."""

from __future__ import annotations

import pytest

from p2pgz.core.extents import EXTENT_BYTES, EXTENT_MAX_BYTES, Extents
from p2pgz.core.schedule import BlobOrder


def extents(offset: list[int], end: list[int], inner: list[int] | None = None) -> list[list[int]]:
    found = Extents(BlobOrder(offset, inner or [0] * len(offset)), offset, end)
    runs = [list(found.chunks(extent)) for extent in range(len(found))]
    assert all(found.of[n] == extent for extent, run in enumerate(runs) for n in run)
    return runs


def test_small_chunks_are_joined_until_there_is_a_mebibyte() -> None:
    size = EXTENT_BYTES // 4
    offset = [size * n for n in range(9)]
    assert extents(offset, [at + size for at in offset]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_extents_go_in_blob_order() -> None:
    size = EXTENT_BYTES // 2
    offset = [3 * size, 2 * size, size, 0]
    assert extents(offset, [at + size for at in offset]) == [[3, 2], [1, 0]]


def test_a_large_chunk_begins_an_extent_of_its_own() -> None:
    assert extents([0, 100], [100, 100 + EXTENT_MAX_BYTES]) == [[0], [1]]


def test_chunks_of_one_member_stay_together() -> None:
    end = 2 * EXTENT_BYTES
    assert extents([0, 0, end], [end, end, end + 5], [0, 7, 0]) == [[0, 1], [2]]


def test_a_layer_without_chunks_has_no_extents() -> None:
    assert extents([], []) == []
    with pytest.raises(IndexError):
        Extents(BlobOrder([], []), [], []).chunks(0)
