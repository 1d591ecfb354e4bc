"""What a peer says it has, and when it is taken for a liar."""

from __future__ import annotations

import pytest

from p2pgz.core.messages import Bitmap, BitmapDelta
from p2pgz.errors import PeerFault
from p2pgz.p2p.bitmaps import FOLLOWED_MAX, LIES_MAX, Bitmaps, PeerLies

SWARM, OTHER = b"s" * 32, b"o" * 32


def followed(count: int = 40, bits: bytes = b"\xff" * 5) -> Bitmaps:
    bitmaps = Bitmaps()
    assert bitmaps.follow(SWARM)
    bitmaps.on_bitmap(Bitmap(SWARM, count, bits))
    return bitmaps


def test_changes_are_applied_in_order() -> None:
    bitmaps = followed(10, b"\x01\x00")
    assert [n for n in range(12) if bitmaps.has(SWARM, n)] == [0]
    bitmaps.on_delta(BitmapDelta(SWARM, ((2, 3), (9, 1)), ((0, 1),)))
    assert [n for n in range(12) if bitmaps.has(SWARM, n)] == [2, 3, 4, 9]
    assert bitmaps.count(SWARM) == 4
    assert bitmaps.count(OTHER) == 0
    bitmaps.on_bitmap(Bitmap(SWARM, 0, b""))
    assert not bitmaps.has(SWARM, 2)


def test_bitmaps_nobody_asked_for_are_a_fault_but_late_ones_are_not() -> None:
    bitmaps = followed()
    with pytest.raises(PeerFault, match="do not follow"):
        bitmaps.on_bitmap(Bitmap(OTHER, 0, b""))
    assert bitmaps.unfollow(SWARM)
    assert not bitmaps.unfollow(SWARM)
    bitmaps.on_bitmap(Bitmap(SWARM, 8, b"\xff"))
    bitmaps.on_delta(BitmapDelta(SWARM, ((0, 1),)))
    assert not bitmaps.has(SWARM, 0)
    assert not bitmaps


def test_changes_past_the_end_are_a_fault() -> None:
    with pytest.raises(PeerFault, match="does not have"):
        followed(10, b"\xff\x03").on_delta(BitmapDelta(SWARM, ((9, 2),)))


def test_broken_promises_are_struck_off_and_counted() -> None:
    bitmaps = followed()
    for n in range(LIES_MAX):
        bitmaps.was_missing(SWARM, n)
        bitmaps.was_missing(SWARM, n)  # it is struck off: no further promise is broken
    assert bitmaps.lies == LIES_MAX
    bitmaps.was_missing(OTHER, 1)
    with pytest.raises(PeerLies):
        bitmaps.was_missing(SWARM, LIES_MAX)


def test_no_more_swarms_than_the_limit_are_followed() -> None:
    bitmaps = Bitmaps()
    for n in range(FOLLOWED_MAX):
        assert bitmaps.follow(n.to_bytes(32, "big"))
    assert not bitmaps.follow(SWARM)
    assert not bitmaps.follow(bytes(32))
