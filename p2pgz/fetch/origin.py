"""Where the bytes of a segment come from when no pool has them: one blob at one source, and what is known about the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pgz.core.media import Descriptor
from p2pgz.core.ports import ImageSource
from p2pgz.core.schedule import BlobOrder, LinkEstimate, Priority, SequentialReads
from p2pgz.errors import P2pgzError
from p2pgz.fetch.flights import Flight
from p2pgz.pool.pool import Segment


@dataclass(slots=True, kw_only=True)
class Origin:
    """A segment, its blob, and everything the dispatcher keeps about them.

    `streamed` blobs (layers nobody converted) have no ranges to ask for: they are read whole or not at all. `requested`
    and `received_bytes` count blob requests and their payload.
    """

    segment: Segment
    source: ImageSource
    descriptor: Descriptor
    streamed: bool = False
    peers: bool = True
    """whether they may be asked: not for images that are not shared"""
    secret: bytes = b""
    """of an image that only those who know it share with each other (`core.sharing`)"""
    refused: P2pgzError | None = None
    """why nothing of it may be read any more"""
    link: LinkEstimate = field(default_factory=LinkEstimate)
    """shared by all segments of a source"""
    order: BlobOrder = field(init=False)
    readers: SequentialReads = field(default_factory=SequentialReads)
    flights: dict[int, Flight] = field(default_factory=dict)
    """every chunk on its way: queued or being fetched"""
    wanted: dict[int, Priority] = field(default_factory=dict)
    """the queued ones"""
    listed: set[int] = field(default_factory=set)
    """those of a start-up list that is being fetched: their neighbours are on it, or are not needed"""
    leased: bool = False
    """whether others want it as well, so that nothing is fetched that was not leased"""
    requested: int = 0
    received_bytes: int = 0

    def __post_init__(self) -> None:
        table = self.segment.table
        self.order = BlobOrder(table.blob_offset, table.inner)

    def absent(self, n: int) -> bool:
        """Whether chunk n is neither here nor being fetched (a queued one is absent)."""
        return not self.segment.presence.has(n) and (n not in self.flights or n in self.wanted)
