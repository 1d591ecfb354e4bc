"""How many connections to peers there may be, and which of them makes room for a new one.

One for each exchange. A connection that is in use never has to go: then the new one is refused. Of the others the first to
go is one to a peer that has nothing of what we follow, of those the one that was idle longest. Descriptors are the hard
limit: `connections_within` says how many are left for connections.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Final

from p2pgz.p2p.connection import Connection

# design, section 6: the connection budget of the chunk plane
CONNECTIONS_MAX: Final = 128
# a connection that has just been made is about to be used; one that we want ourselves may take the place of more
IDLE_FOR_OTHERS_SECONDS: Final = 10.0
IDLE_FOR_OURSELVES_SECONDS: Final = 2.0
# pool segments, mounts, registry connections, libp2p's connections, handshakes of strangers
DESCRIPTORS_RESERVED: Final = 640
CONNECTIONS_LEAST: Final = 8
# enough for anything that a node does; a limit of a thousand millions makes some programs slow that go through all
DESCRIPTORS_WANTED: Final = 65_536


class Budget:
    """`limit` connections, and what became of those beyond."""

    def __init__(self, limit: int = CONNECTIONS_MAX) -> None:
        self.limit = limit
        self.refused = 0
        """connections that found no room"""
        self.closed = 0
        """connections that made room"""

    def victim(
        self, connections: Iterable[Connection], now: float, *, for_ourselves: bool
    ) -> Connection | None:
        """The connection that has to go for a new one; None when the new one is refused instead."""
        patience = IDLE_FOR_OURSELVES_SECONDS if for_ourselves else IDLE_FOR_OTHERS_SECONDS
        idle = [
            c
            for c in connections
            if not (c.is_sending or c.downloads.waiting) and now - c.used_at >= patience
        ]
        if not idle:
            self.refused += 1
            return None
        self.closed += 1
        return min(idle, key=lambda c: (c.bitmaps.any, c.used_at))


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may and can need; how many that are."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if most == resource.RLIM_INFINITY else min(most, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


def connections_within(descriptors: int, wanted: int) -> int:
    """How many connections there may be: what the configuration wants, as far as the process's descriptors go."""
    return min(wanted, max(CONNECTIONS_LEAST, descriptors - DESCRIPTORS_RESERVED))
