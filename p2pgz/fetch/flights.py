"""Single flight: a chunk that is being fetched is fetched once, however many readers wait for it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2pgz.core.schedule import Priority
from p2pgz.errors import P2pgzError


class Flight:
    """One chunk on its way into the pool. `land()` or `fail()` ends it, once; all waiters see the same end."""

    __slots__ = (
        "_done",
        "at_source",
        "attempts",
        "chased",
        "corrupt",
        "deadline",
        "error",
        "giver",
        "hedges",
        "n",
        "on_end",
        "priority",
        "rescues",
        "started",
    )

    def __init__(self, n: int, priority: Priority, deadline: float) -> None:
        self.n = n
        self.priority = priority
        self.deadline = deadline
        self.attempts = 0
        self.corrupt = 0
        self.at_source = False
        """whether the source's lane has it, queued or running"""
        self.chased = False
        """whether peers are asked for it"""
        self.giver = b""
        """the peer that it came from; empty: the source, or the pool"""
        self.hedges = 0
        self.rescues = 0
        """how often somebody else was to ask the source, since it did not answer here"""
        self.on_end: Callable[[], None] | None = None
        self.started = trio.current_time()
        self.error: P2pgzError | None = None
        self._done = trio.Event()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def land(self) -> None:
        """The chunk is in the pool."""
        self._done.set()
        if self.on_end is not None:
            self.on_end()

    def fail(self, error: P2pgzError) -> None:
        """The chunk cannot be had; each waiter raises an error of the same type made from this one."""
        if not self._done.is_set():
            self.error = error
            self._done.set()
            if self.on_end is not None:
                self.on_end()

    async def wait(self) -> None:
        """Wait for the end; raises what the flight failed with."""
        await self._done.wait()
        if self.error is not None:
            # an exception object must not be raised by several tasks: each would grow the same traceback
            raise type(self.error)(self.error.what, hint=self.error.hint) from self.error
