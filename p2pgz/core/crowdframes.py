"""The frames about leases and members: values to bytes and back. docs/reference/wire.md is the specification.

To be called by `core.wire` with bodies that passed the size limit of their type: `parse_body` gives a finished value or
raises PeerFault; `encode` makes a frame with its header. All numbers are big-endian. Signatures are not checked here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from p2pgz.core.crowdmsg import (
    BUCKETS,
    DEPTH_MAX,
    DEPTH_NONE,
    ENTRIES_MAX,
    EXCLUDED_MAX,
    EXTENT_DOCUMENT,
    HAVE_MAX,
    MEMBER_ADDRESS_MAX_BYTES,
    PENDING_MAX,
    ZONE_MAX_BYTES,
    Ask,
    AskFlag,
    CrowdFrame,
    CrowdType,
    Done,
    Down,
    Follow,
    Giveup,
    GiveupReason,
    Gone,
    Gossip,
    Grant,
    Have,
    Heartbeat,
    LeaseRef,
    Level,
    Member,
    NotHome,
    Parent,
    Pending,
    Range,
    Ranges,
    Renew,
)
from p2pgz.core.digest import SHA256_BYTES
from p2pgz.core.messages import CHUNK_NUMBER_END, REQUEST_CHUNKS_MAX, RUNS_MAX, SIGNATURE_BYTES, Run
from p2pgz.core.peerid import ED25519_KEY_BYTES, PEER_ID_MAX_BYTES, PeerId
from p2pgz.errors import PeerFault

_HEADER: Final = struct.Struct(">IB")
_RUN: Final = struct.Struct(">II")
_ASK: Final = struct.Struct(f">I{SHA256_BYTES}sIBBBQQB")
_GRANT: Final = struct.Struct(">IQI")
_PARENT: Final = struct.Struct(">IQB")
_NOT_HOME: Final = struct.Struct(">IQ")
_REF: Final = struct.Struct(f">{SHA256_BYTES}sIBQ")
_FOLLOW: Final = struct.Struct(f">IB{SHA256_BYTES}sIBQB")
_HEARTBEAT: Final = struct.Struct(">QI")
_MEMBER: Final = struct.Struct(f">{ED25519_KEY_BYTES}sQQB")
_DOWN: Final = struct.Struct(f">{ED25519_KEY_BYTES}sQ{ED25519_KEY_BYTES}s{SIGNATURE_BYTES}s")
_RANGES: Final = struct.Struct(f">{BUCKETS}Q")
_U8: Final = struct.Struct(">B")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_KEY_OFFSET: Final = len(PeerId.of_ed25519(bytes(ED25519_KEY_BYTES)).raw) - ED25519_KEY_BYTES
_PREFIX: Final = PeerId.of_ed25519(bytes(ED25519_KEY_BYTES)).raw[:_KEY_OFFSET]

_MEMBER_LABEL: Final = b"p2pgz member 1\0"
_DOWN_LABEL: Final = b"p2pgz member down 1\0"
_MEMBER_MAX_BYTES: Final = _MEMBER.size + 2 + ZONE_MAX_BYTES + MEMBER_ADDRESS_MAX_BYTES + SIGNATURE_BYTES


def member_statement(member: Member) -> bytes:
    """What the owner of an entry signs; its signature in `member` is not looked at."""
    return _MEMBER_LABEL + _member_body(member)


def down_statement(down: Down) -> bytes:
    """What a reporter signs."""
    return _DOWN_LABEL + down.peer[_KEY_OFFSET:] + _U64.pack(down.stamp_ms) + down.reporter[_KEY_OFFSET:]


def peer_key(peer: bytes) -> bytes:
    """The Ed25519 key in a member's peer id."""
    return peer[_KEY_OFFSET:]


