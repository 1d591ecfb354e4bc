"""Manifests, configs and TOCs by digest: from the pool, from peers, or from the image's source, whichever has it first.

Called by the image opener. Peers get a short head start, since what they have costs the registry nothing; a source that
fails does not end the search while peers are still asked. Whatever comes is checked against its digest before it is kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.ports import PeerSource
from p2pgz.errors import P2pgzError, PoolFull
from p2pgz.fetch.leasing import Leasing
from p2pgz.fetch.shares import Access, Shares
from p2pgz.fetch.together import Together
from p2pgz.pool.pool import Pool

log = structlog.get_logger(component="fetch")

# A peer in the rack answers in 2 ms, one in another region in 100: longer would be felt at every mount
HEAD_START_SECONDS: Final = 0.15
# All peers together, when nobody else can answer
PEERS_SECONDS: Final = 10.0
_OPEN: Final = Access()


class Documents:
    """Gets and keeps documents. `peers` None: this node has none. `access`: where they are kept and how peers are asked."""

    def __init__(
        self,
        pool: Pool,
        peers: PeerSource | None,
        leasing: Leasing | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._pool = pool
        self._peers = peers
        self._leasing = leasing
        self._shares = shares
        self._calls: Together[bytes] = Together()

    async def get(
        self,
        digest: Digest,
        *,
        limit_bytes: int,
        from_source: Callable[[], Awaitable[bytes]],
        source: object = None,
        access: Access = _OPEN,
    ) -> bytes:
        """The document; raises what the source raises when no peer has it either.

        Those who name the same `source` for the same document wait for one call of it.
        """
        kept = await self._pool.get_object(digest, domain=access.domain)
        if kept is not None:
            return kept
        if source is None:
            return await self._fetch(digest, limit_bytes, from_source, access)

        async def fetch() -> bytes:
            return await self._fetch(digest, limit_bytes, from_source, access)

        return await self._calls.run((source, digest, limit_bytes, access), fetch)

    async def _fetch(
        self, digest: Digest, limit_bytes: int, from_source: Callable[[], Awaitable[bytes]], access: Access
    ) -> bytes:
        peers = self._peers
        if peers is None or not access.peers:
            return await self.keep(digest, await from_source(), access)
        found: list[bytes] = []
        failures: list[P2pgzError] = []
        head_start = trio.Event()

        async with trio.open_nursery() as nursery:

            async def ask_peers() -> None:
                document = await self.from_peers(digest, limit_bytes=limit_bytes, access=access)
                if document is None and not access.secret:
                    head_start.set()  # the source is not to wait for what may take seconds
                    with trio.move_on_after(PEERS_SECONDS):
                        if await peers.search(digest.raw):
                            document = await self.from_peers(digest, limit_bytes=limit_bytes, access=access)
                if document is not None:
                    found.append(document)
                    nursery.cancel_scope.cancel()
                head_start.set()

            async def ask_source() -> None:
                with trio.move_on_after(HEAD_START_SECONDS):
                    await head_start.wait()
                try:
                    found.append(await self._by_lease(digest, limit_bytes, from_source, access))
                except P2pgzError as error:
                    failures.append(error)
                    return
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask_peers)
            nursery.start_soon(ask_source)
        if not found:
            raise failures[0]
        kept = await self.keep(digest, found[0], access)
        self.landed(digest, access)
        return kept

    async def _by_lease(
        self, digest: Digest, limit_bytes: int, from_source: Callable[[], Awaitable[bytes]], access: Access
    ) -> bytes:
        if not self.leases(access) or self._leasing is None:
            return await from_source()
        data, _ = await self._leasing.documents.get(digest.raw, limit_bytes=limit_bytes, fetch=from_source)
        return data

    async def by_lease(
        self, digest: Digest, *, limit_bytes: int, fetch: Callable[[], Awaitable[bytes]], access: Access
    ) -> bytes | None:
        """What another member gives while it asks the source, for all; None when it is this node's turn and `fetch`,
        which keeps the document, has ended. Raises what `fetch` raises."""
        assert self._leasing is not None, "where `leases` says so"
        data, fetched = await self._leasing.documents.get(digest.raw, limit_bytes=limit_bytes, fetch=fetch)
        if fetched:
            self.landed(digest, access)
            return None
        await self.keep(digest, data, access)
        self.landed(digest, access)
        return data

    def landed(self, digest: Digest, access: Access) -> None:
        """It is kept: others may have it from here."""
        if self.leases(access) and self._leasing is not None and self._shares is not None:
            self._shares.open_early(digest)
            self._leasing.documents.landed(digest.raw)

    def leases(self, access: Access) -> bool:
        """Whether others may want the same now; only of what every member may have."""
        return (
            self._leasing is not None and access.peers and not access.secret and self._leasing.has_company()
        )

    async def from_peers(
        self, digest: Digest, *, limit_bytes: int, seconds: float = PEERS_SECONDS, access: Access = _OPEN
    ) -> bytes | None:
        """The document if a connected peer has it, not kept yet; None otherwise."""
        if self._peers is None or not access.peers:
            return None
        with trio.move_on_after(seconds):
            return await self._peers.document(digest.raw, limit_bytes=limit_bytes, secret=access.secret)
        return None

    async def keep(self, digest: Digest, document: bytes, access: Access = _OPEN) -> bytes:
        """Keep a document whose digest is checked; a full disk costs the next one who needs it a request, nothing else."""
        try:
            await self._pool.put_object(digest, document, domain=access.domain)
        except PoolFull as error:
            log.warning("document.not_kept", digest=str(digest), reason=error.what)
        return document
