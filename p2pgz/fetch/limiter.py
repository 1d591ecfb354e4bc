"""A token bucket for bytes: how the background fetch leaves the link to others."""

from __future__ import annotations

import trio

# Up to this much may pass at once after a pause; a smaller bucket would stutter at high rates
BURST_SECONDS = 0.25


class RateLimiter:
    """`await take(n)` returns once n bytes are within the rate; 0 means no limit. For one or several tasks."""

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Account for `count` bytes and wait until they fit."""
        if not self.bytes_per_second:
            await trio.lowlevel.checkpoint()
            return
        now = trio.current_time()
        self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self.bytes_per_second
        await trio.sleep_until(max(now, self._free_at))