class _Fields:
    """Reads fields one after the other."""

    def __init__(self, view: memoryview, kind: CrowdType) -> None:
        self._view, self._at, self._kind = view, 0, kind

    def fault(self, what: str) -> PeerFault:
        return PeerFault(f"a {self._kind.name} frame {what}")

    def take(self, size: int) -> bytes:
        field = bytes(self._view[self._at : self._at + size])
        if len(field) != size:
            raise self.fault("that is cut short")
        self._at += size
        return field

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def number(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self.take(layout.size))[0])

    def count(self, layout: struct.Struct, limit: int) -> int:
        count = self.number(layout)
        if count > limit:
            raise self.fault(f"of {count} items, the limit is {limit}")
        return count

    def short(self, limit: int) -> bytes:
        return self.take(self.count(_U8, limit))

    def text(self, limit: int) -> str:
        raw = self.short(limit)
        if not raw.isascii() or not raw.decode("ascii").isprintable():
            raise self.fault("with text that is not plain ASCII")
        return raw.decode("ascii")

    def peers(self, limit: int) -> tuple[bytes, ...]:
        return tuple(self.short(PEER_ID_MAX_BYTES) for _ in range(self.count(_U8, limit)))

    def level(self) -> Level:
        value = self.number(_U8)
        if value > Level.CLUSTER:
            raise self.fault(f"about level {value}")
        return Level(value)

    def depth(self, *, none: bool = False) -> int:
        depth = self.number(_U8)
        if depth > DEPTH_MAX and not (none and depth == DEPTH_NONE):
            raise self.fault(f"with a depth of {depth}, the limit is {DEPTH_MAX}")
        return depth

    def ref(self) -> LeaseRef:
        swarm, extent = self.take(SHA256_BYTES), self.number(_U32)
        return LeaseRef(swarm, extent, self.level(), self.number(_U64))

    def runs(self) -> tuple[Run, ...]:
        count = self.count(_U32, RUNS_MAX)
        runs: tuple[Run, ...] = tuple(_RUN.iter_unpack(self.take(count * _RUN.size)))
        end = total = 0
        for first, length in runs:
            if length == 0 or first < end or first + length > CHUNK_NUMBER_END:
                raise self.fault("with runs that are empty, not ascending or out of range")
            end = first + length
            total += length
        if total > REQUEST_CHUNKS_MAX:
            raise self.fault(f"about {total} chunks")
        return runs

    def member(self) -> Member:
        key = self.take(ED25519_KEY_BYTES)
        stamp, since = self.number(_U64), self.number(_U64)
        flags = self.number(_U8)
        zone, address = self.text(ZONE_MAX_BYTES), self.text(MEMBER_ADDRESS_MAX_BYTES)
        return Member(_PREFIX + key, stamp, since, flags, zone, address, self.take(SIGNATURE_BYTES))

    def down(self) -> Down:
        peer, stamp = self.take(ED25519_KEY_BYTES), self.number(_U64)
        reporter = self.take(ED25519_KEY_BYTES)
        return Down(_PREFIX + peer, stamp, _PREFIX + reporter, self.take(SIGNATURE_BYTES))

    def end(self) -> None:
        if self._at != len(self._view):
            raise self.fault("with bytes behind its end")


def _ask(fields: _Fields) -> Ask:
    request, swarm, extent = fields.number(_U32), fields.take(SHA256_BYTES), fields.number(_U32)
    level, priority, flags = fields.level(), fields.number(_U8), fields.number(_U8)
    view, lease = fields.number(_U64), fields.number(_U64)
    depth = fields.depth(none=True)
    known = AskFlag(flags & AskFlag.NO_GRANT)
    exclude, avoid = fields.peers(EXCLUDED_MAX), fields.peers(EXCLUDED_MAX)
    return Ask(request, swarm, extent, level, priority, known, view, lease, depth, exclude, avoid)


def _parent(fields: _Fields) -> Parent:
    request, lease, depth = fields.number(_U32), fields.number(_U64), fields.depth()
    return Parent(request, lease, depth, fields.short(PEER_ID_MAX_BYTES))


