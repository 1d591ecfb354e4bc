"""What the exchange needs to know of this host: the ports through which it gets chunks to give away.

Implemented by `fetch.offers` on the pool, and by fakes. What an offer gives out must be verified in this boot; images that
must not be shared have no offer, and those for provers are found only under names that others cannot compute: so "unknown"
and "not allowed" are the same answer, and take the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Offer(Protocol):
    """The chunks of one swarm (a TOC), as far as this host has them."""

    chunk_count: int
    ratio: float
    """how small the layer's own writer made it: compressed bytes by raw bytes"""

    def size(self, n: int) -> int:
        """Bytes of chunk n."""
        ...

    def has(self, n: int) -> bool:
        """Whether chunk n is here and verified."""
        ...

    def bits(self) -> bytes:
        """The whole bitmap, as BITMAP frames carry it."""
        ...

    def read_cached(self, n: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from chunk n if that takes no waiting for the disk; false when it would, or the chunk is gone."""
        ...

    async def read(self, n: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from chunk n; false when the chunk is gone."""
        ...


class Offers(Protocol):
    """Everything this host gives to peers."""

    def swarm(self, swarm: bytes) -> Offer | None:
        """The offer of a swarm id (for images shared with everyone: the TOC's sha256), or None."""
        ...

    def version(self) -> int:
        """Another number whenever any bitmap may have changed, or who may see it."""
        ...

    async def document(self, digest: bytes) -> bytes | None:
        """A TOC, manifest or config that may be given away, or None."""
        ...

    def index(self, diff_id: bytes) -> bytes | None:
        """What may be said about the own index of a plain layer: a small document of `core.indexclaim`, or None."""
        ...

    def secret(self, name: bytes) -> bytes | None:
        """The secret of the image that has a swarm or document of this name, if there is one for provers.

        One look into a table, whatever the answer: the caller's check of the proof follows in either case.
        """
        ...

    def proven_swarm(self, name: bytes) -> Offer | None:
        """The offer of a swarm for a peer that has proven that it knows the image."""
        ...

    async def proven_document(self, name: bytes) -> bytes | None:
        """A document for such a peer."""
        ...


class WantedChunks(Protocol):
    """What a chunk must be; `core.layout.SegmentTable` is one."""

    @property
    def size(self) -> Sequence[int] | memoryview:
        """Bytes of each chunk, by its number."""
        ...

    def digest(self, n: int) -> bytes:
        """The sha256 of chunk n, 32 raw bytes."""
        ...
