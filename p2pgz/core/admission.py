"""Who may take part: one decision for both planes, the exchange and the DHT.

Called when a peer has proven its id. A peer is admitted when its id is on the allow-list, or when it shows that it knows
a cluster key, by an HMAC over its own id: a proof is of no use to any other peer. During a rotation a node knows two keys,
shows both proofs and accepts either. With neither key nor list, whoever reaches the port may join. Design, section 6.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Final

from p2pgz.core.peerid import PeerId
from p2pgz.errors import ConfigError

PROOF_BYTES: Final = 32
PROOFS_MAX: Final = 2  # the new key and the old one
# A proof can be taken home and guessed at: a key of 16 random bytes is out of reach, a word is not
KEY_MIN_BYTES: Final = 16
_LABEL: Final = b"member"


class Admission:
    """The cluster keys and the allow-list of this node."""

    def __init__(self, *, cluster_keys: Sequence[bytes] = (), allowed: Iterable[PeerId] = ()) -> None:
        if len(cluster_keys) > PROOFS_MAX:
            raise ConfigError(
                f"{len(cluster_keys)} cluster keys", hint=f"at most {PROOFS_MAX}: the new one and the old one"
            )
        for key in cluster_keys:
            if len(key) < KEY_MIN_BYTES:
                raise ConfigError(
                    f"a cluster key of {len(key)} bytes can be guessed",
                    hint=f"at least {KEY_MIN_BYTES} random bytes, for example from `openssl rand -hex 32`",
                )
        self._keys = tuple(cluster_keys)
        self._allowed = frozenset(peer.raw for peer in allowed)

    def adopt(self, other: Admission) -> None:
        """Decide as the other does from now on: everybody who holds this object sees it."""
        self._keys, self._allowed = other._keys, other._allowed

    def __eq__(self, other: object) -> bool:
        """Whether both decide alike."""
        if not isinstance(other, Admission):
            return NotImplemented
        return (self._keys, self._allowed) == (other._keys, other._allowed)

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def open(self) -> bool:
        """Whether anyone may join."""
        return not self._keys and not self._allowed

    def may_be_member(self, peer: bytes) -> bool:
        """Whether what admitted peers tell of a peer is to be believed. It shows its own proof once it is connected to."""
        return self.open or bool(self._keys) or peer in self._allowed

    def proofs(self, own: PeerId) -> tuple[bytes, ...]:
        """What this node shows of its keys; safe to give to any peer."""
        return tuple(_proof(key, own) for key in self._keys)

    def admits(self, peer: PeerId, proofs: Iterable[bytes]) -> bool:
        """Whether a peer whose id is proven may take part. Takes the same time for every wrong proof."""
        if self.open or peer.raw in self._allowed:
            return True
        expected = self.proofs(peer)
        found = False
        for proof in proofs:
            for right in expected:
                found |= hmac.compare_digest(right, proof)
        return found


def _proof(key: bytes, peer: PeerId) -> bytes:
    return hmac.new(key, _LABEL + peer.raw, hashlib.sha256).digest()
