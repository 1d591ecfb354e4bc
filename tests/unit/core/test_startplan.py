"""How a start-up list becomes requests: few, in the order of need, and hardly more bytes than it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.schedule import BlobOrder
from p2pgz.core.startplan import GROUP_MAX_BYTES, HOLE_MAX_BYTES, SPARE_SHARE, groups

KIB = 1 << 10


def plan(
    sizes: Sequence[int],
    listed: Sequence[int],
    *,
    absent: Callable[[int], bool] = lambda n: True,
) -> list[list[int]]:
    """The groups for chunks of these sizes that stand one behind the other."""
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    offsets = [end - size for end, size in zip(ends, sizes, strict=True)]
    order = BlobOrder(offsets, [0] * len(sizes))
    ranks = {n: rank for rank, n in enumerate(listed)}
    return [group.chunks for group in groups(order, offsets, ends, ranks, absent)]


def test_neighbours_travel_together_and_the_first_needed_group_goes_first() -> None:
    assert plan([64 * KIB] * 10, [7, 1, 8, 2]) == [[7, 8], [1, 2]]
    assert plan([64 * KIB] * 10, []) == []


def test_small_holes_are_filled_up_to_a_tenth_of_the_listed_bytes() -> None:
    sizes = [100 * KIB, 10 * KIB, 100 * KIB, 30 * KIB, 100 * KIB]
    assert plan(sizes, [4, 0, 2]) == [[4], [0, 1, 2]]
    assert plan([100 * KIB, 31 * KIB, 100 * KIB], [0, 2]) == [[0], [2]]


def test_hole_with_something_that_is_here_is_not_filled() -> None:
    assert plan([100 * KIB, 10 * KIB, 100 * KIB], [0, 2], absent=lambda n: n != 1) == [[0], [2]]


def test_large_hole_is_never_filled() -> None:
    sizes = [2 << 20, HOLE_MAX_BYTES + 1, 2 << 20]
    assert plan(sizes, [0, 2]) == [[0], [2]]
    assert plan([2 << 20, HOLE_MAX_BYTES, 2 << 20], [0, 2]) == [[0, 1], [2]]


def test_groups_are_no_larger_than_a_request_that_others_wait_behind() -> None:
    made = plan([1 << 20] * 10, range(10))
    assert made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_chunks_of_one_member_stay_together() -> None:
    size = GROUP_MAX_BYTES // 2
    offsets, ends = [0, size, size, size, 2 * size], [size, 2 * size, 2 * size, 2 * size, 3 * size]
    order = BlobOrder(offsets, [0, 0, 10, 20, 0])
    made = groups(order, offsets, ends, {0: 0, 1: 1, 3: 2, 4: 3}, lambda n: True)
    assert [group.chunks for group in made] == [[0, 1, 2, 3], [4]]


def test_filling_alone_makes_no_group() -> None:
    """The hole is where a group is full: what is only there to fill it is not asked for by itself."""
    last = 200 * KIB
    sizes = [GROUP_MAX_BYTES, *[50 * KIB] * 3, GROUP_MAX_BYTES, last]
    assert plan(sizes, [0, 4, 5]) == [[0], [4], [5]]


@given(
    st.lists(st.integers(1, 300 * KIB), min_size=1, max_size=40),
    st.data(),
)
def test_all_listed_chunks_come_once_and_little_else(sizes: list[int], data: st.DataObject) -> None:
    listed = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True))
    made = plan(sizes, listed)
    asked = [n for group in made for n in group]
    assert len(asked) == len(set(asked))
    assert set(listed) <= set(asked)
    listed_bytes = sum(sizes[n] for n in listed)
    assert sum(sizes[n] for n in asked) <= listed_bytes * (1 + SPARE_SHARE)
    firsts = [min(listed.index(n) for n in group if n in listed) for group in made]
    assert firsts == sorted(firsts)
