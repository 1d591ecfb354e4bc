"""What we have asked of one peer, and the checks on what it answers: nothing that was not asked for, nothing too long.

Called by `p2p.connection`. Synchronous: frames in, finished chunks into the fetches that wait for them. Losers of a race
are forgotten: their request stays on the books until the peer has answered every chunk of it, and what comes is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import trio

from p2pgz.core.messages import Alternative, Busy, Data, DataFlag, Doc, Missing, chunks_of
from p2pgz.core.model import MAX_CHUNK_BYTES
from p2pgz.core.schedule import LinkEstimate
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.core.wirezstd import decompress
from p2pgz.errors import ChunkCorrupt, PeerFault
from p2pgz.p2p.arriving import Arriving
from p2pgz.p2p.offers import WantedChunks

Buffer = bytes | memoryview


class Arrived(NamedTuple):
    """A chunk that is complete on the wire and not yet verified."""

    n: int
    parts: list[Buffer]
    flags: DataFlag
    digest: bytes
    size: int

    def check(self, source: str) -> VerifiedChunk:
        """Unpack and hash it; raises ChunkCorrupt naming `source`."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        if self.flags & DataFlag.ZSTD:
            data = decompress(data, self.size, source=source)
        return verify(self.digest, data, source=source)


class Fetch:
    """One caller's wish: chunks that arrived and wait to be verified, and what came instead of others."""

    __slots__ = ("alternatives", "arrived", "busy", "changed", "held_bytes", "missing", "retry_seconds")

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.missing: list[int] = []
        self.busy: list[int] = []
        self.retry_seconds = 0.0
        self.alternatives: tuple[Alternative, ...] = ()
        self.changed = trio.Event()
        self.held_bytes = 0
        """of chunks that were asked for and are not put away"""

    def wake(self) -> None:
        """Something happened that the caller waits for."""
        self.changed.set()

    async def wait(self) -> None:
        """Wait for it."""
        await self.changed.wait()
        self.changed = trio.Event()


class _Coming:
    """A chunk on its way."""

    __slots__ = ("digest", "flags", "got", "parts", "size", "total")

    def __init__(self, size: int, digest: bytes) -> None:
        self.size = size
        self.digest = digest
        self.flags = DataFlag.RAW
        self.total = -1
        self.got = 0
        self.parts: list[Buffer] = []


class Request:
    """One WANT on the books."""

    __slots__ = (
        "asked_at",
        "chunks",
        "fetch",
        "first_at",
        "forgotten",
        "number",
        "swarm",
        "total_bytes",
    )

    def __init__(
        self, number: int, swarm: bytes, wanted: WantedChunks, chunks: Sequence[int], fetch: Fetch
    ) -> None:
        self.number = number
        self.swarm = swarm
        size = wanted.size
        self.chunks = {n: _Coming(size[n], wanted.digest(n)) for n in chunks}
        self.total_bytes = sum(size[n] for n in chunks)
        self.fetch = fetch
        self.forgotten = False
        self.asked_at = trio.current_time()
        self.first_at = math.inf  # of the first answer


class DocumentRequest:
    """One DOC_WANT on the books."""

    __slots__ = ("forgotten", "got", "limit_bytes", "missing", "parts", "retry_seconds", "total")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.total = -1
        self.got = 0
        self.parts: list[Buffer] = []
        self.missing = self.forgotten = False
        self.retry_seconds = -1.0
        """when to ask again, if the peer was busy"""

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self.missing or self.retry_seconds >= 0 or self.got == self.total