def _giveup(fields: _Fields) -> Giveup:
    ref, reason = fields.ref(), fields.number(_U8)
    return Giveup(ref, GiveupReason(reason) if reason in set(GiveupReason) else GiveupReason.FAILED)


def _follow(fields: _Fields) -> Follow:
    request, priority = fields.number(_U32), fields.number(_U8)
    swarm, extent, level = fields.take(SHA256_BYTES), fields.number(_U32), fields.level()
    lease, depth = fields.number(_U64), fields.depth()
    runs = fields.runs()
    if (extent == EXTENT_DOCUMENT) == bool(runs):
        raise fields.fault("about no chunks, or about chunks of a document")
    return Follow(request, priority, swarm, extent, level, lease, depth, runs)


def _gossip(fields: _Fields) -> Gossip:
    answer = fields.number(_U8) == 1
    members, downs = fields.count(_U32, ENTRIES_MAX), fields.count(_U32, ENTRIES_MAX)
    return Gossip(
        answer,
        tuple(fields.member() for _ in range(members)),
        tuple(fields.down() for _ in range(downs)),
    )


_PARSERS: Final[dict[int, Callable[[_Fields], CrowdFrame]]] = {
    CrowdType.ASK: _ask,
    CrowdType.GRANT: lambda fields: Grant(*fields.numbers(_GRANT)),
    CrowdType.PARENT: _parent,
    CrowdType.HAVE: lambda fields: Have(fields.number(_U32), fields.peers(HAVE_MAX)),
    CrowdType.NOT_HOME: lambda fields: NotHome(*fields.numbers(_NOT_HOME)),
    CrowdType.RENEW: lambda fields: Renew(fields.ref(), fields.number(_U64)),
    CrowdType.DONE: lambda fields: Done(fields.ref(), fields.number(_U8) == 1),
    CrowdType.GIVEUP: _giveup,
    CrowdType.FOLLOW: _follow,
    CrowdType.PENDING: lambda fields: Pending(
        tuple(fields.number(_U32) for _ in range(fields.count(_U32, PENDING_MAX)))
    ),
    CrowdType.GONE: lambda fields: Gone(fields.number(_U32), fields.runs()),
    CrowdType.HEARTBEAT: lambda fields: Heartbeat(*fields.numbers(_HEARTBEAT)),
    CrowdType.GOSSIP: _gossip,
    CrowdType.RANGES: lambda fields: Ranges(fields.numbers(_RANGES)),
    CrowdType.RANGE: lambda fields: Range(tuple(fields.take(fields.count(_U32, BUCKETS)))),
}

_PEER_BYTES: Final = 1 + PEER_ID_MAX_BYTES
# Checked before a body is collected
BODY_MAX_BYTES: Final[dict[int, int]] = {
    CrowdType.ASK: _ASK.size + 2 * (1 + EXCLUDED_MAX * _PEER_BYTES),
    CrowdType.GRANT: _GRANT.size,
    CrowdType.PARENT: _PARENT.size + _PEER_BYTES,
    CrowdType.HAVE: _U32.size + 1 + HAVE_MAX * _PEER_BYTES,
    CrowdType.NOT_HOME: _NOT_HOME.size,
    CrowdType.RENEW: _REF.size + _U64.size,
    CrowdType.DONE: _REF.size + 1,
    CrowdType.GIVEUP: _REF.size + 1,
    CrowdType.FOLLOW: _FOLLOW.size + _U32.size + RUNS_MAX * _RUN.size,
    CrowdType.PENDING: _U32.size + PENDING_MAX * _U32.size,
    CrowdType.GONE: 2 * _U32.size + RUNS_MAX * _RUN.size,
    CrowdType.HEARTBEAT: _HEARTBEAT.size,
    CrowdType.GOSSIP: 1 + 2 * _U32.size + ENTRIES_MAX * (_MEMBER_MAX_BYTES + _DOWN.size),
    CrowdType.RANGES: _RANGES.size,
    CrowdType.RANGE: _U32.size + BUCKETS,
}


