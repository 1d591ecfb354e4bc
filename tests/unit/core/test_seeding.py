"""What a seed does next."""

from __future__ import annotations

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.seeding import (
    FROM_COMMAND,
    FROM_CONFIG,
    RETRY_MAX_SECONDS,
    Rate,
    SeedKey,
    at_start,
    retry_seconds,
    spread,
    unneeded,
)

A, B, C = (SeedKey(f"host/{name}:1", "linux/amd64") for name in "abc")


def test_a_node_takes_up_what_is_new_and_lets_go_of_what_is_not_configured_any_more() -> None:
    start = at_start({A: FROM_CONFIG, B: FROM_COMMAND}, [C, C])
    assert start.new == [C]
    assert start.dropped == [A]
    assert at_start({A: FROM_CONFIG, B: FROM_COMMAND}, [A, B]) == ([], [])


def test_seeds_of_one_image_for_two_platforms_have_pins_of_their_own() -> None:
    assert A.owner != A._replace(platform="linux/arm64").owner
    assert A.owner.partition(" ")[0] == "seed"


def test_everything_but_the_complete_image_is_let_go() -> None:
    old, new = Digest.of(b"old"), Digest.of(b"new")
    assert unneeded([old, new], new) == [old]
    assert unneeded([], new) == []


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_failures_are_retried_ever_later_up_to_a_limit(chance: float) -> None:
    waits = [retry_seconds(failures, chance) for failures in range(1, 30)]
    assert waits == sorted(waits)
    assert 1.5 < waits[0] < 2.5
    assert waits[-1] == retry_seconds(10_000, chance) <= 1.1 * RETRY_MAX_SECONDS


def test_waits_are_spread_around_their_length() -> None:
    assert [spread(100, chance) for chance in (0.0, 0.5, 1.0)] == pytest.approx([90, 100, 110])


def test_rate_is_that_of_the_last_moments() -> None:
    rate = Rate()
    assert rate.sample(0.0, 0) == 0.0
    assert rate.sample(1.0, 100) == 100.0
    assert [rate.sample(second, 100) for second in (2.0, 4.0, 8.0, 12.0)][-1] == 0.0
    assert rate.sample(12.0, 300) == pytest.approx(50.0)
