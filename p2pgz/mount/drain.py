"""Stop reading a device that another process goes on with, and lose none of what it announced to us. Used by `fs`.

libfuse reads a request and throws it away when the session was told to exit between the poll and that read (`if
(fuse_session_exited(se)) return 0` after the read, lib/fuse_lowlevel.c of 3.14): its reader would then wait for ever. A task
that the poll woke always reads before the next poll, so the flag is set just before a poll, when none is on its way.
"""

from __future__ import annotations

from collections.abc import Callable

import trio


class _BeforePoll(trio.abc.Instrument):
    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self.done = False

    def before_io_wait(self, timeout: float) -> None:
        if not self.done:
            self.done = True
            self._action()


async def before_poll(action: Callable[[], object]) -> None:
    """Call `action` at a moment when every task that was woken by a descriptor has run; it must not raise."""
    pause = _BeforePoll(action)
    trio.lowlevel.add_instrument(pause)
    try:
        while not pause.done:  # also keeps the poll short, whose time limit was set before the action
            await trio.lowlevel.checkpoint()
    finally:
        trio.lowlevel.remove_instrument(pause)
