"""The exchange: every connection to a peer, who may have one, and how chunks are got through them.

`Exchange` is the `PeerSource` of fetch/ and what the listener hands TLS connections to. It owns the connections' tasks,
keeps their number within a budget, makes peers lose their place for faults, and tells followers how bitmaps change. It
never decides between peers and registry: that is the race's business.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.hello import Refused
from p2pgz.core.messages import GoodbyeReason
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder, Landed, PeerAnswer
from p2pgz.core.standing import Fault, Standing
from p2pgz.errors import ChunkCorrupt, P2pgzError, SourceUnavailable
from p2pgz.p2p import tending
from p2pgz.p2p.arriving import Arriving
from p2pgz.p2p.asking import PeerBusy
from p2pgz.p2p.budget import Budget
from p2pgz.p2p.connection import Connection
from p2pgz.p2p.dialling import Dialler
from p2pgz.p2p.handshake import Credentials, Handshaken, accept, say_goodbye
from p2pgz.p2p.offers import Offers, WantedChunks
from p2pgz.p2p.uploads import Uploads
from p2pgz.p2p.watcher import NotTaken, Watcher

log = structlog.get_logger(component="peers")

# both ends may dial at once, and a restarted peer comes before we notice that it was gone
PER_PEER_MAX: Final = 4
ACCEPT_SECONDS: Final = 10.0
HANDSHAKES_MAX: Final = 64
# A document is small or rare: three peers at a time find one quickly and cost little when none has it
DOCUMENT_ASKS_AT_ONCE: Final = 3
DOCUMENT_SECONDS: Final = 5.0
# who is busy again and again may as well not have it
DOCUMENT_BUSY_ASKS: Final = 20
DOCUMENT_BUSY_MAX_SECONDS: Final = 0.5
# those that know a layer are likely among the quickest; each answer is a few hundred bytes
INDEX_ASKS_MAX: Final = 16
# of thousands of ids that one host may have made, the newest will do
FAULTY_SHOWN: Final = 64


class Exchange:
    """All connections of this node. Made by `Exchange.open`."""

    def __init__(
        self, credentials: Credentials, offers: Offers, uploads: Uploads, nursery: trio.Nursery
    ) -> None:
        self._credentials = credentials
        self._offers = offers
        self.uploads = uploads
        self._nursery = nursery
        self._connections: dict[PeerId, list[Connection]] = {}
        self._followed: dict[bytes, int] = {}
        self._secrets: dict[bytes, bytes] = {}
        self._handshakes = 0
        self.accepted = 0
        """connections that peers made to us, and proved themselves on"""
        self.admission = credentials.admission
        self.standing = Standing()
        self.budget = Budget()
        self.watchers: list[Watcher] = []
        self.arriving = Arriving()
        self.dialler = Dialler(credentials, self.standing, nursery, self.connection, self._adopt)
        self.chunks = self.bytes = self._dropped_bytes = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, credentials: Credentials, offers: Offers, uploads: Uploads
    ) -> AsyncIterator[Exchange]:
        """An exchange whose connections live as long as the context; at its end peers are told goodbye."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            exchange = cls(credentials, offers, uploads, nursery)
            nursery.start_soon(tending.tell, exchange.connections, offers)
            nursery.start_soon(tending.watch, exchange.connections)
            try:
                yield exchange
            except Exception as error:  # noqa: BLE001  # goes on below, not wrapped in a group
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    await exchange._goodbye()
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    @property
    def own_id(self) -> PeerId:
        """Our peer id."""
        return self._credentials.identity.peer_id

    def connections(self) -> list[Connection]:
        """Those that are open."""
        return [c for group in self._connections.values() for c in group if not c.ended]

    def connection(self, peer: PeerId) -> Connection | None:
        """The best open connection to a peer."""
        group = [c for c in self._connections.get(peer, ()) if not c.ended]
        return min(group, key=Connection.expected_seconds, default=None)

    # --- coming together

    async def accept(self, raw: trio.abc.Stream) -> None:
        """Take over an incoming connection: closes it, or owns it from now on."""
        if self._handshakes >= HANDSHAKES_MAX:
            await raw.aclose()
            return
        self._handshakes += 1
        try:
            with trio.fail_after(ACCEPT_SECONDS):
                ends = await accept(raw, self._credentials)
        except Refused as error:
            log.warning("peer.refused", reason=str(error))
            await trio.aclose_forcefully(raw)
            return
        except (P2pgzError, trio.TooSlowError, trio.BrokenResourceError) as error:
            log.debug("peer.handshake_failed", reason=str(error))
            await trio.aclose_forcefully(raw)
            return
        finally:
            self._handshakes -= 1
        self.accepted += 1
        refusal = self._refusal(ends.peer, dialled=False)
        if refusal is not None:
            await say_goodbye(ends.stream, refusal)
            await trio.aclose_forcefully(raw)
            return
        self._nursery.start_soon(self._run, self._add(ends))

    async def connect(
        self, host: str, port: int, *, expected: PeerId | None = None, insist: bool = False
    ) -> Connection:
        """An open connection to the peer there; see `Dialler.connect`."""
        return await self.dialler.connect(host, port, expected=expected, insist=insist)

    def _adopt(self, ends: Handshaken) -> Connection:
        """Take over a connection that was dialled; the caller closes it when it is refused."""
        refusal = self._refusal(ends.peer, dialled=True)
        if refusal is not None:
            raise NotTaken(f"peer {ends.peer} is not connected to: {refusal.name.lower()}")
        self.standing.reached(ends.peer)
        connection = self._add(ends)
        self._nursery.start_soon(self._run, connection)
        return connection

    def _refusal(self, peer: PeerId, *, dialled: bool) -> GoodbyeReason | None:
        if self.standing.banned(peer, trio.current_time()):
            return GoodbyeReason.FAULT
        if len(self._connections.get(peer, ())) >= PER_PEER_MAX:
            return GoodbyeReason.TOO_MANY
        connections = self.connections()
        if len(connections) >= self.budget.limit:
            victim = self.budget.victim(connections, trio.current_time(), for_ourselves=dialled)
            if victim is None:
                return GoodbyeReason.TOO_MANY
            victim.retire(self._nursery)
        return None

    def _add(self, ends: Handshaken) -> Connection:
        connection = Connection(ends, self._offers, self.uploads, self._note_fault, self.arriving)
        self._connections.setdefault(ends.peer, []).append(connection)
        for swarm in self._followed:
            connection.follow(swarm, self._secrets.get(swarm, b""))
        for watcher in self.watchers:
            watcher.opened(connection)
        return connection

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            self._dropped_bytes += connection.downloads.dropped_bytes
            group = self._connections[connection.peer]
            group.remove(connection)
            if not group:
                del self._connections[connection.peer]
            for watcher in self.watchers:
                watcher.ended(connection)

    def _note_fault(self, peer: PeerId, fault: Fault) -> None:
        self.standing.fault(peer, fault, trio.current_time())

    async def _goodbye(self) -> None:
        async with trio.open_nursery() as nursery:
            for connection in self.connections():
                nursery.start_soon(connection.close)

    # --- who has what

    def has(self, swarm: bytes, n: int) -> bool:
        """Whether chunk n of a swarm is here and shared with all."""
        offer = self._offers.swarm(swarm) or self._offers.proven_swarm(swarm)
        return offer is not None and n < offer.chunk_count and offer.has(n)

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        """Learn from all peers, present and future, which chunks of the swarm they have; see `core.ports.PeerSource`."""
        self._followed[swarm] = self._followed.get(swarm, 0) + 1
        if secret:
            self._secrets[swarm] = secret
        for connection in self.connections():
            connection.follow(swarm, secret)

    def unfollow(self, swarm: bytes) -> None:
        """Undo one `follow`."""
        left = self._followed.pop(swarm, 0) - 1
        if left > 0:
            self._followed[swarm] = left
            return
        self._secrets.pop(swarm, None)
        for connection in self.connections():
            connection.unfollow(swarm)

    def holders(self, swarm: bytes, n: int) -> list[PeerId]:
        """Peers that say they have chunk n, the one that should answer first at the front."""
        now = trio.current_time()
        found = [
            c
            for c in self.connections()
            if c.bitmaps.has(swarm, n) and not self.standing.out_until(c.peer, now)
        ]
        found.sort(key=Connection.expected_seconds)
        return list(dict.fromkeys(c.peer for c in found))

    def swarm_holders(self, swarm: bytes) -> list[Holder]:
        """Peers with anything of the swarm, the quickest first; see `core.ports.PeerSource`."""
        now = trio.current_time()
        best: dict[PeerId, Connection] = {}
        for connection in sorted(self.connections(), key=Connection.expected_seconds):
            if connection.peer not in best and connection.bitmaps.count(swarm):
                best[connection.peer] = connection
        return [
            Holder(
                peer,
                partial(connection.bitmaps.has, swarm),
                connection.expected_seconds(),
                connection.downloads.link.bytes_per_second,
            )
            for peer, connection in best.items()
            if not self.standing.out_until(peer, now)
        ]

    async def fetch(
        self,
        peer: PeerId,
        swarm: bytes,
        table: WantedChunks,
        chunks: Sequence[int],
        *,
        priority: int,
        landed: Landed,
    ) -> PeerAnswer:
        """Get chunks (ascending) from a connected peer; see `core.ports.PeerSource`."""
        connection = self.connection(peer)
        if connection is None:
            raise SourceUnavailable(f"peer {peer} is not connected")

        async def counted(good: list[tuple[int, Any]]) -> None:
            self.chunks += len(good)
            self.bytes += sum(len(chunk) for _, chunk in good)
            await landed(good)

        answer = await connection.fetch(swarm, table, chunks, priority=priority, landed=counted)
        self.dialler.hint(answer.alternatives)
        if not answer.missing and not answer.busy:
            self.standing.good(peer)
        return answer

    async def document(self, digest: bytes, *, limit_bytes: int, secret: bytes = b"") -> bytes | None:
        """A TOC, manifest or config from whichever peer has it, checked; None when none has."""
        todo = sorted(self.connections(), key=Connection.expected_seconds, reverse=True)
        found: list[bytes] = []
        busy: Counter[Connection] = Counter()
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                while todo and not found:
                    connection = todo.pop()
                    try:
                        data = await self.document_from(connection, digest, limit_bytes, secret)
                    except PeerBusy as error:
                        again_seconds = min(error.retry_seconds, DOCUMENT_BUSY_MAX_SECONDS)
                    else:
                        if data is not None:
                            found.append(data)
                            nursery.cancel_scope.cancel()
                        continue
                    busy[connection] += 1
                    if busy[connection] < DOCUMENT_BUSY_ASKS:
                        await trio.sleep(again_seconds)
                        todo.insert(0, connection)  # behind those that have not been asked yet

            for _ in range(DOCUMENT_ASKS_AT_ONCE):
                nursery.start_soon(ask)
        return found[0] if found else None

    async def search(self, digest: bytes) -> bool:
        """See `core.ports.PeerSource`: the exchange by itself finds nobody."""
        await trio.lowlevel.checkpoint()
        return False

    async def document_from(
        self, connection: Connection, digest: bytes, limit_bytes: int, secret: bytes = b""
    ) -> bytes | None:
        """A document of one peer, checked; None when it gives none. Raises PeerBusy."""
        try:
            with trio.fail_after(DOCUMENT_SECONDS):
                data = await connection.document(digest, limit_bytes=limit_bytes, secret=secret)
        except PeerBusy:
            raise
        except (P2pgzError, trio.TooSlowError):
            return None
        if data is None or hashlib.sha256(data).digest() == digest:
            return data
        error = ChunkCorrupt(f"peer {connection.peer}: document {Digest(digest)} has other bytes")
        connection.blame(error, Fault.CORRUPT)
        return None

    async def index_claims(self, diff_id: bytes, told: Callable[[PeerId, bytes], None]) -> None:
        """Ask the quickest peers what they say about the own index of a layer; see `core.ports.IndexPeers`."""

        async def ask(connection: Connection) -> None:
            with suppress(P2pgzError):
                data = await connection.index_claim(diff_id)
                if data is not None:
                    told(connection.peer, data)

        best = {c.peer: c for c in sorted(self.connections(), key=Connection.expected_seconds, reverse=True)}
        async with trio.open_nursery() as nursery:
            for connection in list(best.values())[-INDEX_ASKS_MAX:]:
                nursery.start_soon(ask, connection)

    def blame(self, peer: PeerId, error: P2pgzError) -> None:
        """A peer's lie has come out: it loses its place."""
        connections = [c for c in self._connections.get(peer, ()) if not c.ended]
        if not connections:
            self._note_fault(peer, Fault.LIE)
            return
        connections[0].blame(error, Fault.LIE)
        for connection in connections[1:]:
            self._nursery.start_soon(connection.close, GoodbyeReason.FAULT)

    @property
    def dropped_bytes(self) -> int:
        """That came and nobody waited for any more: somebody else was quicker."""
        return self._dropped_bytes + sum(c.downloads.dropped_bytes for c in self.connections())

    def status(self) -> list[dict[str, Any]]:
        """The open connections for `p2pgz status`."""
        now = trio.current_time()
        return [
            {
                "peer_id": str(c.peer),
                "version": c.version,
                "seconds": now - c.since,
                "layers": c.bitmaps.swarms,
                "received_bytes": c.downloads.received_bytes,
                "expected_seconds": c.expected_seconds(),
                "faults": self.standing.faults_of(c.peer),
            }
            for c in self.connections()
        ]

    def faulty_peers(self) -> list[dict[str, Any]]:
        """The peers that have lost their place for now, those of late."""
        now = trio.current_time()
        return [
            {
                "peer_id": str(peer),
                "faults": self.standing.faults_of(peer),
                "out_seconds": self.standing.out_until(peer, now) - now,
            }
            for peer in self.standing.out(now)[-FAULTY_SHOWN:]
        ]
