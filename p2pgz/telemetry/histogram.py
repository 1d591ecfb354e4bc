"""How often something took how long: counts in buckets, which the node's metrics show.

Used by whoever makes something wait; read by `web.metrics`. Cheap enough for every chunk; the library that writes metrics
is loaded when somebody asks for them first.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

# from a read of memory to the deadline of a reader, three for each power of ten
BOUNDS_SECONDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)


class Histogram:
    """Durations since the start."""

    __slots__ = ("counts", "total_seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        """how many took at most as long as each bound and longer than the one before; the last: longer than all"""
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.total_seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many took at most that long, as Prometheus has them."""
        found: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(str, BOUNDS_SECONDS), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append((bound, so_far))
        return found
