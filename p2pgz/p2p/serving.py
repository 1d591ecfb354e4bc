"""The giving half of a connection: requests in, chunks and bitmaps out.

Called by `p2p.connection`. Everything a peer can make us hold has a limit; what is beyond is answered by BUSY, and who goes
on asking loses the connection. A swarm that we do not know and one that this peer may not see get the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import trio

from p2pgz.core.frames import DATA_HEAD_BYTES, data_head
from p2pgz.core.messages import (
    BITMAP_CHUNKS_MAX,
    PART_MAX_BYTES,
    REQUEST_CHUNKS_MAX,
    RUNS_MAX,
    Bitmap,
    BitmapDelta,
    Busy,
    DataFlag,
    Forget,
    Frame,
    Missing,
    Proof,
    Want,
    chunks_of,
    runs_of,
)
from p2pgz.core.sharing import Proofs
from p2pgz.core.wirezstd import COMPRESS_TO_BYTES, compress
from p2pgz.errors import PeerFault
from p2pgz.p2p.offers import Offer, Offers
from p2pgz.p2p.uploads import BATCH_BYTES, RETRY_MS, UploadQueue, Uploads

# Requests refused one after the other before the peer loses the connection: it does not heed BUSY
REFUSALS_MAX: Final = 1024
# a host has some hundred layers
JOINS_MAX: Final = 1024

# EWMA: the last ~8 batches count
RATE_SAMPLE_WEIGHT: Final = 0.125

Say = Callable[[Frame], None]


class Part(NamedTuple):
    """A piece of a chunk that is to go out."""

    request: int
    n: int
    offer: Offer
    offset: int
    size: int


class Serving:
    """What one peer gets from us. `say` queues a short frame; `proofs` are those of the connection, if agreed on."""

    def __init__(
        self, offers: Offers, uploads: Uploads, say: Say, *, zstd: bool, proofs: Proofs | None = None
    ) -> None:
        self._offers = offers
        self._uploads = uploads
        self._say = say
        self._zstd = zstd
        self._refusals = 0
        self.queue = UploadQueue()
        uploads.join(self.queue)
        self.joined: dict[bytes, bytes | None] = {}
        """swarms whose bitmap the peer follows, and the bits that it was told last (None: none)"""
        self._proofs = proofs
        self._shown: dict[bytes, bytes] = {}
        """the proofs that came with joined swarms; some may turn out right later, when their image is opened here"""
        self._proven: set[bytes] = set()
        self.blocked_seconds = 0.0
        """how long the last batch took to leave"""
        self.bytes_per_second = 0.0

    def on_want(self, want: Want) -> None:
        """Queue a request or refuse it. Raises PeerFault."""
        if self.queue.knows(want.request):
            raise PeerFault(f"request {want.request} came twice")
        offer = self._offer(want.swarm)
        if offer is None:
            self._refuse(Missing(want.request))
        elif (retry_ms := self._busy_ms(want)) > 0:
            self._uploads.busy += 1
            self._refuse(Busy(want.request, retry_ms, self._uploads.alternatives(want.swarm)))
        else:
            missing = self.queue.add(want, offer)
            self._missing(want.request, missing)
            self._refusals = 0 if self.queue else self._refusals + 1

    def _busy_ms(self, want: Want) -> int:
        return self._uploads.busy_ms(want.priority) if self.queue.has_room(want) else RETRY_MS

    def end(self) -> None:
        """The connection has ended: what it has queued keeps nobody waiting."""
        self._uploads.leave(self.queue)

    def shares(self, swarm: bytes) -> bool:
        """Whether the peer may have chunks of a swarm. Raises PeerFault."""
        return self._offer(swarm) is not None

    def serves(self, swarm: bytes) -> bool:
        """Whether the peer follows this swarm, and is told what we have of it."""
        return self.joined.get(swarm) is not None

    def _refuse(self, answer: Frame) -> None:
        self._refusals += 1
        if self._refusals > REFUSALS_MAX:
            raise PeerFault(f"{self._refusals} requests in a row that could not be served")
        self._say(answer)

    def on_forget(self, forget: Forget) -> None:
        """Nobody over there waits for these any more. What is unknown here has been answered already."""
        if sum(count for _, count in forget.runs) > REQUEST_CHUNKS_MAX:
            raise PeerFault("a FORGET frame about more chunks than a request has")
        chunks = set(chunks_of(forget.runs)) if forget.runs else None
        self._missing(forget.request, self.queue.forget(forget.request, chunks))

    def _missing(self, request: int, chunks: Iterable[int]) -> None:
        runs = runs_of(chunks)
        for at in range(0, len(runs), RUNS_MAX):
            self._say(Missing(request, runs[at : at + RUNS_MAX]))

    def _offer(self, swarm: bytes) -> Offer | None:
        """What the peer may have of a swarm. Says our own proof when it has just proven that it may."""
        shown = self._shown.get(swarm)
        if shown is None or self._proofs is None:
            return self._offers.swarm(swarm)
        if swarm not in self._proven:
            secret = self._offers.secret(swarm)
            # no way past this for an unknown name: it takes as long as a wrong proof
            if not self._proofs.may_join(secret, swarm, shown) or secret is None:
                return None
            self._proven.add(swarm)
            self._say(Proof(swarm, self._proofs.answer(secret, swarm)))
        return self._offers.proven_swarm(swarm)

    def on_join(self, swarm: bytes, proof: bytes | None = None) -> None:
        """Tell the bitmap now and its changes from now on. Raises PeerFault."""
        if swarm not in self.joined and len(self.joined) >= JOINS_MAX:
            raise PeerFault(f"more than {JOINS_MAX} swarms joined")
        if proof is not None and self._proofs is None:
            raise PeerFault("a proof of access, which was not agreed on")
        self.on_leave(swarm)
        if proof is not None:
            self._shown[swarm] = proof
        offer = self._offer(swarm)
        bits = offer.bits() if offer is not None and offer.chunk_count <= BITMAP_CHUNKS_MAX else None
        self.joined[swarm] = bits
        count = offer.chunk_count if offer is not None and bits is not None else 0
        self._say(Bitmap(swarm, count, bits or b""))

    def on_leave(self, swarm: bytes) -> None:
        """The peer does not follow this one any more."""
        self.joined.pop(swarm, None)
        self._shown.pop(swarm, None)
        self._proven.discard(swarm)

    def withdraw(self) -> None:
        """Tell that nothing is left of what the peer follows. Raises PeerFault when it does not read."""
        for swarm in list(self.joined):
            self.on_leave(swarm)
            self._say(Bitmap(swarm, 0, b""))

    def tell_changes(self, swarms: Iterable[bytes]) -> None:
        """Tell what changed in those of these swarms that the peer follows. Raises PeerFault when it does not read."""
        for swarm in swarms:
            if swarm not in self.joined:
                continue
            last = self.joined[swarm]
            offer = self._offer(swarm)
            bits = offer.bits() if offer is not None and offer.chunk_count <= BITMAP_CHUNKS_MAX else None
            if bits == last:
                continue
            self.joined[swarm] = bits
            if last is not None and bits is not None and len(last) == len(bits):
                got, lost = _changes(last, bits)
                if len(got) <= RUNS_MAX and len(lost) <= RUNS_MAX:
                    self._say(BitmapDelta(swarm, got, lost))
                    continue
            count = offer.chunk_count if offer is not None and bits is not None else 0
            self._say(Bitmap(swarm, count, bits or b""))

    def note_sent(self, wire_bytes: int, seconds: float) -> None:
        """A batch has left; it took this long, encryption included."""
        self.blocked_seconds = seconds
        rate = wire_bytes / max(seconds, 1e-6)
        self.bytes_per_second += (rate - self.bytes_per_second) * RATE_SAMPLE_WEIGHT

    async def next_batch(self) -> bytes | memoryview:
        """The bytes that go out next; empty when all that was queued is gone by now."""
        parts = self._take()
        if not self._zstd:
            return await self._raw(parts)
        packing: list[Part] = []
        rest: list[Part] = []
        for part in parts:
            (packing if self._compresses(part) else rest).append(part)
        return await self._packed(packing, rest) if packing else await self._raw(rest)

    def _take(self) -> list[Part]:
        parts: list[Part] = []
        total = 0
        while total < BATCH_BYTES and (found := self.queue.take()) is not None:
            request, n, offer, offset = found
            size = min(offer.size(n) - offset, PART_MAX_BYTES)
            parts.append(Part(request, n, offer, offset, size))
            total += size
        return parts

    def _compresses(self, part: Part) -> bool:
        size = part.offer.size(part.n)
        return part.offset == 0 and self._uploads.compresses(
            size, part.offer.ratio, self.blocked_seconds, self.bytes_per_second
        )

    async def _raw(self, parts: list[Part]) -> memoryview:
        buffer = memoryview(bytearray(sum(part.size for part in parts) + len(parts) * DATA_HEAD_BYTES))
        at = 0
        for part in parts:
            payload = buffer[at + DATA_HEAD_BYTES : at + DATA_HEAD_BYTES + part.size]
            if await self._read(part, part.offset, payload):
                total = part.offer.size(part.n)
                head = data_head(part.request, part.n, DataFlag.RAW, part.offset, total, part.size)
                buffer[at : at + DATA_HEAD_BYTES] = head
                at += DATA_HEAD_BYTES + part.size
                self._count(part, total, part.size)
        return buffer[:at]

    async def _read(self, part: Part, offset: int, into: memoryview) -> bool:
        if part.offer.read_cached(part.n, offset, into) or await part.offer.read(part.n, offset, into):
            return True
        self.queue.sent(part.request, part.n, None)
        self._say(Missing(part.request, ((part.n, 1),)))
        return False

    def _count(self, part: Part, total: int, wire_bytes: int) -> None:
        end = part.offset + part.size
        done = end >= total
        if self.queue.sent(part.request, part.n, None if done else end):
            self._say(Missing(part.request, ((part.n, 1),)))
        self._uploads.chunks += done
        self._uploads.raw_bytes += part.size
        self._uploads.wire_bytes += wire_bytes

    async def _packed(self, packing: list[Part], rest: list[Part]) -> bytes:
        chunks: list[tuple[Part, bytearray]] = []
        for part in packing:
            data = bytearray(min(part.offer.size(part.n), COMPRESS_TO_BYTES))
            if await self._read(part, 0, memoryview(data)):
                chunks.append((part, data))
        packed = await trio.to_thread.run_sync(
            lambda: [compress(data) for _, data in chunks], limiter=self._uploads.workers
        )
        out: list[bytes | memoryview] = [await self._raw(rest)] if rest else []
        for (part, data), small in zip(chunks, packed, strict=True):
            flags = DataFlag.RAW if small is None else DataFlag.ZSTD
            payload = memoryview(data if small is None else small)
            for offset in range(0, len(payload), PART_MAX_BYTES):
                piece = payload[offset : offset + PART_MAX_BYTES]
                out += [data_head(part.request, part.n, flags, offset, len(payload), len(piece)), piece]
            self._uploads.compressed_chunks += small is not None
            self._count(part._replace(size=len(data)), len(data), len(payload))
        return b"".join(out)


def _changes(old: bytes, new: bytes) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Runs of bits that were set and that were cleared."""
    before, after = int.from_bytes(old, "little"), int.from_bytes(new, "little")
    return runs_of(_set_bits(after & ~before)), runs_of(_set_bits(before & ~after))


def _set_bits(number: int) -> Iterable[int]:
    data = number.to_bytes((number.bit_length() + 7) // 8, "little")
    for index, byte in enumerate(data):
        if byte:
            for bit in range(8):
                if byte >> bit & 1:
                    yield index * 8 + bit
