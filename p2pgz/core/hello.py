"""The first two frames of a connection: versions, features, and who the dialling end is.

The accepting end has proven itself by its TLS certificate; its HELLO brings a nonce. The dialling end signs that nonce
together with both ids (`statement`): a signature is of no use on another connection or towards another node, so a
node in the middle cannot pass it on. Pure decisions, called by `p2p.handshake`; signing and checking are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from p2pgz.core.admission import Admission
from p2pgz.core.messages import NONCE_BYTES, Feature, GoodbyeReason, Hello
from p2pgz.core.peerid import PeerId
from p2pgz.errors import PeerFault

# A release speaks its own version and the one before
LOWEST_VERSION: Final = 1
HIGHEST_VERSION: Final = 1
# Of every node; those about other nodes are added by who takes part in that
FEATURES: Final = Feature.ZSTD | Feature.PROOF | Feature.INDEX
_KNOWN: Final = ~Feature(0)
_LABEL: Final = b"p2pgz exchange hello\0"

Verify = Callable[[bytes, bytes, bytes], bool]
"""public key, signature, message"""


class Agreement(NamedTuple):
    """What both ends can do."""

    version: int
    features: Feature


class Refused(PeerFault):
    """The connection ends here, and the other end is told why. It did nothing wrong: no other version, key or list."""

    def __init__(self, what: str, reason: GoodbyeReason, *, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.reason = reason


def statement(accepting: PeerId, nonce: bytes, dialling: PeerId) -> bytes:
    """What the dialling end signs."""
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
    ids = b"".join(bytes([len(peer.raw)]) + peer.raw for peer in (accepting, dialling))
    return _LABEL + nonce + ids


def agree(ours: Hello, theirs: Hello) -> Agreement:
    """The highest version that both speak; raises Refused when there is none."""
    version = min(ours.highest, theirs.highest)
    if version < max(ours.lowest, theirs.lowest):
        raise Refused(
            f"the peer speaks versions {theirs.lowest} to {theirs.highest} of the exchange, we speak "
            f"{ours.lowest} to {ours.highest}",
            GoodbyeReason.VERSION,
            hint="upgrade the older node; neighbouring versions understand each other",
        )
    return Agreement(version, Feature(ours.features & theirs.features & _KNOWN))


def claimed_id(hello: Hello) -> PeerId:
    """The peer id in a HELLO; raises PeerFault when it is none with an Ed25519 key."""
    try:
        peer = PeerId(hello.peer)
    except ValueError:
        raise PeerFault("a HELLO frame with something else than a peer id") from None
    if peer.ed25519_key is None:
        raise PeerFault(f"peer {peer} has no Ed25519 key", hint="the exchange knows no other keys")
    return peer


def check_dialling(
    hello: Hello, *, own: PeerId, nonce: bytes, admission: Admission, verify: Verify
) -> PeerId:
    """The proven id of the end that dialled us; raises PeerFault, or Refused when it may not take part."""
    peer = claimed_id(hello)
    key = peer.ed25519_key
    if key is None or not verify(key, hello.signature, statement(own, nonce, peer)):
        raise PeerFault(f"the peer says that it is {peer} and cannot prove it")
    _admit(peer, own, hello, admission)
    return peer


def check_accepting(hello: Hello, *, proven: PeerId, own: PeerId, admission: Admission) -> None:
    """Check the HELLO of the end that we dialled, whose certificate has proven `proven`; raises PeerFault, Refused."""
    if claimed_id(hello) != proven:
        raise PeerFault(f"peer {proven} says hello as {claimed_id(hello)}")
    _admit(proven, own, hello, admission)


def _admit(peer: PeerId, own: PeerId, hello: Hello, admission: Admission) -> None:
    if peer == own:
        raise Refused(
            "this is ourselves, or another node with our identity",
            GoodbyeReason.NOT_ADMITTED,
            hint="identities must not be copied between hosts: remove identity.key on one of them",
        )
    if not admission.admits(peer, hello.proofs):
        raise Refused(
            f"peer {peer} is not admitted",
            GoodbyeReason.NOT_ADMITTED,
            hint="peers.cluster_key_file or peers.allow says who is",
        )
