"""The rate holds over time, and what is urgent waits only for its own kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.pacing import BURST_SECONDS, Pace

BATCH = 250_000
RATE = 1_000_000


@pytest.mark.parametrize("priority", [0, 3])
def test_rate_holds_over_time(priority: int) -> None:
    pace, now = Pace(RATE), 100.0
    for _ in range(40):
        now += pace.wait_seconds(priority, now)
        pace.spend(BATCH, priority, now)
    now += pace.wait_seconds(priority, now)
    assert now - 100 == pytest.approx(40 * BATCH / RATE - BURST_SECONDS)


def test_no_rate_is_no_wait() -> None:
    pace = Pace(0)
    pace.spend(1 << 40, 3, 5.0)
    assert pace.wait_seconds(3, 5.0) == 0


def test_what_is_charged_too_much_is_given_back() -> None:
    pace = Pace(RATE)
    pace.spend(RATE, 3, 0.0)
    pace.spend(-RATE, 3, 0.0)
    assert pace.wait_seconds(3, 0.0) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 10 * BATCH), st.floats(0, 5)), max_size=30))
def test_urgent_bytes_never_wait_for_others(sends: list[tuple[int, int, float]]) -> None:
    """Whatever went before: it waits as if only urgent bytes had gone out, and the background pays for all."""
    pace, urgent_only, everything, now = Pace(RATE), Pace(RATE), Pace(RATE), 0.0
    for priority, count, pause in sends:
        now += pause
        pace.spend(count, priority, now)
        everything.spend(count, 3, now)
        if priority == 0:
            urgent_only.spend(count, 0, now)
        assert pace.wait_seconds(0, now) == urgent_only.wait_seconds(0, now)
        for other in (1, 2, 3):
            assert pace.wait_seconds(other, now) == everything.wait_seconds(3, now)
