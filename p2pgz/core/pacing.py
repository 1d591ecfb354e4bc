"""A rate that what is urgent is not held up by: plain arithmetic, time passed in.

Called by `p2p.uploads`. Bytes of class 0 (somebody waits for them) wait only for others of their class; all other classes
pay for them by waiting longer. So the rate holds over time, and a blocked read never waits for bytes that nobody needs yet.
"""

from __future__ import annotations

from typing import Final

# what may go out at once after a pause; less would stutter at high rates
BURST_SECONDS: Final = 0.25
URGENT: Final = 0


class Pace:
    """A budget of bytes per second; 0 means no limit."""

    __slots__ = ("_free_at", "_urgent_at", "bytes_per_second")

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._urgent_at = 0.0

    def wait_seconds(self, priority: int, now: float) -> float:
        """How long until a class may go on; whoever may, sends first and is charged then."""
        if not self.bytes_per_second:
            return 0.0
        return max(0.0, (self._urgent_at if priority <= URGENT else self._free_at) - now)

    def spend(self, count: int, priority: int, now: float) -> None:
        """Charge for bytes; fewer than none gives back what was charged too much."""
        if not self.bytes_per_second:
            return
        seconds = count / self.bytes_per_second
        self._free_at = max(self._free_at, now - BURST_SECONDS) + seconds
        if priority <= URGENT:
            self._urgent_at = max(self._urgent_at, now - BURST_SECONDS) + seconds
