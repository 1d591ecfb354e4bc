"""What to ask for next: the decisions of core.schedule."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.schedule import (
    GAP_BYTES,
    READ_AHEAD_MAX_BYTES,
    READ_AHEAD_MIN_BYTES,
    REQUEST_MAX_BYTES,
    SEAM_BYTES,
    WINDOW_MAX_BYTES,
    WINDOW_MIN_BYTES,
    WINDOW_START_BYTES,
    BlobOrder,
    LinkEstimate,
    Priority,
    SequentialReads,
    choose,
)

KIB = 1 << 10


def _choose(offsets, ends, seed, *, wanted=(), absent=None, window=0, priority=Priority.BLOCKED_READ):
    order = BlobOrder(offsets, [0] * len(offsets))
    here = set(range(len(offsets))) if absent is None else set(absent)
    return choose(
        order, offsets, ends, seed, priority, dict.fromkeys(wanted, priority), here.__contains__, window
    )


def _adjacent(count, size):
    offsets = [n * size for n in range(count)]
    return offsets, [offset + size for offset in offsets]


def test_adjacent_wanted_chunks_travel_in_one_request():
    offsets, ends = _adjacent(8, 100 * KIB)
    assert _choose(offsets, ends, 2, wanted=[2, 3, 4]) == [2, 3, 4]


def test_an_unwanted_chunk_larger_than_the_gap_ends_the_request():
    offsets, ends = _adjacent(8, GAP_BYTES + 1)
    assert _choose(offsets, ends, 2, wanted=[2, 4]) == [2]


def test_a_small_hole_is_transferred_rather_than_asked_around():
    offsets, ends = _adjacent(8, 10 * KIB)
    assert _choose(offsets, ends, 2, wanted=[2, 4]) == [2, 4]


def test_the_start_up_list_bridges_nothing_but_padding():
    offsets, ends = _adjacent(8, 10 * KIB)
    assert _choose(offsets, ends, 2, wanted=[2, 4], priority=Priority.START_UP) == [2]
    offsets = [offset + SEAM_BYTES for offset in offsets]
    assert _choose(offsets, ends, 2, wanted=[2, 3], priority=Priority.START_UP) == [2, 3]


def test_a_blocked_read_takes_its_neighbourhood_along():
    offsets, ends = _adjacent(100, 16 * KIB)
    assert _choose(offsets, ends, 10, wanted=[10], window=64 * KIB) == [10, 11, 12, 13]


def test_present_neighbours_are_skipped_and_their_bytes_count_as_a_hole():
    offsets, ends = _adjacent(100, 16 * KIB)
    absent = set(range(100)) - {11, 13, 14, 15}
    assert _choose(offsets, ends, 10, wanted=[10], absent=absent, window=256 * KIB) == [10, 12]


def test_nobody_waits_behind_a_large_chunk_that_nobody_wants():
    offsets, ends = [0, 100, 10_000_000], [100, 10_000_000, 10_000_100]
    assert _choose(offsets, ends, 0, wanted=[0, 2], window=0) == [0]
    # within the request's limit, but a hole too large to be transferred for what is behind it
    offsets, ends = [0, 100, 200_000], [100, 200_000, 200_100]
    assert _choose(offsets, ends, 0, wanted=[0, 2], window=0) == [0]


def test_chunks_of_the_same_member_come_for_free():
    offsets, ends = [0, 0, 0, 500], [500, 500, 500, 900]
    assert _choose(offsets, ends, 0, wanted=[0]) == [0, 1, 2]


def test_blob_order_is_not_toc_order():
    offsets, ends = [3000, 0, 2000, 1000], [4000, 1000, 3000, 2000]
    assert _choose(offsets, ends, 1, wanted=[0, 1, 2, 3]) == [1, 3, 2, 0]


@given(
    st.lists(st.integers(1, 900 * KIB), min_size=1, max_size=60),
    st.data(),
)
def test_a_request_is_bounded_sorted_and_contains_its_seed(sizes, data):
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += size
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    seed = data.draw(st.integers(0, len(sizes) - 1))
    wanted = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    absent = data.draw(st.sets(st.integers(0, len(sizes) - 1))) | {seed}
    window = data.draw(st.integers(0, WINDOW_MAX_BYTES))
    chosen = _choose(offsets, ends, seed, wanted=wanted, absent=absent, window=window)
    assert chosen[0] == seed
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= absent
    assert ends[chosen[-1]] - offsets[seed] <= max(REQUEST_MAX_BYTES[Priority.BLOCKED_READ], sizes[seed])
    for here, there in pairwise(chosen):
        assert offsets[there] - ends[here] <= GAP_BYTES
        assert there in wanted or ends[there] - offsets[seed] <= window


def test_the_window_follows_rate_times_delay_within_bounds():
    link = LinkEstimate()
    assert link.window_bytes() == WINDOW_START_BYTES
    link.sample(0.001, 1 << 20, 0.1)
    assert link.window_bytes() == WINDOW_MIN_BYTES
    link = LinkEstimate()
    link.sample(0.020, 1 << 20, (1 << 20) / 12.5e6)
    assert link.window_bytes() == 250_000
    link.sample(0.020, 100, 10.0)  # so few bytes say nothing about the rate
    assert link.window_bytes() == 250_000
    for _ in range(5):
        link.sample(0.5, 100, 10.0)  # somebody is busy: no reason to bring more along
    assert 250_000 < link.window_bytes() < WINDOW_MAX_BYTES
    assert link.first_byte_seconds > 0.2
    link.sample(0.010, 100, 10.0)
    assert link.window_bytes() == 125_000
    link = LinkEstimate()
    link.sample(2.0, 1 << 20, 0.01)
    assert link.window_bytes() == WINDOW_MAX_BYTES


def nothing_is_here(n: int) -> bool:
    return False


def test_read_ahead_doubles_for_a_sequential_reader_and_stays_bounded():
    size = [64 * KIB] * 10_000
    reads = SequentialReads()
    amounts = [reads.ahead(position, 1, size, lambda n: True, nothing_is_here) for position in range(12)]
    assert amounts[0] == 0
    assert amounts[1] == READ_AHEAD_MIN_BYTES // (64 * KIB)
    assert amounts[2] == 2 * amounts[1]
    assert amounts[-1] == READ_AHEAD_MAX_BYTES // (64 * KIB)


def test_read_ahead_ends_with_the_file():
    size = [64 * KIB] * 100
    reads = SequentialReads()
    reads.ahead(0, 1, size, lambda n: n < 3, nothing_is_here)
    assert reads.ahead(1, 1, size, lambda n: n < 3, nothing_is_here) == 1


def test_reader_of_one_file_after_the_other_is_read_ahead_of_from_the_fourth_on():
    size = [100 << 10] * 1000
    reads = SequentialReads()
    amounts = [reads.ahead(n, 1, size, lambda n: False, nothing_is_here) for n in range(8)]
    assert amounts[:3] == [0, 0, 0]
    assert amounts[3] * size[0] >= 2 << 20
    assert amounts == sorted(amounts)


def test_reader_is_known_again_behind_what_came_by_read_ahead():
    size = [256 << 10] * 1000
    reads = SequentialReads()
    here: set[int] = set()
    at, misses = 0, 0
    while at < 500:
        if at not in here:
            misses += 1
            here.add(at)
            here |= set(range(at + 1, at + 1 + reads.ahead(at, 1, size, lambda n: True, here.__contains__)))
        at += 1
    assert misses < 20


def test_reader_that_jumps_is_another_one():
    size = [256 << 10] * 1000
    reads = SequentialReads()
    reads.ahead(0, 1, size, lambda n: True, nothing_is_here)
    assert (
        reads.ahead(3, 1, size, lambda n: True, nothing_is_here) == 0
    )  # 1 and 2 are not here: nobody came by there
    assert reads.ahead(100, 1, size, lambda n: True, lambda n: True) == 0  # too far


def test_random_readers_get_no_read_ahead_and_memory_is_bounded():
    size = [64 * KIB] * 10_000
    reads = SequentialReads()
    assert all(reads.ahead(n, 1, size, lambda n: True, nothing_is_here) == 0 for n in range(0, 9_000, 7))
    assert len(reads._next) <= SequentialReads.POSITIONS
