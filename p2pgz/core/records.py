"""The messages of `/p2pgz/records/1.0.0`: pointers in bulk, withdrawals, and whether a peer has restarted.

Kademlia's protocol has no words for these, and a client that knows only Kademlia needs none. Bytes in, values out and
back; the format is in docs/reference/dht.md. Each request is one message and has one `Reply`. Peers send these: nothing is
trusted. The first message on a connection is a greeting, which also carries the proofs of `core.admission`.
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple

from p2pgz.core.admission import PROOF_BYTES, PROOFS_MAX
from p2pgz.core.digest import SHA256_BYTES
from p2pgz.core.pointers import MAX_SHARE_POINTERS, POINTER_BYTES, Offer, Share, Verdict
from p2pgz.core.providers import MAX_KEY_BYTES
from p2pgz.errors import PeerFault

PROTOCOL = "/p2pgz/records/1.0.0"
MAX_MESSAGE_BYTES = 1 << 20
MAX_WITHDRAWN = 1000  # keys in one message
EPOCH_BYTES = 8

_GREETING, _OFFER, _SHARE, _WITHDRAW = 1, 2, 3, 4
_OFFER_FIELDS = struct.Struct(">32sBI32s")  # TOC digest, flags, number of pointers, sha256 of them
_SHARE_FIELDS = struct.Struct(">32sB")  # TOC digest, flags; the pointers follow
_REPLY = struct.Struct(">8sBB")  # epoch, verdict, other senders
_COMPLETE = 1  # flag: the sender has every chunk of the TOC


class Greeting(NamedTuple):
    """The sender's epoch, and proofs that it knows the cluster key; the reply has the same of the answering side."""

    epoch: bytes
    proofs: tuple[bytes, ...] = ()


class Withdrawal(NamedTuple):
    """The sender no longer provides these keys."""

    keys: tuple[bytes, ...]


class Reply(NamedTuple):
    """`epoch` is random per start of the answering node: another one means that it forgot everything."""

    epoch: bytes
    verdict: Verdict = Verdict.HAVE
    other_senders: int = 0
    proofs: tuple[bytes, ...] = ()


Request = Greeting | Offer | Share | Withdrawal


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    match request:
        case Greeting(epoch, proofs):
            return bytes([_GREETING]) + epoch + b"".join(proofs)
        case Offer(toc, complete, count, fingerprint):
            return bytes([_OFFER]) + _OFFER_FIELDS.pack(toc, _COMPLETE * complete, count, fingerprint)
        case Share(toc, complete, prefixes):
            return bytes([_SHARE]) + _SHARE_FIELDS.pack(toc, _COMPLETE * complete) + prefixes
        case withdrawal:
            return bytes([_WITHDRAW]) + b"".join(bytes([len(key)]) + key for key in withdrawal.keys)


def decode_request(message: bytes) -> Request:
    """The request in some bytes; raises PeerFault for anything else."""
    if not message or len(message) > MAX_MESSAGE_BYTES:
        raise _malformed("empty, or too long")
    kind, body = message[0], message[1:]
    match kind:
        case 1 if len(body) >= EPOCH_BYTES:
            return Greeting(body[:EPOCH_BYTES], _proofs(body[EPOCH_BYTES:]))
        case 2 if len(body) == _OFFER_FIELDS.size:
            toc, flags, count, fingerprint = _OFFER_FIELDS.unpack(body)
            return Offer(toc, bool(flags & _COMPLETE), count, fingerprint)
        case 3 if len(body) >= _SHARE_FIELDS.size:
            toc, flags = _SHARE_FIELDS.unpack_from(body)
            return Share(toc, bool(flags & _COMPLETE), _sorted_prefixes(body[_SHARE_FIELDS.size :]))
        case 4:
            return Withdrawal(_keys(body))
    raise _malformed(f"kind {kind} with {len(body)} bytes")


def encode_reply(reply: Reply) -> bytes:
    """The bytes of a reply."""
    return _REPLY.pack(reply.epoch, reply.verdict, min(reply.other_senders, 255)) + b"".join(reply.proofs)


def decode_reply(message: bytes) -> Reply:
    """The reply in some bytes; raises PeerFault for anything else."""
    if len(message) < _REPLY.size:
        raise _malformed(f"a reply of {len(message)} bytes")
    epoch, verdict, others = _REPLY.unpack_from(message)
    try:
        return Reply(epoch, Verdict(verdict), others, _proofs(message[_REPLY.size :]))
    except ValueError as error:
        raise _malformed(f"verdict {verdict}") from error


def _sorted_prefixes(body: bytes) -> bytes:
    """Pointers come sorted and once each, so that their digest means the same on both sides."""
    count, rest = divmod(len(body), POINTER_BYTES)
    if rest or count > MAX_SHARE_POINTERS:
        raise _malformed(f"{len(body)} bytes of pointers")
    prefixes = [body[at : at + POINTER_BYTES] for at in range(0, len(body), POINTER_BYTES)]
    if any(one >= other for one, other in itertools.pairwise(prefixes)):
        raise _malformed("pointers out of order")
    return body


def _proofs(body: bytes) -> tuple[bytes, ...]:
    count, rest = divmod(len(body), PROOF_BYTES)
    if rest or count > PROOFS_MAX:
        raise _malformed(f"{len(body)} bytes of proofs")
    return tuple(body[at : at + PROOF_BYTES] for at in range(0, len(body), PROOF_BYTES))


def _keys(body: bytes) -> tuple[bytes, ...]:
    keys: list[bytes] = []
    at = 0
    while at < len(body):
        size = body[at]
        key = body[at + 1 : at + 1 + size]
        if not 0 < size <= MAX_KEY_BYTES or len(key) != size or len(keys) == MAX_WITHDRAWN:
            raise _malformed("keys to withdraw")
        keys.append(key)
        at += 1 + size
    return tuple(keys)


def _malformed(what: str) -> PeerFault:
    return PeerFault(f"a peer's message of {PROTOCOL} is malformed: {what}")


assert _OFFER_FIELDS.size == 2 * SHA256_BYTES + 5
assert _REPLY.size == EPOCH_BYTES + 2
assert 1 + _SHARE_FIELDS.size + MAX_SHARE_POINTERS * POINTER_BYTES <= MAX_MESSAGE_BYTES
