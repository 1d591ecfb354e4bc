"""A simulated network: a clock, links with rates and delays, processors that take time. For `testing.sim` and its tests.

Nothing in here knows p2pgz. Events run in the order of their time, equal times in the order they were made, so that a
seed gives the same run each time. A link sends one piece at a time, urgent classes first; a piece takes the time of the
sender's or the receiver's rate, whichever ends later, and nothing is lost but what was on its way to or from the dead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

MBIT: Final = 125_000.0  # bytes per second


class SimClock:
    """Time, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something at a time (now, if that is over)."""
        self.events += 1
        heapq.heappush(self._queue, (max(when, self.now), self.events, action))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let time pass until `done`, or the end."""
        while self._queue and not done():
            when, _, action = heapq.heappop(self._queue)
            if when > until:
                self.now = until
                return
            self.now = when
            action()


class Processor:
    """One core: work is done one after the other."""

    __slots__ = ("_clock", "busy_seconds", "free_at")

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self.free_at = 0.0
        self.busy_seconds = 0.0

    def after(self, seconds: float) -> float:
        """When a piece of work that comes now is done."""
        self.free_at = max(self.free_at, self._clock.now) + seconds
        self.busy_seconds += seconds
        return self.free_at


class Uplink:
    """The sending side of a link: pieces wait by class, then receivers take turns, then in order."""

    __slots__ = (
        "_clock",
        "_queue",
        "_round",
        "_rounds",
        "_sending",
        "_sent",
        "bytes_per_second",
        "sent_bytes",
    )

    def __init__(self, clock: SimClock, bytes_per_second: float) -> None:
        self._clock = clock
        self._queue: list[tuple[int, int, int, int, float, Downlink, Callable[[], None]]] = []
        self._round = 0
        self._rounds: dict[int, int] = {}  # receivers that wait, and the round that their last piece is in
        self._sending = False
        self._sent = 0
        self.bytes_per_second = bytes_per_second
        self.sent_bytes = 0

    def send(self, size: int, priority: int, delay: float, to: Downlink, arrived: Callable[[], None]) -> None:
        """Send a piece; `arrived` runs when all of it is there."""
        self._sent += 1
        turn = self._rounds[id(to)] = max(self._round, self._rounds.get(id(to), 0)) + 1
        heapq.heappush(self._queue, (priority, turn, self._sent, size, delay, to, arrived))
        if not self._sending:
            self._next()

    def _next(self) -> None:
        self._sending = bool(self._queue)
        if not self._queue:
            self._rounds.clear()
            return
        _, turn, _, size, delay, to, arrived = heapq.heappop(self._queue)
        self._round = max(self._round, turn - 1)
        self.sent_bytes += size
        out = self._clock.now + size / self.bytes_per_second
        self._clock.at(out, self._next)
        self._clock.at(to.take(size, self._clock.now + delay, out + delay), arrived)


class Downlink:
    """The receiving side of a link."""

    __slots__ = ("_free_at", "bytes_per_second", "received_bytes")

    def __init__(self, bytes_per_second: float) -> None:
        self._free_at = 0.0
        self.bytes_per_second = bytes_per_second
        self.received_bytes = 0

    def take(self, size: int, begins: float, ends: float) -> float:
        """When a piece is there that the sender sends between these times."""
        self.received_bytes += size
        self._free_at = max(ends, max(self._free_at, begins) + size / self.bytes_per_second)
        return self._free_at
