"""Rates that hold back what nobody waits for: the sums are those of `core.pacing`, here is the waiting.

Used where bytes arrive: by the lanes of sources, by the race before it asks peers, by seeds. What a reader waits for is
charged like everything else, but waits at most as long as its own bytes take; the others pay by waiting longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from p2pgz.core.pacing import URGENT, Pace

_BACKGROUND: Final = URGENT + 1
# Somebody may begin to wait for what is being held back: how soon that is noticed
LOOK_SECONDS: Final = 0.05


def never() -> bool:
    """Nobody waits for these bytes, whatever happens."""
    return False


def always() -> bool:
    """Somebody does."""
    return True


class Throttle:
    """One rate. `await take(n)` charges n bytes and returns once they are within it; 0 means no limit."""

    def __init__(self, bytes_per_second: int = 0) -> None:
        self._pace = Pace(bytes_per_second)

    @property
    def bytes_per_second(self) -> int:
        """May be changed at any time; what waits already goes on as it was told."""
        return self._pace.bytes_per_second

    @bytes_per_second.setter
    def bytes_per_second(self, rate: int) -> None:
        self._pace.bytes_per_second = rate

    def charge(self, count: int) -> None:
        """Count bytes that came without waiting: somebody needed them all."""
        self._pace.spend(count, URGENT, trio.current_time())

    async def take(self, count: int, is_urgent: Callable[[], bool] = never) -> None:
        """Wait for the turn of `count` bytes. As soon as `is_urgent` becomes true, nobody waits for other bytes any more."""
        rate = self._pace.bytes_per_second
        if not rate:
            return  # without a checkpoint: this is on the way of every read
        now = trio.current_time()
        priority = URGENT if is_urgent() else _BACKGROUND
        self._pace.spend(count, priority, now)
        due = now + self._pace.wait_seconds(priority, now)
        if priority == URGENT:
            await trio.sleep_until(min(due, now + count / rate))
            return
        while (now := trio.current_time()) < due and not is_urgent():  # noqa: ASYNC110  # a clock sets no event
            await trio.sleep_until(min(due, now + LOOK_SECONDS))


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a node's fetching. `fill` binds the background fetch only, wherever its bytes come from."""

    fill: Throttle
    registry: Throttle
    peers: Throttle

    def limit(self, *, fill: int, registry: int, peers: int) -> None:
        """Other rates from now on, in bytes per second."""
        self.fill.bytes_per_second = fill
        self.registry.bytes_per_second = registry
        self.peers.bytes_per_second = peers

    @classmethod
    def unlimited(cls) -> Rates:
        """No limits."""
        return cls(fill=Throttle(), registry=Throttle(), peers=Throttle())

    async def whole_blob(self, count: int) -> None:
        """Bytes of a layer that is read whole from a registry: somebody waits for all of it."""
        await self.registry.take(count, always)
