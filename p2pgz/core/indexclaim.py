"""What a node says about the own index of a plain layer: which document it is, and who has signed that it is true.

Asked for by diffID (`IndexWant`), answered as a small document; the index itself then travels by its sha256. A maker signs
the pair of diffID and document, so that anybody may pass the signature on. A claim proves nothing by itself: what it leads
to is checked against the diffID, and only a maker whom the configuration trusts is believed before that.
docs/reference/wire.md is the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.messages import DOCUMENT_MAX_BYTES, SIGNATURE_BYTES
from p2pgz.core.peerid import PeerId
from p2pgz.errors import PeerFault

CLAIM_MAX_BYTES: Final = 2048
MAKERS_MAX: Final = 8
_FORMAT: Final = 1
_LABEL: Final = b"p2pgz own index 1\0"

Verify = Callable[[bytes, bytes, bytes], bool]
"""public key, signature, message"""


class IndexClaim(msgspec.Struct, frozen=True):
    """The index document of a diffID, its size, and its makers' signatures by peer id."""

    document: Digest
    document_bytes: int
    makers: dict[PeerId, bytes]


class _Document(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: int
    document: bytes
    document_bytes: int
    makers: list[tuple[bytes, bytes]]


def statement(diff_id: Digest, document: Digest) -> bytes:
    """What a maker signs: the document is the own index of the stream with this diffID."""
    return _LABEL + diff_id.raw + document.raw


def to_bytes(claim: IndexClaim) -> bytes:
    """The claim as it travels."""
    makers = [(peer.raw, signature) for peer, signature in list(claim.makers.items())[:MAKERS_MAX]]
    return msgspec.msgpack.encode(_Document(_FORMAT, claim.document.raw, claim.document_bytes, makers))


def from_bytes(data: bytes, diff_id: Digest, verify: Verify) -> IndexClaim | None:
    """Parse and check what a peer claims about a diffID; raises PeerFault for nonsense and for a forged signature.

    None for a claim in a later version's words.
    """
    if len(data) > CLAIM_MAX_BYTES:
        raise PeerFault(f"a claim about an index of {len(data)} bytes, the limit is {CLAIM_MAX_BYTES}")
    try:
        if msgspec.msgpack.decode(data, type=list)[:1] not in ([_FORMAT], []):
            return None
        document = msgspec.msgpack.decode(data, type=_Document)
        makers = {PeerId(peer): signature for peer, signature in document.makers}
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise PeerFault("a claim about an index that is malformed") from None
    if (
        len(document.document) != SHA256_BYTES
        or not 0 < document.document_bytes <= DOCUMENT_MAX_BYTES
        or len(document.makers) > MAKERS_MAX
        or len(makers) != len(document.makers)
    ):
        raise PeerFault("a claim about an index with fields out of range")
    claim = IndexClaim(Digest(document.document), document.document_bytes, makers)
    message = statement(diff_id, claim.document)
    for peer, signature in makers.items():
        key = peer.ed25519_key
        if key is None or len(signature) != SIGNATURE_BYTES or not verify(key, signature, message):
            raise PeerFault(
                f"a claim about an index that {peer} did not sign", hint="the signature is forged"
            )
    return claim


def merged(makers: Iterable[dict[PeerId, bytes]], first: Iterable[PeerId]) -> dict[PeerId, bytes]:
    """Signatures of one document from several claims, at most MAKERS_MAX, those of `first` before the others."""
    every: dict[PeerId, bytes] = {}
    for some in makers:
        every |= some
    preferred = frozenset(first)
    order = sorted(every, key=lambda peer: (peer not in preferred, peer))
    return {peer: every[peer] for peer in order[:MAKERS_MAX]}
