"""What one peer says it has: the bitmaps that we follow on its connection.

Called by `p2p.connection` and, for choosing whom to ask, by the exchange. A bitmap is the peer's word only: what turns out
missing is struck off, and a peer whose word is wrong too often is a liar.
"""

from __future__ import annotations

from typing import Final

from p2pgz.core.messages import Bitmap, BitmapDelta, Proof, Run
from p2pgz.core.sharing import Proofs
from p2pgz.errors import PeerFault

# A chunk may be evicted between two deltas; so many in one connection are no accident
LIES_MAX: Final = 16
FOLLOWED_MAX: Final = 1024


class _Told:
    __slots__ = ("believed", "bits", "count", "secret")

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        """what the peer has to prove that it knows"""
        self.believed = not secret
        self.count = 0
        self.bits = bytearray()


class Bitmaps:
    """The followed swarms of one peer. `proofs` are those of the connection, if agreed on."""

    def __init__(self, proofs: Proofs | None = None) -> None:
        self._proofs = proofs
        self._told: dict[bytes, _Told] = {}
        self._left: set[bytes] = set()
        self.lies = 0

    def __bool__(self) -> bool:
        return bool(self._told)

    @property
    def any(self) -> bool:
        """Whether the peer says that it has anything of what we follow."""
        return any(any(told.bits) for told in self._told.values())

    @property
    def swarms(self) -> int:
        """Of how many of the swarms that we follow the peer says it has something."""
        return sum(any(told.bits) for told in self._told.values())

    def follow(self, swarm: bytes, secret: bytes = b"") -> bool:
        """Whether the peer is to be asked (not followed yet). With a secret, it has to prove that it knows it, too."""
        if swarm in self._told or len(self._told) >= FOLLOWED_MAX or (secret and self._proofs is None):
            return False
        self._told[swarm] = _Told(secret)
        self._left.discard(swarm)
        return True

    def unfollow(self, swarm: bytes) -> bool:
        """Whether the peer is to be told."""
        if self._told.pop(swarm, None) is None:
            return False
        self._left.add(swarm)
        return True

    def has(self, swarm: bytes, n: int) -> bool:
        """Whether the peer says it has chunk n."""
        told = self._told.get(swarm)
        return told is not None and n < told.count and bool(told.bits[n >> 3] >> (n & 7) & 1)

    def count(self, swarm: bytes) -> int:
        """How many chunks it says it has."""
        told = self._told.get(swarm)
        return int.from_bytes(told.bits, "little").bit_count() if told is not None else 0

    def held(self, swarm: bytes) -> int:
        """The chunks it says it has, as bits."""
        told = self._told.get(swarm)
        return int.from_bytes(told.bits, "little") if told is not None else 0

    def on_proof(self, frame: Proof) -> None:
        """The peer proves that it knows the image of a swarm. Raises PeerFault when it does not."""
        told = self._find(frame.swarm)
        if told is None:
            return
        if self._proofs is None or not told.secret:
            raise PeerFault("a proof of access that nobody asked for")
        if not self._proofs.shares(told.secret, frame.swarm, frame.proof):
            raise PeerFault("a wrong proof of access")
        told.believed = True  # it may come once more, when we have left and joined again

    def on_bitmap(self, frame: Bitmap) -> None:
        """Take a whole bitmap. Raises PeerFault."""
        told = self._find(frame.swarm)
        if told is not None:
            if frame.count and not told.believed:
                raise PeerFault("the bitmap of a swarm whose image the peer has not proven to know")
            told.count, told.bits = frame.count, bytearray(frame.bits)

    def on_delta(self, frame: BitmapDelta) -> None:
        """Take changes. Raises PeerFault."""
        told = self._find(frame.swarm)
        if told is not None:
            _mark(told, frame.got, present=True)
            _mark(told, frame.lost, present=False)

    def was_missing(self, swarm: bytes, n: int) -> None:
        """The peer answered MISSING. Raises PeerFault when its bitmap said otherwise once too often."""
        if not self.has(swarm, n):
            return
        told = self._told[swarm]
        told.bits[n >> 3] &= ~(1 << (n & 7)) & 0xFF
        self.lies += 1
        if self.lies > LIES_MAX:
            raise PeerLies(f"{self.lies} chunks that its bitmaps promised were missing")

    def _find(self, swarm: bytes) -> _Told | None:
        told = self._told.get(swarm)
        if told is None and swarm not in self._left:
            raise PeerFault("a bitmap of a swarm that we do not follow")
        return told


class PeerLies(PeerFault):
    """The bitmaps of a peer are not true."""


def _mark(told: _Told, runs: tuple[Run, ...], *, present: bool) -> None:
    bits = told.bits
    for first, count in runs:
        if first + count > told.count:
            raise PeerFault("a bitmap change of chunks that the swarm does not have")
        for n in range(first, first + count):
            if present:
                bits[n >> 3] |= 1 << (n & 7)
            else:
                bits[n >> 3] &= ~(1 << (n & 7)) & 0xFF
