"""In which order things are asked for, and how many at a time: plain decisions, time and randomness passed in.

Four classes (`schedule.Priority`). What a reader waits for goes in order and first; what nobody waits for yet is shuffled
inside a window, so that nodes that start together do not all want the same bytes, and gives way while somebody waits. For
the fill, chunks that few others have go first. Called by `fetch`; the simulator runs the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from random import Random
from typing import Final, Generic, TypeVar

from p2pgz.core.schedule import Priority

# Things of one class asked for at a time; AIMD moves it. Simulated: 32 at once from the start hurts what is needed first
WINDOW_START: Final = 8
WINDOW_MIN: Final = 1
WINDOW_MAX: Final = {
    Priority.BLOCKED_READ: 16,
    Priority.READ_AHEAD: 16,
    Priority.START_UP: 32,
    Priority.FILL: 32,
}
# While a reader is blocked, the classes that nobody waits for are held to this many
WINDOW_BESIDE_A_READER: Final = 2
# Of a list, this many stand in random order among themselves: the list stays roughly what it was
SHUFFLE_WINDOW: Final = 64

ItemT = TypeVar("ItemT", bound=Hashable)
PeerT = TypeVar("PeerT")


class Window:
    """How many at a time: one more for a windowful that went well, half as many after a refusal, once per windowful."""

    __slots__ = ("_credit", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self.size = min(WINDOW_START, limit)
        self._limit = limit
        self._credit = 0

    def good(self) -> None:
        """One came, and not late."""
        self._credit += 1
        if self._credit >= self.size:
            self._credit = 0
            self.size = min(self._limit, self.size + 1)

    def bad(self) -> None:
        """BUSY, or later than usual. Those that were under way at that time say the same and count once."""
        if self._credit >= 0:
            self.size = max(WINDOW_MIN, self.size // 2)
            self._credit = -self.size


class Order(Generic[ItemT]):
    """What is wanted, by class, and how much of it is under way. Items are whatever the caller asks for at a time."""

    def __init__(self) -> None:
        self.windows = {priority: Window(WINDOW_MAX[priority]) for priority in Priority}
        self._queues: dict[Priority, deque[ItemT]] = {priority: deque() for priority in Priority}
        self._class_of: dict[ItemT, Priority] = {}
        self._under_way: dict[ItemT, Priority] = {}

    def __len__(self) -> int:
        return len(self._class_of)

    def add(self, items: Iterable[ItemT], priority: Priority) -> None:
        """Want these. One that is wanted already moves up when the new class is more urgent, never down."""
        for item in items:
            if item in self._under_way:
                self._under_way[item] = min(priority, self._under_way[item])
            elif item not in self._class_of or priority < self._class_of[item]:
                self._class_of[item] = priority
                self._queues[priority].append(item)  # an older place in another queue is passed over

    def discard(self, item: ItemT) -> None:
        """Nobody wants it any more, or it is here."""
        self._class_of.pop(item, None)
        self._under_way.pop(item, None)

    def take(self) -> list[tuple[ItemT, Priority]]:
        """What to ask for now; it counts as under way until `done` or `discard`."""
        taken: list[tuple[ItemT, Priority]] = []
        for priority in Priority:
            queue = self._queues[priority]
            room = self._room(priority)
            while queue and room > 0:
                item = queue.popleft()
                if self._class_of.get(item) is not priority:
                    continue
                del self._class_of[item]
                self._under_way[item] = priority
                taken.append((item, priority))
                room -= 1
        return taken

    def done(self, item: ItemT, *, good: bool) -> None:
        """It has come, or (not `good`) it was refused or came late: the window of its class learns from that."""
        priority = self._under_way.pop(item, None)
        if priority is not None:
            window = self.windows[priority]
            if good:
                window.good()
            else:
                window.bad()

    def _room(self, priority: Priority) -> int:
        size = self.windows[priority].size
        if priority >= Priority.START_UP and self._reader_waits():
            size = min(size, WINDOW_BESIDE_A_READER)
        return size - sum(1 for under_way in self._under_way.values() if under_way is priority)

    def _reader_waits(self) -> bool:
        urgent = Priority.BLOCKED_READ
        return urgent in self._under_way.values() or urgent in self._class_of.values()


def shuffled(items: Sequence[ItemT], rng: Random, window: int = SHUFFLE_WINDOW) -> list[ItemT]:
    """The items in random order inside each window."""
    found: list[ItemT] = []
    for at in range(0, len(items), window):
        part = list(items[at : at + window])
        rng.shuffle(part)
        found += part
    return found


def rarest_first(items: Iterable[ItemT], copies: Callable[[ItemT], int], rng: Random) -> list[ItemT]:
    """Those that fewest others have at the front; equals in random order, so that nodes do not all pick the same."""
    mixed = list(items)
    rng.shuffle(mixed)
    return sorted(mixed, key=copies)


def of_two(candidates: Sequence[PeerT], wait_seconds: Callable[[PeerT], float], rng: Random) -> PeerT:
    """Of two at random the one with the shorter wait. Always the shortest of all would send everybody to the same one."""
    one, other = rng.choice(candidates), rng.choice(candidates)
    return one if wait_seconds(one) <= wait_seconds(other) else other
