"""Who reads the pool's files, as eviction must know it (`pool.users`): mounted images and their processes."""

from __future__ import annotations

from collections.abc import Sequence

from p2pgz.mount.mounts import Mounts
from p2pgz.mount.roster import listening
from p2pgz.mount.servers import Servers
from p2pgz.pool.segment import Segment


class SegmentUsers:
    """The mounts of a node and the processes behind them."""

    def __init__(self, mounts: Mounts, servers: Servers) -> None:
        self._mounts = mounts
        self._servers = servers

    def mounted(self) -> list[Segment]:
        """The segments of all mounted images."""
        return self._mounts.segments()

    def may_punch(self) -> bool:
        """Whether every process that may answer reads from the pool can be asked: false until an earlier node's were taken
        over, and while one that could not be is there."""
        if not self._mounts.settled:
            return False
        self._mounts.strangers = listening(self._mounts.strangers)
        return not self._mounts.strangers

    def is_mapped(self, segment: Segment) -> bool:
        """Whether a process may answer reads from a segment's file, or is about to."""
        return not self.may_punch() or self._servers.is_mapped(segment)

    def invalidate(self, segment: Segment, chunks: Sequence[int]) -> None:
        """Have kernels forget what they cached of chunks (ascending) that were wrong on the disk and are absent now."""
        self._servers.invalidate(segment, chunks)

    @property
    def reads(self) -> int:
        """Changes, within a second or two, when somebody reads through a mount what the page cache does not have."""
        return self._servers.reads

    async def acknowledge(self, segment: Segment) -> None:
        """Return when no reply from bytes whose bits are cleared now is in flight. The caller sets a time limit."""
        await self._servers.acknowledge(segment)