class Downloads:
    """The requests of one connection. `zstd`: whether compressed answers were agreed on; `arriving` is the exchange's."""

    def __init__(self, *, zstd: bool, arriving: Arriving | None = None) -> None:
        self._zstd = zstd
        self.arriving = arriving or Arriving()
        self._number = 0
        self.requests: dict[int, Request] = {}
        self.documents: dict[int, tuple[DocumentRequest, Fetch]] = {}
        self.outstanding_bytes = 0
        self.received_bytes = 0
        self.dropped_bytes = 0
        """that came and nobody waited for any more"""
        self.link = LinkEstimate()
        self.waiting_for_room: set[Fetch] = set()

    @property
    def waiting(self) -> bool:
        """Whether the peer owes us an answer."""
        return bool(self.requests or self.documents)

    def new_number(self) -> int:
        """A number for a request that is not on the books."""
        while True:
            self._number = (self._number + 1) & 0xFFFF_FFFF
            if self._number not in self.requests and self._number not in self.documents:
                return self._number

    def ask(self, swarm: bytes, wanted: WantedChunks, chunks: Sequence[int], fetch: Fetch) -> Request:
        """Put a request on the books."""
        request = Request(self.new_number(), swarm, wanted, chunks, fetch)
        self.requests[request.number] = request
        self.outstanding_bytes += request.total_bytes
        self.arriving.take(request.total_bytes)
        fetch.held_bytes += request.total_bytes
        return request

    def put_away(self, fetch: Fetch, count: int) -> None:
        """So many bytes of what a fetch asked for are not in memory any more, or will not come."""
        fetch.held_bytes -= count
        self.arriving.give(count)

    def on_data(self, frame: Data) -> bool:
        """Take a part of a chunk; returns whether the chunk is complete. Raises PeerFault for what was not asked for."""
        request = self.requests.get(frame.request)
        coming = request.chunks.get(frame.chunk) if request is not None else None
        if request is None or coming is None:
            raise PeerFault(f"chunk {frame.chunk} came for request {frame.request}, which did not ask for it")
        if coming.total < 0:
            self._check_first(frame, coming)
            coming.total, coming.flags = frame.total, frame.flags
            if request.first_at == math.inf:
                request.first_at = trio.current_time()
        if (frame.total, frame.flags, frame.offset) != (coming.total, coming.flags, coming.got):
            raise PeerFault(f"the parts of chunk {frame.chunk} do not fit together")
        size = len(frame.payload)
        coming.got += size
        self.received_bytes += size
        if request.forgotten:
            self.dropped_bytes += size
        else:
            coming.parts.append(frame.payload)
        if coming.got < coming.total:
            return False
        self._close(request, frame.chunk)
        if not request.forgotten:
            request.fetch.arrived.append(
                Arrived(frame.chunk, coming.parts, coming.flags, coming.digest, coming.size)
            )
            request.fetch.wake()
        return True

    def _check_first(self, frame: Data, coming: _Coming) -> None:
        if frame.flags & DataFlag.ZSTD:
            if not self._zstd or frame.total >= coming.size:
                raise PeerFault(
                    f"chunk {frame.chunk} came compressed where that was not agreed or saves nothing"
                )
        elif frame.total != coming.size:
            raise PeerFault(f"chunk {frame.chunk} came with {frame.total} bytes instead of {coming.size}")

    def on_missing(self, frame: Missing) -> list[int]:
        """Chunks that will not come. Returns those that somebody still wants. Raises PeerFault."""
        entry = self.documents.get(frame.request)
        if entry is not None:
            entry[0].missing = True
            self._document_done(frame.request)
            return []
        request = self.requests.get(frame.request)
        if request is None:
            if frame.runs:
                raise PeerFault(f"an answer to request {frame.request}, which is not open")
            return []
        chunks = self._given_up(request, frame)
        if request.forgotten:
            return []
        request.fetch.missing += chunks
        request.fetch.wake()
        return chunks

    def _given_up(self, request: Request, frame: Missing) -> list[int]:
        if not frame.runs:
            chunks = list(request.chunks)
        else:
            total = sum(count for _, count in frame.runs)
            if total > len(request.chunks):
                raise PeerFault(f"more chunks are missing than request {frame.request} asked for")
            chunks = list(chunks_of(frame.runs))
            if any(n not in request.chunks for n in chunks):
                raise PeerFault(f"a chunk is missing that request {frame.request} did not ask for")
        count = sum(request.chunks[n].size for n in chunks)
        for n in chunks:
            self._close(request, n)
        if not request.forgotten:
            self.put_away(request.fetch, count)
        return chunks

    def on_busy(self, frame: Busy) -> None:
        """The rest of a request will not come now. Raises PeerFault."""
        entry = self.documents.get(frame.request)
        if entry is not None:
            entry[0].retry_seconds = frame.retry_ms / 1000
            self._document_done(frame.request)
            return
        request = self.requests.get(frame.request)
        if request is None:
            raise PeerFault(f"BUSY for request {frame.request}, which is not open")
        chunks = self._given_up(request, Missing(frame.request))
        if not request.forgotten:
            request.fetch.busy += chunks
            request.fetch.retry_seconds = max(request.fetch.retry_seconds, frame.retry_ms / 1000)
            request.fetch.alternatives += frame.alternatives
            request.fetch.wake()

    def on_document(self, frame: Doc) -> None:
        """Take a part of a document. Raises PeerFault."""
        entry = self.documents.get(frame.request)
        if entry is None:
            raise PeerFault(f"a document came for request {frame.request}, which did not ask for one")
        document, _ = entry
        if document.total < 0:
            if frame.total > document.limit_bytes:
                raise PeerFault(
                    f"a document of {frame.total} bytes, at most {document.limit_bytes} were expected"
                )
            document.total = frame.total
        if (frame.total, frame.offset) != (document.total, document.got):
            raise PeerFault("the parts of a document do not fit together")
        if not document.forgotten:
            document.parts.append(frame.payload)
        document.got += len(frame.payload)
        self.received_bytes += len(frame.payload)
        if document.done:
            self._document_done(frame.request)

    def _document_done(self, number: int) -> None:
        document, fetch = self.documents[number]
        if document.forgotten:
            del self.documents[number]
        fetch.wake()

    def leave_document(self, number: int) -> None:
        """Its caller has got it, or has given up: then it stays on the books until the peer has answered."""
        document, _ = self.documents[number]
        if document.done:
            del self.documents[number]
            return
        document.forgotten = True
        document.parts.clear()

    def forget(self, request: Request) -> bool:
        """Nobody waits for it any more; returns whether the peer is to be told."""
        if request.number not in self.requests:
            return False
        request.forgotten = True
        for coming in request.chunks.values():
            self.dropped_bytes += coming.got
            coming.parts.clear()
        return True

    def _close(self, request: Request, n: int) -> None:
        coming = request.chunks.pop(n)
        self.outstanding_bytes -= coming.size
        if not request.chunks:
            del self.requests[request.number]
            if request.first_at != math.inf:
                body_seconds = trio.current_time() - request.first_at
                self.link.sample(request.first_at - request.asked_at, request.total_bytes, body_seconds)
        for other in self.waiting_for_room:
            other.wake()
        self.waiting_for_room.clear()

    def wake_all(self) -> None:
        """The connection has ended: everybody looks why."""
        for request in self.requests.values():
            request.fetch.wake()
        for _, fetch in self.documents.values():
            fetch.wake()
        for fetch in self.waiting_for_room:
            fetch.wake()


