"""What `fetch.leasing` keeps of each layer, and what it needs to know of the other members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import structlog

from p2pgz.core.crowdmsg import CrowdFrame, Member
from p2pgz.core.extents import Extents
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.origin import Origin

log = structlog.get_logger(component="leases")

NO_LEASES: Final[dict[str, Any]] = {
    "fetched_chunks": 0,
    "followed_chunks": 0,
    "direct_chunks": 0,
    "rescued_chunks": 0,
    "granted": 0,
}
"""the status of a node that takes no part in them"""


class LeaseLinks(Protocol):
    """The other members. `p2p.membership.Members` is one."""

    def now(self) -> float:
        """Seconds; the clock of everything about leases."""
        ...

    def lease_view(self) -> int:
        """Another number when `lease_members` may be others."""
        ...

    def lease_members(self) -> dict[bytes, Member]:
        """Those that take part in leases, this node among them; only itself when it hears nobody."""
        ...

    def send(self, peer: bytes, frame: CrowdFrame) -> None:
        """Connects first if need be; says `lost` when that fails."""
        ...

    def has(self, swarm: bytes, n: int) -> bool:
        """Whether a chunk is here and offered."""
        ...

    def shares(self, peer: bytes, swarm: bytes) -> bool:
        """Whether that peer may have chunks of the swarm."""
        ...

    async def document(self, peer: bytes, digest: bytes, limit_bytes: int) -> bytes | None:
        """A document from that peer, checked; None when it does not have it, or is not connected."""
        ...

    def held(self, swarm: bytes) -> int:
        """The chunks that connected peers say they have, as bits."""
        ...

    def tells(self, peer: bytes, swarm: bytes, n: int) -> bool | None:
        """Whether that peer says that it has a chunk; None when it is not connected."""
        ...

    def heard(self) -> Iterable[tuple[bytes, float]]:
        """When something last came from each connected peer."""
        ...


class LeaseLayer:
    """One layer in which something is leased."""

    __slots__ = ("extents", "fetching", "mask", "origin", "swarm", "waiting")

    def __init__(self, swarm: bytes, origin: Origin) -> None:
        table = origin.segment.table
        self.swarm = swarm
        self.origin = origin
        self.extents = Extents(origin.order, table.blob_offset, table.blob_end)
        self.waiting: dict[int, Flight] = {}
        self.mask = 0
        """the chunks that are waited for, as bits"""
        self.fetching: set[int] = set()
        """those asked of the registry by lease"""

    def wait_for(self, flight: Flight) -> None:
        """Look for its end."""
        self.waiting[flight.n] = flight
        self.mask |= 1 << flight.n

    def by_extent(self, chunks: Iterable[int]) -> dict[int, list[int]]:
        """Which chunks belong to which extent."""
        found: dict[int, list[int]] = defaultdict(list)
        for n in chunks:
            found[self.extents.of[n]].append(n)
        return found


@contextmanager
def guarded() -> Iterator[None]:
    """A bug in here must not end the node: readers go to the registry at their deadline."""
    try:
        yield
    except Exception:
        log.exception("leases.bug")
