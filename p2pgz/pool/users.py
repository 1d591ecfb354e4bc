"""What the evictor must know of those who read the pool's files without asking the pool: a port.

The mounts and their processes are behind it in a node (`mount.users`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import trio

from p2pgz.pool.segment import Segment


class Users(Protocol):
    """What the evictor must know of those who use segments."""

    def mounted(self) -> Collection[Segment]:
        """Segments of mounted images."""
        ...

    def is_mapped(self, segment: Segment) -> bool:
        """Whether a process may answer reads from this segment's file, or is about to."""
        ...

    def may_punch(self) -> bool:
        """False while a process that we cannot ask may answer reads from some segment."""
        ...

    async def acknowledge(self, segment: Segment) -> None:
        """Return when no reply from bytes whose bits are cleared now is in flight."""
        ...


class NoUsers:
    """Nobody reads but this process."""

    def mounted(self) -> Collection[Segment]:
        """See Users."""
        return ()

    def is_mapped(self, segment: Segment) -> bool:
        """See Users."""
        return False

    def may_punch(self) -> bool:
        """See Users."""
        return True

    async def acknowledge(self, segment: Segment) -> None:
        """See Users."""
        await trio.lowlevel.checkpoint()
