"""How much peers may be sending us at a time, over all connections: what was asked of them and is not put away yet.

One per exchange. A chunk counts from the moment it is asked for until whoever asked has it on the disk, so a disk that does
not keep up, or hangs, stops the asking instead of filling memory. What comes from registries has a bound of its own
(`Pool.arrivals`). Nobody who holds bytes waits here for something that only another holder could give: each needs its own
peer and the disk. Must never let what nobody waits for take all of it.
"""

from __future__ import annotations

from typing import Final, Protocol

from p2pgz.core.schedule import Priority

# A second of a line of 1 Gbit/s, and eight connections with their whole window
ARRIVING_MAX_BYTES: Final = 128 << 20
# Of it for what no reader waits for: fetches of whole images must not keep a reader waiting, whoever they are stuck with
BACKGROUND_SHARE: Final = 0.75


class Waiter(Protocol):
    """A fetch that is to look again whether there is room."""

    def wake(self) -> None:
        """There may be room now."""
        ...


class Arriving:
    """Bytes on their way, and who waits for others to be put away."""

    def __init__(self, limit_bytes: int = ARRIVING_MAX_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._waiting: dict[Waiter, tuple[int, int]] = {}

    def admits(self, size: int, priority: int) -> bool:
        """Whether so much more may be asked for. A single chunk always may, however large it is."""
        return not self.bytes or size <= self._room(priority)

    def _room(self, priority: int) -> int:
        share = 1.0 if priority <= Priority.READ_AHEAD else BACKGROUND_SHARE
        return int(self.limit_bytes * share) - self.bytes

    def take(self, size: int) -> None:
        """So much has been asked for."""
        self.bytes += size

    def give(self, size: int) -> None:
        """So much was put away, or will not come: those who waited for it look again, the most urgent first."""
        self.bytes -= size
        self.pass_on()

    def pass_on(self) -> None:
        """Wake those who wait, as far as there is room, the most urgent first. Also called by who was woken in vain."""
        promised = 0
        for waiter, (priority, wanted) in sorted(self._waiting.items(), key=_priority_of):
            if self.bytes + promised and promised + wanted > self._room(priority):
                break
            promised += wanted
            del self._waiting[waiter]
            waiter.wake()

    def wait(self, waiter: Waiter, size: int, priority: int) -> None:
        """Wake this one when there is room for so much."""
        self._waiting[waiter] = priority, size

    def leave(self, waiter: Waiter) -> None:
        """It does not wait any more."""
        self._waiting.pop(waiter, None)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)


def _priority_of(item: tuple[Waiter, tuple[int, int]]) -> int:
    return item[1][0]
