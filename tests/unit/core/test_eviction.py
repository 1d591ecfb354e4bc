"""What goes when the pool has to shrink, and what never does."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.eviction import (
    ChunkState,
    SegmentState,
    Step,
    coldest_first,
    excess_bytes,
    is_evictable,
    plan,
)

BASE = SegmentState(
    key=0, held_bytes=1000, mounted=False, last_mount=0.0, mounts=0, pinned=False, native=False
)


def segment(key: int, **fields: Any) -> SegmentState:
    return BASE._replace(key=key, **fields)


def chunks(*uses: int, size: int = 100, copies: int | None = None) -> list[ChunkState]:
    return [ChunkState(n, size, used, copies) for n, used in enumerate(uses)]


def test_nothing_goes_before_a_limit_is_near_and_then_down_to_the_low_water_mark() -> None:
    assert excess_bytes(900, 1000, 0, 0, started=False) == 0
    assert excess_bytes(960, 1000, 0, 0, started=False) == 960 - 850
    assert excess_bytes(900, 1000, 0, 0, started=True) == 50
    assert excess_bytes(840, 1000, 0, 0, started=True) == 0
    assert excess_bytes(10**9, 0, 10**9, 0, started=False) == 0


def test_free_floor_counts_as_well() -> None:
    assert excess_bytes(0, 0, 1000, 1000, started=False) == 0
    assert excess_bytes(0, 0, 900, 1000, started=False) == 200
    assert excess_bytes(0, 0, 1050, 1000, started=True) == 50
    assert excess_bytes(0, 0, 1200, 1000, started=True) == 0


def test_coldest_segments_go_first_and_pinned_ones_never() -> None:
    states = [
        segment(1, mounted=True),
        segment(2, last_mount=50.0),
        segment(3, last_mount=10.0),
        segment(4, pinned=True),
        segment(5, held_bytes=0),
        segment(6, native=True, mounted=True),
    ]
    assert [state.key for state in coldest_first(states)] == [3, 2, 1]
    assert not is_evictable(states[3])


def test_oldest_chunks_go_until_enough_is_free() -> None:
    steps = plan([segment(1)], lambda key: chunks(5, 1, 3), 150, max_chunks=10)
    assert steps == [Step(1, (1, 2), 200, whole=False)]
    assert plan([segment(1)], lambda key: chunks(5, 1, 3), 1000, max_chunks=1) == [
        Step(1, (1,), 100, whole=False)
    ]


def test_last_known_copies_go_last() -> None:
    held = {1: chunks(1, 2, copies=0), 2: chunks(9, copies=3)}
    states = [segment(1, last_mount=1.0), segment(2, last_mount=2.0)]
    steps = plan(states, held.__getitem__, 250, max_chunks=10)
    assert [step.key for step in steps] == [2, 1]


def test_native_segments_go_whole_or_not_at_all() -> None:
    native = segment(1, native=True)
    assert plan([native], lambda key: chunks(1, 2, 3), 1, max_chunks=1) == [
        Step(1, (0, 1, 2), 300, whole=True)
    ]
    assert plan([native], lambda key: chunks(1, 9), 1, max_chunks=9, used_before=5) == []
    late = plan([native, segment(2)], lambda key: chunks(1, copies=0 if key == 1 else 1), 150, max_chunks=9)
    assert [step.key for step in late] == [2, 1]


def test_what_is_about_to_be_read_stays() -> None:
    assert plan([segment(1)], lambda key: chunks(1, 9), 500, max_chunks=9, used_before=5) == [
        Step(1, (0,), 100, whole=False)
    ]


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=6
    ),
    st.integers(1, 2000),
    st.integers(1, 20),
)
def test_plans_keep_their_promises(flags: list[tuple[bool, bool, bool, int]], need: int, most: int) -> None:
    states = [
        segment(key, mounted=mounted, pinned=pinned, native=native, last_mount=float(at))
        for key, (mounted, pinned, native, at) in enumerate(flags)
    ]
    held = {
        key: [ChunkState(n, 1 + (n * 37 + key) % 90, n % 7, [None, 0, 2][(n + key) % 3]) for n in range(8)]
        for key in range(len(flags))
    }
    steps = plan(states, held.__getitem__, need, max_chunks=most)
    by_key = {state.key: state for state in states}
    seen: set[tuple[int, int]] = set()
    for step in steps:
        state = by_key[step.key]
        assert is_evictable(state)
        assert step.whole == state.native
        assert not step.whole or len(step.chunks) == 8
        assert step.freed_bytes == sum(held[step.key][n].size for n in step.chunks)
        assert not seen & {(step.key, n) for n in step.chunks}
        seen |= {(step.key, n) for n in step.chunks}
