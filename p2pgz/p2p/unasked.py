"""How often a peer may send what nobody has asked for: JOIN, BITMAP_DELTA, FORGET, PING and their like.

One `Unasked` per connection, which wraps the handlers of such frames. Requests have limits of their own, answers are bounded
by what was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio

from p2pgz.errors import PeerFault

# each costs us up to 50 us; a peer joins 1 024 swarms at once at most, and tells of changes 20 times a second
UNASKED_MAX: Final = 4096
UNASKED_PER_SECOND: Final = 512

Handle = Callable[[Any], None]


class Unasked:
    """The frames of one peer, and how fast they are forgiven."""

    __slots__ = ("_since", "frames")

    def __init__(self) -> None:
        self.frames = 0.0
        self._since = trio.current_time()

    def counted(self, handle: Handle) -> Handle:
        """The handler of a frame that the peer may send whenever it likes, but not as often as it likes."""

        def count(frame: Any) -> None:
            self.frames += 1
            if self.frames > UNASKED_MAX:
                raise PeerFault("a flood of frames that nobody asked for")
            handle(frame)

        return count

    def look(self, now: float) -> None:
        """Time has passed."""
        self.frames = max(0.0, self.frames - (now - self._since) * UNASKED_PER_SECOND)
        self._since = now
