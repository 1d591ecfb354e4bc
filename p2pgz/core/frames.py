"""The frames of the peer exchange `p2pgz/1`: values to bytes and back. docs/reference/wire.md is the specification.

`parse_body` is called by `core.wire` with bodies that passed the size limit of their type; it gives a finished value or
raises PeerFault. `encode` makes a frame with its header. All numbers are big-endian. A body may be longer than what is
defined here where it says so: later versions append fields, earlier ones ignore them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from p2pgz.core.admission import PROOF_BYTES, PROOFS_MAX
from p2pgz.core.digest import SHA256_BYTES
from p2pgz.core.messages import (
    ADDRESS_MAX_BYTES,
    ALTERNATIVES_MAX,
    BITMAP_CHUNKS_MAX,
    CHUNK_NUMBER_END,
    DOCUMENT_MAX_BYTES,
    NONCE_BYTES,
    PART_MAX_BYTES,
    REASON_MAX_BYTES,
    REQUEST_CHUNKS_MAX,
    RETRY_MAX_MS,
    RUNS_MAX,
    SIGNATURE_BYTES,
    Alternative,
    Bitmap,
    BitmapDelta,
    Busy,
    Data,
    DataFlag,
    Doc,
    DocWant,
    Forget,
    Frame,
    FrameType,
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
    Run,
    Want,
)
from p2pgz.core.peerid import PEER_ID_MAX_BYTES
from p2pgz.errors import PeerFault

_RUN: Final = struct.Struct(">II")
_HELLO: Final = struct.Struct(f">HHQ{NONCE_BYTES}s")
_WANT: Final = struct.Struct(f">IB{SHA256_BYTES}s")
_DATA: Final = struct.Struct(">IIBII")
_DOCUMENT: Final = struct.Struct(">III")
_BUSY: Final = struct.Struct(">II")
_BITMAP: Final = struct.Struct(f">{SHA256_BYTES}sI")
_DELTA: Final = struct.Struct(f">{SHA256_BYTES}sHH")
_PROOF: Final = struct.Struct(f"{SHA256_BYTES}s{PROOF_BYTES}s")
_PROOF_DOC_WANT: Final = struct.Struct(f">I{SHA256_BYTES}s{PROOF_BYTES}s")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_GOODBYE: Final = struct.Struct(">B")
_HEADER: Final = struct.Struct(">IB")
DATA_HEAD_BYTES: Final = _HEADER.size + _DATA.size


def _short(name: str) -> PeerFault:
    return PeerFault(f"a {name} frame that is cut short or too long")


def _parse_runs(view: memoryview, name: str, *, chunks_max: int = CHUNK_NUMBER_END) -> tuple[Run, ...]:
    if len(view) % _RUN.size or len(view) > RUNS_MAX * _RUN.size:
        raise _short(name)
    runs = tuple(_RUN.iter_unpack(view))
    end = total = 0
    for first, count in runs:
        if count == 0 or first < end or first + count > CHUNK_NUMBER_END:
            raise PeerFault(f"a {name} frame with runs that are empty, not ascending or out of range")
        end = first + count
        total += count
    if total > chunks_max:
        raise PeerFault(f"a {name} frame about {total} chunks, the limit is {chunks_max}")
    return runs


def _encode_runs(runs: Iterable[Run]) -> bytes:
    return b"".join([_RUN.pack(first, count) for first, count in runs])


class _Fields:
    """Reads length-prefixed fields one after the other."""

    def __init__(self, view: memoryview, at: int, name: str) -> None:
        self._view, self._at, self._name = view, at, name

    def take(self, size: int) -> bytes:
        field = bytes(self._view[self._at : self._at + size])
        if len(field) != size:
            raise _short(self._name)
        self._at += size
        return field

    def short(self, limit: int) -> bytes:
        size = self.take(1)[0]
        if size > limit:
            raise _short(self._name)
        return self.take(size)

    def end(self) -> None:
        if self._at != len(self._view):
            raise _short(self._name)


def _parse_hello(view: memoryview) -> Hello:
    lowest, highest, features, nonce = _HELLO.unpack_from(view)
    fields = _Fields(view, _HELLO.size, "HELLO")
    peer = fields.short(PEER_ID_MAX_BYTES)
    signature = fields.short(SIGNATURE_BYTES)
    count = fields.take(1)[0]
    if count > PROOFS_MAX or not 1 <= lowest <= highest:
        raise PeerFault("a HELLO frame with fields out of range")
    proofs = tuple(fields.take(PROOF_BYTES) for _ in range(count))
    return Hello(lowest, highest, features, nonce, peer, signature, proofs)  # later versions may append


def _encode_hello(frame: Hello) -> bytes:
    return b"".join(
        [
            _HELLO.pack(frame.lowest, frame.highest, frame.features, frame.nonce),
            bytes([len(frame.peer)]) + frame.peer,
            bytes([len(frame.signature)]) + frame.signature,
            bytes([len(frame.proofs)]),
            *frame.proofs,
        ]
    )


def _parse_goodbye(view: memoryview) -> Goodbye:
    (reason,) = _GOODBYE.unpack_from(view)
    known = GoodbyeReason(reason) if reason in set(GoodbyeReason) else GoodbyeReason.LEAVING
    text = bytes(view[_GOODBYE.size :]).decode("utf-8", "replace")
    # it goes into logs: no control characters
    return Goodbye(known, "".join(c if c.isprintable() else "?" for c in text))


def _parse_want(view: memoryview) -> Want:
    request, priority, swarm = _WANT.unpack_from(view)
    runs = _parse_runs(view[_WANT.size :], "WANT", chunks_max=REQUEST_CHUNKS_MAX)
    if not runs:
        raise PeerFault("a WANT frame that asks for nothing")
    return Want(request, priority, swarm, runs)


def _parse_data(view: memoryview) -> Data:
    request, chunk, flags, offset, total = _DATA.unpack_from(view)
    payload = view[_DATA.size :]
    if flags > DataFlag.ZSTD or not payload or offset + len(payload) > total:
        raise PeerFault("a DATA frame that contradicts itself")
    return Data(request, chunk, DataFlag(flags), offset, total, payload)


def data_head(request: int, chunk: int, flags: int, offset: int, total: int, size: int) -> bytes:
    """Header and fields of a DATA frame with `size` payload bytes, which the caller puts behind it."""
    return _HEADER.pack(_DATA.size + size, FrameType.DATA) + _DATA.pack(request, chunk, flags, offset, total)


def _parse_doc(view: memoryview) -> Doc:
    request, offset, total = _DOCUMENT.unpack_from(view)
    payload = view[_DOCUMENT.size :]
    if offset + len(payload) > total or total > DOCUMENT_MAX_BYTES or (total and not payload):
        raise PeerFault("a DOC frame that contradicts itself")
    return Doc(request, offset, total, payload)


def _parse_busy(view: memoryview) -> Busy:
    request, retry_ms = _BUSY.unpack_from(view)
    fields = _Fields(view, _BUSY.size, "BUSY")
    count = fields.take(1)[0]
    if count > ALTERNATIVES_MAX or retry_ms > RETRY_MAX_MS:
        raise PeerFault("a BUSY frame with fields out of range")
    alternatives = []
    for _ in range(count):
        peer = fields.short(PEER_ID_MAX_BYTES)
        try:
            address = fields.short(ADDRESS_MAX_BYTES).decode("ascii")
        except UnicodeDecodeError:
            raise PeerFault("a BUSY frame with an address that is not ASCII") from None
        alternatives.append(Alternative(peer, address))
    fields.end()
    return Busy(request, retry_ms, tuple(alternatives))


def _encode_busy(frame: Busy) -> bytes:
    parts = [_BUSY.pack(frame.request, frame.retry_ms), bytes([len(frame.alternatives)])]
    for other in frame.alternatives:
        address = other.address.encode("ascii")
        parts += [bytes([len(other.peer)]), other.peer, bytes([len(address)]), address]
    return b"".join(parts)


def _parse_bitmap(view: memoryview) -> Bitmap:
    swarm, count = _BITMAP.unpack_from(view)
    bits = view[_BITMAP.size :]
    if count > BITMAP_CHUNKS_MAX or len(bits) != (count + 7) // 8 or (count % 8 and bits[-1] >> count % 8):
        raise PeerFault("a BITMAP frame whose bits do not fit its count")
    return Bitmap(swarm, count, bits)


def _parse_delta(view: memoryview) -> BitmapDelta:
    swarm, got, lost = _DELTA.unpack_from(view)
    middle = _DELTA.size + got * _RUN.size
    if len(view) != middle + lost * _RUN.size:
        raise _short("BITMAP_DELTA")
    name = "BITMAP_DELTA"
    return BitmapDelta(swarm, _parse_runs(view[_DELTA.size : middle], name), _parse_runs(view[middle:], name))


def _swarm(view: memoryview) -> bytes:
    if len(view) != SHA256_BYTES:
        raise _short("JOIN, LEAVE")
    return bytes(view)


def _exactly(layout: struct.Struct, view: memoryview, name: str) -> tuple[Any, ...]:
    if len(view) != layout.size:
        raise _short(name)
    return layout.unpack(view)


def _numbered(layout: struct.Struct, view: memoryview) -> int:
    if len(view) != layout.size:
        raise _short("PING, PONG")
    return int(layout.unpack(view)[0])


_PARSERS: Final[dict[int, Callable[[memoryview], Frame]]] = {
    FrameType.HELLO: _parse_hello,
    FrameType.PING: lambda view: Ping(_numbered(_U64, view)),
    FrameType.PONG: lambda view: Pong(_numbered(_U64, view)),
    FrameType.GOODBYE: _parse_goodbye,
    FrameType.WANT: _parse_want,
    FrameType.DATA: _parse_data,
    FrameType.MISSING: lambda view: Missing(_U32.unpack_from(view)[0], _parse_runs(view[4:], "MISSING")),
    FrameType.BUSY: _parse_busy,
    FrameType.FORGET: lambda view: Forget(_U32.unpack_from(view)[0], _parse_runs(view[4:], "FORGET")),
    FrameType.DOC_WANT: lambda view: DocWant(_U32.unpack_from(view)[0], _swarm(view[4:])),
    FrameType.DOC: _parse_doc,
    FrameType.INDEX_WANT: lambda view: IndexWant(_U32.unpack_from(view)[0], _swarm(view[4:])),
    FrameType.JOIN: lambda view: Join(_swarm(view)),
    FrameType.LEAVE: lambda view: Leave(_swarm(view)),
    FrameType.BITMAP: _parse_bitmap,
    FrameType.BITMAP_DELTA: _parse_delta,
    FrameType.PROOF_JOIN: lambda view: ProofJoin(*_exactly(_PROOF, view, "PROOF_JOIN")),
    FrameType.PROOF: lambda view: Proof(*_exactly(_PROOF, view, "PROOF")),
    FrameType.PROOF_DOC_WANT: lambda view: ProofDocWant(*_exactly(_PROOF_DOC_WANT, view, "PROOF_DOC_WANT")),
}

_RUNS_BYTES: Final = RUNS_MAX * _RUN.size
# The largest body of each type. HELLO has room for what later versions append.
BODY_MAX_BYTES: Final[dict[int, int]] = {
    FrameType.HELLO: 1024,
    FrameType.PING: _U64.size,
    FrameType.PONG: _U64.size,
    FrameType.GOODBYE: _GOODBYE.size + REASON_MAX_BYTES,
    FrameType.WANT: _WANT.size + _RUNS_BYTES,
    FrameType.DATA: _DATA.size + PART_MAX_BYTES,
    FrameType.MISSING: _U32.size + _RUNS_BYTES,
    FrameType.BUSY: _BUSY.size + 1 + ALTERNATIVES_MAX * (2 + PEER_ID_MAX_BYTES + ADDRESS_MAX_BYTES),
    FrameType.FORGET: _U32.size + _RUNS_BYTES,
    FrameType.DOC_WANT: _U32.size + SHA256_BYTES,
    FrameType.DOC: _DOCUMENT.size + PART_MAX_BYTES,
    FrameType.INDEX_WANT: _U32.size + SHA256_BYTES,
    FrameType.JOIN: SHA256_BYTES,
    FrameType.LEAVE: SHA256_BYTES,
    FrameType.BITMAP: _BITMAP.size + BITMAP_CHUNKS_MAX // 8,
    FrameType.BITMAP_DELTA: _DELTA.size + 2 * _RUNS_BYTES,
    FrameType.PROOF_JOIN: _PROOF.size,
    FrameType.PROOF: _PROOF.size,
    FrameType.PROOF_DOC_WANT: _PROOF_DOC_WANT.size,
}
# what one connection can make us hold before a frame is complete
FRAME_MAX_BYTES: Final = _HEADER.size + max(BODY_MAX_BYTES.values())


def parse_body(kind: int, view: memoryview) -> Frame:
    """The frame of a known type; raises PeerFault when the body is not one."""
    try:
        return _PARSERS[kind](view)
    except struct.error:
        raise _short(FrameType(kind).name) from None


def encode(frame: Frame) -> bytes:
    """A frame with its header. The caller keeps to the limits."""
    match frame:
        case Data(request, chunk, flags, offset, total, payload):
            return data_head(request, chunk, flags, offset, total, len(payload)) + bytes(payload)
        case Doc(request, offset, total, payload):
            kind, body = FrameType.DOC, _DOCUMENT.pack(request, offset, total) + bytes(payload)
        case Want(request, priority, swarm, runs):
            kind, body = FrameType.WANT, _WANT.pack(request, priority, swarm) + _encode_runs(runs)
        case Missing(request, runs):
            kind, body = FrameType.MISSING, _U32.pack(request) + _encode_runs(runs)
        case Forget(request, runs):
            kind, body = FrameType.FORGET, _U32.pack(request) + _encode_runs(runs)
        case Busy():
            kind, body = FrameType.BUSY, _encode_busy(frame)
        case DocWant(request, digest):
            kind, body = FrameType.DOC_WANT, _U32.pack(request) + digest
        case IndexWant(request, diff_id):
            kind, body = FrameType.INDEX_WANT, _U32.pack(request) + diff_id
        case Join(swarm):
            kind, body = FrameType.JOIN, swarm
        case Leave(swarm):
            kind, body = FrameType.LEAVE, swarm
        case Bitmap(swarm, count, bits):
            kind, body = FrameType.BITMAP, _BITMAP.pack(swarm, count) + bytes(bits)
        case BitmapDelta(swarm, got, lost):
            head = _DELTA.pack(swarm, len(got), len(lost))
            kind, body = FrameType.BITMAP_DELTA, head + _encode_runs(got) + _encode_runs(lost)
        case ProofJoin(swarm, proof):
            kind, body = FrameType.PROOF_JOIN, swarm + proof
        case Proof(swarm, proof):
            kind, body = FrameType.PROOF, swarm + proof
        case ProofDocWant(request, name, proof):
            kind, body = FrameType.PROOF_DOC_WANT, _PROOF_DOC_WANT.pack(request, name, proof)
        case Hello():
            kind, body = FrameType.HELLO, _encode_hello(frame)
        case Ping(token):
            kind, body = FrameType.PING, _U64.pack(token)
        case Pong(token):
            kind, body = FrameType.PONG, _U64.pack(token)
        case Goodbye(reason, text):  # pragma: no branch  # the last of all frames
            kind, body = FrameType.GOODBYE, _GOODBYE.pack(reason) + text.encode()[:REASON_MAX_BYTES]
    return _HEADER.pack(len(body), kind) + body
