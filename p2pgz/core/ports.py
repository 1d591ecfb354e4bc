"""The protocols where packages meet: registry, local layouts, pool and peers know only these.

Each has one conformance suite in `p2pgz.testing`, run on the fake and on the real implementation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from p2pgz.core.layout import SegmentTable
from p2pgz.core.media import Descriptor
from p2pgz.core.messages import Alternative
from p2pgz.core.peerid import PeerId
from p2pgz.core.reference import Reference
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import P2pgzError


class ImageSource(Protocol):
    """A repository: a registry's, or a local OCI layout. Raises ImageNotFound, AuthRefused, SourceUnavailable, ImageInvalid.

    All calls are safe to cancel, to repeat, and to run at the same time. Time-outs are the caller's.
    """

    name: str
    """what to call it in messages: `registry.example/repo`, `oci:DIR`; never holds a secret"""

    async def resolve(self, reference: Reference) -> Descriptor:
        """The descriptor of what the reference's tag or digest names (an index or a manifest).

        A digest may cost no request: the descriptor then has no media type and the size SIZE_UNKNOWN.
        """
        ...

    async def document(self, descriptor: Descriptor) -> bytes:
        """A manifest, index, config or other small blob; size and digest are checked against the descriptor."""
        ...

    def blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream exactly the bytes `start` .. `end` (exclusive) of a blob, not verified.

        Leaving the context early gives up the rest. A body that is too short or too long, or another range than asked
        for, raises SourceUnavailable. Retries that resume in the middle are the source's business.
        """
        ...


class ImageSink(Protocol):
    """Where `convert` writes an image: a registry's repository or a local OCI layout."""

    name: str

    async def has_blob(self, digest: str) -> bool:
        """Whether the blob is there already (then it need not be sent)."""
        ...

    async def put_blob(self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]) -> None:
        """Send a blob; `read` starts a new pass over its bytes and may be called again for a retry."""
        ...

    async def put_document(self, document: bytes, media_type: str, reference: Reference | None) -> Descriptor:
        """Store a manifest or index; under the reference's tag, or by digest only when it is None."""
        ...


Landed = Callable[[list[tuple[int, VerifiedChunk]]], Awaitable[None]]
"""takes chunks as they arrive, with their numbers"""


@dataclass(slots=True)
class PeerAnswer:
    """What a peer did not give: `missing` it does not have, `busy` it would give after `retry_seconds`, or others would."""

    missing: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    retry_seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()


class Holder(NamedTuple):
    """A peer that has told what it has of a swarm, and how soon it is expected to answer."""

    peer: PeerId
    has: Callable[[int], bool]
    wait_seconds: float
    bytes_per_second: float
    """0: not measured yet"""


class PeerSource(Protocol):
    """The connected peers. A swarm is the chunks of one TOC; its id is the TOC's sha256 where it is shared openly."""

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        """Learn from all peers, present and future, which chunks of the swarm they have.

        With the secret of its image (`core.sharing`): only from those that prove that they know the image, too.
        """
        ...

    def unfollow(self, swarm: bytes) -> None:
        """No more of that."""
        ...

    def holders(self, swarm: bytes, n: int) -> Sequence[PeerId]:
        """Peers that say they have chunk n, the one that should answer first at the front. Never waits."""
        ...

    def swarm_holders(self, swarm: bytes) -> Sequence[Holder]:
        """All peers with anything of the swarm, the quickest first: for decisions about many chunks. Never waits."""
        ...

    async def fetch(
        self,
        peer: PeerId,
        swarm: bytes,
        table: SegmentTable,
        chunks: Sequence[int],
        *,
        priority: int,
        landed: Landed,
    ) -> PeerAnswer:
        """Get chunks (ascending) from one peer; each lands verified, as it arrives.

        Raises ChunkCorrupt or PeerFault when the peer lost its place by it, SourceUnavailable when it is gone or too
        slow; what has landed by then counts. Safe to cancel. Time-outs are the caller's.
        """
        ...

    async def document(self, digest: bytes, *, limit_bytes: int, secret: bytes = b"") -> bytes | None:
        """A TOC, manifest or config from whichever peer has it, checked; None when none has.

        With the secret of its image: asked for by a name that others do not understand.
        """
        ...

    async def search(self, digest: bytes) -> bool:
        """Look for further peers that have this TOC, layer or document, and connect to them; whether any are connected now.

        Takes seconds; to be cancelled when it is of no use any more.
        """
        ...


class NamingPeers(Protocol):
    """Peers that tell things that have a name and no digest: each may say something else."""

    async def named(
        self,
        name: bytes,
        told: Callable[[PeerId, bytes], None],
        *,
        limit_bytes: int,
        secret: bytes,
        asked: set[PeerId],
        peers_max: int,
    ) -> None:
        """Ask connected peers that are not in `asked`, the quickest `peers_max` of them, for what they have under a name;
        they are in `asked` from then on. `told` gets each answer as it came, unchecked. With the secret of an image: asked
        for by a name that others do not understand.

        Returns when all have answered. Time-outs are the caller's.
        """
        ...

    def blame(self, peer: PeerId, error: P2pgzError) -> None:
        """The peer has lied: it loses its place."""
        ...


class IndexPeers(PeerSource, Protocol):
    """Peers that also tell of the own indexes of plain layers (`core.indexclaim`)."""

    async def index_claims(self, diff_id: bytes, told: Callable[[PeerId, bytes], None]) -> None:
        """Ask connected peers for what they say about a layer; `told` gets each answer as it came, unchecked.

        Returns when all have answered. Time-outs are the caller's.
        """
        ...

    def blame(self, peer: PeerId, error: P2pgzError) -> None:
        """The peer has lied, as it turned out later: it loses its place."""
        ...
