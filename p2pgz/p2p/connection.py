"""One connection with a proven peer: both ends may ask and both answer, any number of requests at once.

Made by the exchange after the handshake. Three tasks: one reads and handles frames (synchronously, so it never waits for
anything but the peer), one sends short frames, one sends chunks; `p2p.tending` has it look whether the peer makes progress.
Callers of `fetch` verify what arrives in their own task. A caller that gives up is forgotten, never cancelled inside a
write; a peer that breaks a rule loses the connection and `fault` says which rule it was. Whatever goes wrong stays in here.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from p2pgz.core.crowdmsg import CrowdFrame, Gossip, MemberFrame
from p2pgz.core.frames import FRAME_MAX_BYTES, encode
from p2pgz.core.messages import (
    PART_MAX_BYTES,
    Bitmap,
    BitmapDelta,
    Busy,
    Data,
    Doc,
    DocWant,
    Feature,
    Forget,
    Goodbye,
    GoodbyeReason,
    Hello,
    IndexWant,
    Join,
    Leave,
    Missing,
    Ping,
    Pong,
    Proof,
    ProofDocWant,
    ProofJoin,
    Want,
)
from p2pgz.core.pacing import URGENT
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault
from p2pgz.errors import P2pgzError, PeerFault, SourceUnavailable
from p2pgz.p2p.arriving import Arriving
from p2pgz.p2p.asking import Asking
from p2pgz.p2p.bitmaps import PeerLies
from p2pgz.p2p.handshake import Handshaken
from p2pgz.p2p.offers import Offers
from p2pgz.p2p.serving import Serving
from p2pgz.p2p.unasked import Unasked
from p2pgz.p2p.uploads import BATCH_BYTES, RETRY_MS, Uploads

log = structlog.get_logger(component="peers")

# The peer must answer something, or send this much, in every STALL_SECONDS while it owes us: 10 KB/s
PROGRESS_BYTES: Final = 32 << 10
STALL_SECONDS: Final = 3.0
PING_AFTER_SECONDS: Final = 10.0
PONG_WITHIN_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 60.0
SEND_SECONDS: Final = 10.0  # one batch; a peer that takes less than 25 KB/s is of no use to it
# answers that wait because the peer does not read: then it is gone
UNSENT_MAX_BYTES: Final = 4 << 20
DOCUMENTS_AT_ONCE: Final = 4
# optional frames we do not understand; a later version sends some, not thousands
SKIPPED_MAX: Final = 10_000
FRAMES_AT_ONCE: Final = 64  # before others get their turn


class Connection(Asking):
    """A peer that we are connected to. `run()` it in a nursery; it returns when the connection has ended."""

    def __init__(
        self,
        ends: Handshaken,
        offers: Offers,
        uploads: Uploads,
        on_fault: Callable[[PeerId, Fault], None] = lambda peer, fault: None,
        arriving: Arriving | None = None,
    ) -> None:
        zstd = bool(ends.agreement.features & Feature.ZSTD)
        proofs = ends.proofs if ends.agreement.features & Feature.PROOF else None
        super().__init__(ends.peer, zstd=zstd, proofs=proofs, arriving=arriving)
        self.version, self.features = ends.agreement
        self.tells_indexes = bool(self.features & Feature.INDEX)
        self.crowd: Callable[[CrowdFrame], None] = lambda frame: None
        """what is done with frames about members and leases"""
        self.fault: Fault | None = None
        """what the peer did, if it was to blame"""
        self.since = trio.current_time()
        self.serving = Serving(offers, uploads, self._say, zstd=zstd, proofs=proofs)
        self._on_fault = on_fault
        self._offers = offers
        self._uploads = uploads
        self._stream = ends.stream
        self._reader = ends.reader
        self._first_frames = ends.frames
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._sending = trio.Lock()
        self._to_say = trio.lowlevel.ParkingLot()
        self._to_serve = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None
        self._documents_out = 0
        self._heard_at = self._used_at = trio.current_time()
        self._pinged = False
        self._received_bytes = self._seen_bytes = 0
        self._seen_answers = 0
        self._moved_at = self._heard_at
        self._leaving = False
        self._unasked = Unasked()
        unasked = self._unasked.counted
        self._handlers: dict[type, Callable[..., None]] = {
            Data: self._on_data,
            Want: self._on_want,
            Missing: self._on_missing,
            Busy: self._on_busy,
            Forget: unasked(self.serving.on_forget),
            DocWant: self._on_doc_want,
            Doc: self._on_doc,
            IndexWant: self._on_index_want,
            Join: unasked(lambda frame: self.serving.on_join(frame.swarm)),
            Leave: unasked(lambda frame: self.serving.on_leave(frame.swarm)),
            Bitmap: unasked(self.bitmaps.on_bitmap),
            BitmapDelta: unasked(self.bitmaps.on_delta),
            ProofJoin: unasked(lambda frame: self.serving.on_join(frame.swarm, frame.proof)),
            Proof: unasked(self.bitmaps.on_proof),
            ProofDocWant: self._on_proof_doc_want,
            Ping: unasked(lambda frame: self._say(Pong(frame.token))),
            Pong: unasked(lambda frame: None),
            Goodbye: self._on_goodbye,
            Hello: self._on_hello,
        }

    def __repr__(self) -> str:
        return f"<Connection {self.peer} {self.error or 'open'}>"

    @property
    def ended(self) -> bool:
        """Whether nothing can be asked any more."""
        return self.error is not None or self._leaving

    async def run(self) -> None:
        """Serve the connection until it ends; never raises for anything the peer does."""
        if self._nursery is not None:
            raise RuntimeError("a connection runs once")
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for loop in (self._receive, self._send_short, self._send_chunks):
                    nursery.start_soon(self._guarded, loop)
                if self.error is not None:  # blamed before it ran
                    nursery.cancel_scope.cancel()
        finally:
            if self.error is None:
                self.error = SourceUnavailable(f"peer {self.peer}: the connection was closed")
            self.downloads.wake_all()
            self.serving.end()
            with trio.CancelScope(shield=True):
                await self._stream.aclose()

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        try:
            await loop()
        except PeerFault as error:
            self._end(error, Fault.LIE if isinstance(error, PeerLies) else Fault.PROTOCOL)
        except trio.TooSlowError:
            self._end(SourceUnavailable(f"peer {self.peer} does not take what it asked for"), Fault.SLOW)
        except P2pgzError as error:
            self._end(error, None)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._end(SourceUnavailable(f"peer {self.peer}: the connection broke"), Fault.LOST)
        except Exception as error:  # a bug met by one peer's frames must not end the node
            log.exception("peer.bug", peer=str(self.peer))
            self._end(P2pgzError(f"internal error: {error!r}"), None)

    def _end(self, error: P2pgzError, fault: Fault | None) -> None:
        if self.error is None:
            self.error, self.fault = error, fault
            if fault is not None:
                self._on_fault(self.peer, fault)
                log.info("peer.fault", peer=str(self.peer), fault=str(fault), reason=error.what)
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def blame(self, error: P2pgzError, fault: Fault) -> None:
        """End it because of what its bytes turned out to be."""
        self._end(error, fault)

    @property
    def used_at(self) -> float:
        """When either end last asked for something."""
        return self._used_at

    @property
    def heard_at(self) -> float:
        """When bytes last came."""
        return self._heard_at

    def keep(self) -> None:
        """It is of use, even though nobody asks for anything."""
        self._used_at = self._heard_at

    def retire(self, nursery: trio.Nursery) -> None:
        """It makes room for another one: nothing is asked any more, and the peer is told."""
        self._leaving = True
        nursery.start_soon(self.close, GoodbyeReason.TOO_MANY)

    @property
    def is_sending(self) -> bool:
        """Whether the peer still gets something that it was promised."""
        return bool(self.serving.queue or self._documents_out)

    @property
    def has_to_say(self) -> bool:
        """Whether short frames have not been sent yet."""
        return bool(self._unsent)

    async def close(self, reason: GoodbyeReason = GoodbyeReason.LEAVING) -> None:
        """Tell the peer and end it, within a second."""
        self._leaving = True
        with trio.move_on_after(1), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._send(encode(Goodbye(reason)))
        self._end(
            SourceUnavailable(f"peer {self.peer}: the connection was closed: {reason.name.lower()}"), None
        )

    # --- frames in

    async def _receive(self) -> None:
        stream, reader, on_crowd = self._stream, self._reader, self._unasked.counted(self._on_crowd)
        frames = self._first_frames
        while True:
            for number, frame in enumerate(frames, 1):
                self._handlers.get(type(frame), on_crowd)(frame)
                if not number % FRAMES_AT_ONCE or type(frame) is Gossip:
                    await trio.lowlevel.checkpoint()
            if reader.skipped_frames > SKIPPED_MAX:
                raise PeerFault("thousands of frames that this version does not know")
            data = await stream.receive()
            if not data:
                broken = reader.in_frame or self.downloads.waiting
                raise SourceUnavailable(
                    f"peer {self.peer} closed the connection"
                    + (" in the middle of an answer" if broken else "")
                )
            self._heard_at = trio.current_time()
            self._pinged = False
            self._received_bytes += len(data)
            frames = reader.feed(data)

    def _on_want(self, frame: Want) -> None:
        self._used_at = self._heard_at
        self.serving.on_want(frame)
        if self.serving.queue:
            self._to_serve.unpark_all()

    def _on_doc_want(self, frame: DocWant) -> None:
        self._start_document(frame.request, lambda: self._offers.document(frame.digest))

    def _on_proof_doc_want(self, frame: ProofDocWant) -> None:
        if self.proofs is None:
            raise PeerFault("a proof of access, which was not agreed on")
        # an unknown name and a wrong proof are the same, in time as well
        if self.proofs.may_have(self._offers.secret(frame.name), frame.name, frame.proof):
            self._start_document(frame.request, lambda: self._offers.proven_document(frame.name))
        else:
            self._say(Missing(frame.request))

    def _on_index_want(self, frame: IndexWant) -> None:
        if not self.tells_indexes:
            raise PeerFault("a question about an index, which was not agreed on")
        self._used_at = self._heard_at
        claim = self._offers.index(frame.diff_id)
        self._say(Missing(frame.request) if claim is None else Doc(frame.request, 0, len(claim), claim))

    def _start_document(self, request: int, read: Callable[[], Awaitable[bytes | None]]) -> None:
        self._used_at = self._heard_at
        if self._nursery is None or self._documents_out >= DOCUMENTS_AT_ONCE:
            self._uploads.busy += 1
            self._say(Busy(request, RETRY_MS))
            return
        self._documents_out += 1
        self._nursery.start_soon(self._guarded, lambda: self._send_document(request, read))

    def _on_goodbye(self, frame: Goodbye) -> None:
        raise SourceUnavailable(
            f"peer {self.peer} said goodbye: {frame.reason.name.lower()} {frame.text}".rstrip()
        )

    def _on_hello(self, frame: Hello) -> None:
        raise PeerFault("a second HELLO")

    def _on_crowd(self, frame: CrowdFrame) -> None:
        if not self.features & (Feature.MEMBERS if isinstance(frame, MemberFrame) else Feature.LEASES):
            raise PeerFault(f"a {type(frame).__name__} frame, which was not agreed on")
        self.crowd(frame)

    # --- frames out

    def _say_bytes(self, data: bytes) -> None:
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > UNSENT_MAX_BYTES:
            raise PeerFault(f"{self._unsent_bytes} bytes of answers that the peer does not read")
        self._to_say.unpark_all()

    async def _send_short(self) -> None:
        while True:
            while not self._unsent:
                await self._to_say.park()
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
            await self._send(data)

    async def _send_chunks(self) -> None:
        serving, uploads, queue = self.serving, self._uploads, self.serving.queue
        while True:
            while not queue:
                await self._to_serve.park()
            priority = queue.head_priority()
            wait_seconds = uploads.wait_seconds(priority)
            if wait_seconds > 0:
                with trio.move_on_after(wait_seconds):
                    await self._to_serve.park()  # something more urgent may come
                continue
            charged = min(BATCH_BYTES, sum(queue.class_bytes))  # before others see the same gap
            uploads.spend(charged, priority)
            async with uploads.slot():
                batch = await serving.next_batch()
                uploads.spend(len(batch) - charged, priority)
                if not batch:
                    continue
                before = trio.current_time()
                await self._send(batch)
                self._used_at = trio.current_time()
                serving.note_sent(len(batch), self._used_at - before)

    async def _send_document(self, request: int, read: Callable[[], Awaitable[bytes | None]]) -> None:
        try:
            data = await read()
            if data is None:
                self._say(Missing(request))
                return
            for offset in range(0, max(1, len(data)), PART_MAX_BYTES):
                part = data[offset : offset + PART_MAX_BYTES]
                await trio.sleep(self._uploads.wait_seconds(URGENT))
                self._uploads.spend(len(part), URGENT)
                await self._send(encode(Doc(request, offset, len(data), part)))
        finally:
            self._documents_out -= 1

    async def _send(self, data: bytes | memoryview) -> None:
        with trio.fail_after(SEND_SECONDS):
            try:
                self._sending.acquire_nowait()  # `async with` would give way first, though nobody holds it
            except trio.WouldBlock:
                await self._sending.acquire()
            try:
                await self._stream.send_all(data)
            finally:
                self._sending.release()

    # --- time

    def look(self, now: float, *, lagged: bool) -> None:
        """Called every half second. `lagged`: this process has not run for a while, so that silence means nothing."""
        self._unasked.look(now)
        if lagged:
            self._heard_at = self._moved_at = now
        moved = (
            self._answers != self._seen_answers or self._received_bytes - self._seen_bytes >= PROGRESS_BYTES
        )
        if moved or not self.downloads.waiting:
            self._seen_bytes, self._seen_answers, self._moved_at = self._received_bytes, self._answers, now
        elif now - self._moved_at >= STALL_SECONDS:
            self._end(SourceUnavailable(f"peer {self.peer} makes no progress"), Fault.SLOW)
        if self.downloads.waiting or self.serving.queue:
            self._used_at = now
        self._keep_alive(now)

    def _keep_alive(self, now: float) -> None:
        silence = now - self._heard_at
        if silence > PING_AFTER_SECONDS + PONG_WITHIN_SECONDS:
            self._end(SourceUnavailable(f"peer {self.peer} has gone silent"), Fault.LOST)
        elif silence > PING_AFTER_SECONDS and not self._pinged:
            self._pinged = True
            self._say_quietly(Ping(int(now)))
        followed = bool(self.bitmaps or self.serving.joined)
        if now - self._used_at > IDLE_SECONDS and not followed and self._nursery is not None:
            self._nursery.start_soon(self.close, GoodbyeReason.IDLE)


assert FRAME_MAX_BYTES < UNSENT_MAX_BYTES