def check_all(
    arrived: Sequence[Arrived], source: str
) -> tuple[list[tuple[int, VerifiedChunk]], ChunkCorrupt | None]:
    """Verify chunks until one is wrong; for a worker thread or the loop."""
    good = []
    for item in arrived:
        try:
            good.append((item.n, item.check(source)))
        except ChunkCorrupt as error:
            return good, error
    return good, None


REQUEST_BYTES_MAX: Final = 4 << 20
assert REQUEST_BYTES_MAX < MAX_CHUNK_BYTES


def batches(
    wanted: WantedChunks, chunks: Sequence[int], *, chunks_max: int, runs_max: int
) -> list[list[int]]:
    """Ascending chunk numbers in requests of at most REQUEST_BYTES_MAX bytes (or one chunk) and the limits given."""
    size = wanted.size
    found: list[list[int]] = []
    current: list[int] = []
    total = runs = 0
    for n in chunks:
        new_run = not current or n != current[-1] + 1
        full = (
            total + size[n] > REQUEST_BYTES_MAX
            or len(current) >= chunks_max
            or (new_run and runs >= runs_max)
        )
        if current and full:
            found.append(current)
            current, total, runs, new_run = [], 0, 0, True
        current.append(n)
        total += size[n]
        runs += new_run
    if current:
        found.append(current)
    return found