def parse_body(kind: int, view: memoryview) -> CrowdFrame:
    """The frame of a type of BODY_MAX_BYTES; raises PeerFault when the body is not one."""
    fields = _Fields(view, CrowdType(kind))
    frame = _PARSERS[kind](fields)
    fields.end()
    return frame


def _member_body(member: Member) -> bytes:
    zone, address = member.zone.encode("ascii"), member.address.encode("ascii")
    head = _MEMBER.pack(member.peer[_KEY_OFFSET:], member.stamp_ms, member.since_seconds, member.flags)
    return head + bytes([len(zone)]) + zone + bytes([len(address)]) + address


def _peers(peers: Iterable[bytes]) -> bytes:
    parts = [bytes([len(peer)]) + peer for peer in peers]
    return bytes([len(parts)]) + b"".join(parts)


def _runs(runs: Sequence[Run]) -> bytes:
    return _U32.pack(len(runs)) + b"".join([_RUN.pack(*run) for run in runs])


def _ref(ref: LeaseRef) -> bytes:
    return _REF.pack(ref.swarm, ref.extent, ref.level, ref.lease)


def encode(frame: CrowdFrame) -> bytes:
    """A frame with its header. The caller keeps to the limits."""
    match frame:
        case Ask():
            head = _ASK.pack(
                frame.request, frame.swarm, frame.extent, frame.level, frame.priority, frame.flags, frame.view,
                frame.lease, frame.depth,
            )  # fmt: skip
            kind, body = CrowdType.ASK, head + _peers(frame.exclude) + _peers(frame.avoid)
        case Grant(request, lease, ttl_ms):
            kind, body = CrowdType.GRANT, _GRANT.pack(request, lease, ttl_ms)
        case Parent(request, lease, depth, peer):
            kind, body = CrowdType.PARENT, _PARENT.pack(request, lease, depth) + bytes([len(peer)]) + peer
        case Have(request, peers):
            kind, body = CrowdType.HAVE, _U32.pack(request) + _peers(peers)
        case NotHome(request, view):
            kind, body = CrowdType.NOT_HOME, _NOT_HOME.pack(request, view)
        case Renew(ref, got_bytes):
            kind, body = CrowdType.RENEW, _ref(ref) + _U64.pack(got_bytes)
        case Done(ref, complete):
            kind, body = CrowdType.DONE, _ref(ref) + bytes([complete])
        case Giveup(ref, reason):
            kind, body = CrowdType.GIVEUP, _ref(ref) + bytes([reason])
        case Follow(request, priority, swarm, extent, level, lease, depth, runs):
            head = _FOLLOW.pack(request, priority, swarm, extent, level, lease, depth)
            kind, body = CrowdType.FOLLOW, head + _runs(runs)
        case Pending(requests):
            kind = CrowdType.PENDING
            body = _U32.pack(len(requests)) + b"".join([_U32.pack(request) for request in requests])
        case Gone(request, runs):
            kind, body = CrowdType.GONE, _U32.pack(request) + _runs(runs)
        case Heartbeat(view, members):
            kind, body = CrowdType.HEARTBEAT, _HEARTBEAT.pack(view, members)
        case Gossip(answer, entries, downs):
            parts = [bytes([answer]), _U32.pack(len(entries)), _U32.pack(len(downs))]
            parts += [_member_body(member) + member.signature for member in entries]
            parts += [
                _DOWN.pack(
                    down.peer[_KEY_OFFSET:], down.stamp_ms, down.reporter[_KEY_OFFSET:], down.signature
                )
                for down in downs
            ]
            kind, body = CrowdType.GOSSIP, b"".join(parts)
        case Ranges(hashes):
            kind, body = CrowdType.RANGES, _RANGES.pack(*hashes)
        case Range(buckets):  # pragma: no branch  # the last of all frames
            kind, body = CrowdType.RANGE, _U32.pack(len(buckets)) + bytes(buckets)
    return _HEADER.pack(len(body), kind) + body
