"""The taking half of a connection: what callers ask of one peer, in their own tasks.

The base of `p2p.connection.Connection`. A call puts requests on the books (`downloads`), queues frames, and verifies what
arrives where it was asked for; it never writes to the stream itself, so that a caller may be cancelled at any point.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from p2pgz.core import crowdframes
from p2pgz.core.crowdmsg import CrowdFrame
from p2pgz.core.frames import encode
from p2pgz.core.indexclaim import CLAIM_MAX_BYTES
from p2pgz.core.messages import (
    DOCUMENT_MAX_BYTES,
    REQUEST_CHUNKS_MAX,
    RUNS_MAX,
    Busy,
    Data,
    Doc,
    DocWant,
    Forget,
    Frame,
    IndexWant,
    Join,
    Leave,
    Missing,
    ProofDocWant,
    ProofJoin,
    Want,
    runs_of,
)
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Landed, PeerAnswer
from p2pgz.core.sharing import Proofs, document_name
from p2pgz.core.standing import Fault
from p2pgz.errors import ChunkCorrupt, P2pgzError, PeerFault, SourceUnavailable
from p2pgz.p2p.arriving import Arriving
from p2pgz.p2p.bitmaps import Bitmaps
from p2pgz.p2p.downloads import Arrived, DocumentRequest, Downloads, Fetch, Request, batches, check_all
from p2pgz.p2p.offers import WantedChunks
from p2pgz.p2p.uploads import REQUESTS_MAX

# bytes asked for and not yet here: enough for 1 Gbit/s over 100 ms, and what a peer can make us hold
WINDOW_BYTES: Final = 16 << 20
# Verified in the loop: hashing 64 KiB takes about as long as going to a thread and back
THREAD_FROM_BYTES: Final = 96 << 10
# what a peer is taken to give before it has given anything: half of 1 Gbit/s
RATE_GUESS_BYTES_PER_SECOND: Final = 60e6


class PeerBusy(SourceUnavailable):
    """The peer would give the document after `retry_seconds`."""

    def __init__(self, what: str, retry_seconds: float) -> None:
        super().__init__(what)
        self.retry_seconds = retry_seconds


class Asking(ABC):
    """What one peer is asked for. `proofs` are those of the connection, if agreed on, `arriving` is the exchange's."""

    def __init__(
        self, peer: PeerId, *, zstd: bool, proofs: Proofs | None = None, arriving: Arriving | None = None
    ) -> None:
        self.peer = peer
        self.error: P2pgzError | None = None
        """why the connection ended"""
        self.proofs = proofs
        self.tells_indexes = False
        """whether that was agreed on"""
        self.bitmaps = Bitmaps(proofs)
        self.downloads = Downloads(zstd=zstd, arriving=arriving)
        self._answers = 0

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether nothing can be asked any more."""

    @abstractmethod
    def _say_bytes(self, data: bytes) -> None:
        """Queue a short frame; raises PeerFault when the peer does not read."""

    def _say(self, frame: Frame) -> None:
        self._say_bytes(encode(frame))

    def say_crowd(self, frame: CrowdFrame) -> None:
        """Queue a frame about leases or members, which must have been agreed on. Nothing is raised: it may be ending."""
        with contextlib.suppress(PeerFault):
            self._say_bytes(crowdframes.encode(frame))

    @abstractmethod
    def blame(self, error: P2pgzError, fault: Fault) -> None:
        """End the connection because of what the peer's bytes turned out to be."""

    def expected_seconds(self) -> float:
        """Estimate of how long a chunk asked for now takes: round trip, and what is queued before it."""
        link = self.downloads.link
        rate = link.bytes_per_second or RATE_GUESS_BYTES_PER_SECOND
        return link.first_byte_seconds + self.downloads.outstanding_bytes / rate

    async def fetch(
        self, swarm: bytes, wanted: WantedChunks, chunks: Sequence[int], *, priority: int, landed: Landed
    ) -> PeerAnswer:
        """Ask for chunks (ascending) and give them, verified, to `landed` as they arrive.

        Safe to cancel: the peer is told to forget. Raises ChunkCorrupt when a chunk has other bytes (those before it
        have landed), SourceUnavailable when the connection ends.
        """
        todo = deque(batches(wanted, chunks, chunks_max=REQUEST_CHUNKS_MAX, runs_max=RUNS_MAX))
        downloads, arriving = self.downloads, self.downloads.arriving
        fetch = Fetch()
        mine: list[Request] = []
        try:
            while True:
                self._raise_if_ended()
                while todo and not fetch.busy and self._has_room(wanted, todo[0], priority):
                    batch = todo.popleft()
                    request = downloads.ask(swarm, wanted, batch, fetch)
                    mine.append(request)
                    self._say(Want(request.number, priority, swarm, runs_of(batch)))
                if fetch.arrived:
                    arrived, fetch.arrived = fetch.arrived, []
                    await self._land(arrived, landed)
                    downloads.put_away(fetch, sum(item.size for item in arrived))
                    continue
                mine = [request for request in mine if request.chunks]
                if not mine and (not todo or fetch.busy):
                    break
                if todo and not fetch.busy:
                    self._wait_for_room(wanted, todo[0], fetch, priority)
                await fetch.wait()
        finally:
            downloads.waiting_for_room.discard(fetch)
            arriving.leave(fetch)
            for request in mine:
                if downloads.forget(request) and self.error is None:
                    self._say_quietly(Forget(request.number))
            downloads.put_away(fetch, fetch.held_bytes)
        fetch.busy += [n for batch in todo for n in batch]
        return PeerAnswer(fetch.missing, sorted(fetch.busy), fetch.retry_seconds, fetch.alternatives)

    def _has_room(self, wanted: WantedChunks, batch: Sequence[int], priority: int) -> bool:
        size = _bytes_of(wanted, batch)
        return self._has_room_here(size) and self.downloads.arriving.admits(size, priority)

    def _has_room_here(self, size: int) -> bool:
        downloads = self.downloads
        if len(downloads.requests) + len(downloads.documents) >= REQUESTS_MAX:
            return False
        return not downloads.outstanding_bytes or downloads.outstanding_bytes + size <= WINDOW_BYTES

    def _wait_for_room(self, wanted: WantedChunks, batch: Sequence[int], fetch: Fetch, priority: int) -> None:
        """Have the fetch woken by what it lacks: room of this connection first, then room of all."""
        size = _bytes_of(wanted, batch)
        if self._has_room_here(size):
            self.downloads.arriving.wait(fetch, size, priority)
        else:
            self.downloads.waiting_for_room.add(fetch)
            self.downloads.arriving.pass_on()

    async def _land(self, arrived: list[Arrived], landed: Landed) -> None:
        source = f"peer {self.peer}"
        if sum(item.size for item in arrived) > THREAD_FROM_BYTES:
            good, bad = await trio.to_thread.run_sync(check_all, arrived, source)
        else:
            good, bad = check_all(arrived, source)
        if good:
            await landed(good)
        if bad is not None:
            self.blame(bad, Fault.CORRUPT)
            raise ChunkCorrupt(bad.what, hint=bad.hint) from bad

    async def document(
        self, digest: bytes, *, limit_bytes: int = DOCUMENT_MAX_BYTES, secret: bytes = b""
    ) -> bytes | None:
        """A TOC, manifest or config by digest, not verified; None when the peer does not have it. Raises PeerBusy.

        With the secret of its image the peer sees a name that it understands only if it knows the image, and our proof.
        """
        self._raise_if_ended()
        proofs = self.proofs
        if not secret:
            return await self._document(limit_bytes, lambda number: DocWant(number, digest))
        if proofs is None:
            await trio.lowlevel.checkpoint()
            return None
        name = document_name(secret, digest)
        proof = proofs.document(secret, name)
        return await self._document(limit_bytes, lambda number: ProofDocWant(number, name, proof))

    async def index_claim(self, diff_id: bytes) -> bytes | None:
        """What the peer says about the own index of a plain layer, not checked; None when it says nothing."""
        self._raise_if_ended()
        if not self.tells_indexes:
            await trio.lowlevel.checkpoint()
            return None
        return await self._document(CLAIM_MAX_BYTES, lambda number: IndexWant(number, diff_id))

    async def _document(self, limit_bytes: int, want: Callable[[int], Frame]) -> bytes | None:
        """Ask by the frame that `want` makes of a request number, and wait for the whole answer."""
        document, fetch = DocumentRequest(limit_bytes), Fetch()
        number = self.downloads.new_number()
        self.downloads.documents[number] = (document, fetch)
        self._say(want(number))
        try:
            while not document.done:
                await fetch.wait()
                self._raise_if_ended()
        finally:
            self.downloads.leave_document(number)
        if document.retry_seconds >= 0:
            raise PeerBusy(f"peer {self.peer} is busy", document.retry_seconds)
        return None if document.missing else b"".join(document.parts)

    def follow(self, swarm: bytes, secret: bytes = b"") -> None:
        """Ask for the bitmap of a swarm and its changes; `bitmaps` has them from then on.

        With the secret of its image: prove that we know it, and believe nothing before the peer has done so.
        """
        if self.ended or not self.bitmaps.follow(swarm, secret):
            return
        if secret and self.proofs is not None:
            self._say(ProofJoin(swarm, self.proofs.join(secret, swarm)))
        else:
            self._say(Join(swarm))

    def unfollow(self, swarm: bytes) -> None:
        """No more of them."""
        if not self.ended and self.bitmaps.unfollow(swarm):
            self._say(Leave(swarm))

    def _on_data(self, frame: Data) -> None:
        if self.downloads.on_data(frame):
            self._answers += 1

    def _on_missing(self, frame: Missing) -> None:
        request = self.downloads.requests.get(frame.request)
        swarm = request.swarm if request is not None else b""
        self._answers += 1
        for n in self.downloads.on_missing(frame):
            self.bitmaps.was_missing(swarm, n)

    def _on_busy(self, frame: Busy) -> None:
        self._answers += 1
        self.downloads.on_busy(frame)

    def _on_doc(self, frame: Doc) -> None:
        self._answers += 1
        self.downloads.on_document(frame)

    def _say_quietly(self, frame: Frame) -> None:
        with contextlib.suppress(PeerFault):  # the connection is about to end for the same reason
            self._say(frame)

    def _raise_if_ended(self) -> None:
        if self.error is not None:
            raise SourceUnavailable(self.error.what, hint=self.error.hint) from self.error


def _bytes_of(wanted: WantedChunks, chunks: Sequence[int]) -> int:
    return sum(wanted.size[n] for n in chunks)
