"""What this node thinks of its peers: faults cost a peer its place, for longer each time.

Called by the exchange; time is an argument. A place is lost for BAN_START_SECONDS, doubled by each further fault up to a
day; a day without one and the peer is as good as new. Failures that have innocent reasons (a connection that broke, a
slow answer) only make a peer wait for seconds.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Final

from p2pgz.core.peerid import PeerId

BAN_START_SECONDS: Final = 600.0
BAN_MAX_SECONDS: Final = 86_400.0
SUSPECT_START_SECONDS: Final = 1.0
SUSPECT_MAX_SECONDS: Final = 60.0
# ids cost nothing to make: the oldest go first
PEERS_MAX: Final = 4096


class Fault(StrEnum):
    """What a peer did; the label of a counter."""

    CORRUPT = "corrupt"
    """other bytes than the chunk's"""
    PROTOCOL = "protocol"
    """a frame that the protocol does not allow, or nobody asked for"""
    LIE = "lie"
    """a bitmap with chunks that do not come"""
    SLOW = "slow"
    """no progress for too long"""
    LOST = "lost"
    """the connection could not be made, or broke"""


GRAVE: Final = frozenset({Fault.CORRUPT, Fault.PROTOCOL, Fault.LIE})


class Standing:
    """The faults of peers. Bans and the waits after innocent failures are kept apart: neither lengthens the other."""

    def __init__(self) -> None:
        self.counts: Counter[Fault] = Counter()
        self._bans: dict[PeerId, tuple[float, float, int]] = {}  # until, since, how often
        self._suspects: dict[PeerId, tuple[float, float, int, Fault]] = {}  # the same, and the last fault
        self._of: dict[PeerId, Counter[Fault]] = {}

    def fault(self, peer: PeerId, fault: Fault, now: float) -> float:
        """Note a fault; returns until when the peer is not asked."""
        self.counts[fault] += 1
        faults = self._of.pop(peer, Counter())
        faults[fault] += 1
        self._of[peer] = faults  # the newest goes last
        if fault in GRAVE:
            _, since, times = self._bans.pop(peer, (0.0, now, 0))
            times = 0 if now - since > BAN_MAX_SECONDS else times
            until = now + min(BAN_MAX_SECONDS, BAN_START_SECONDS * 2.0 ** min(times, 30))
            self._bans[peer] = (until, now, times + 1)
        else:
            _, since, times, _ = self._suspects.pop(peer, (0.0, now, 0, fault))
            times = 0 if now - since > BAN_MAX_SECONDS else times
            until = now + min(SUSPECT_MAX_SECONDS, SUSPECT_START_SECONDS * 2.0 ** min(times, 30))
            self._suspects[peer] = (until, now, times + 1, fault)
        for known in (self._bans, self._suspects, self._of):
            while len(known) > PEERS_MAX:
                del known[next(iter(known))]
        return max(until, self.out_until(peer, now))

    def good(self, peer: PeerId) -> None:
        """It answered well: what had innocent reasons is forgotten."""
        self._suspects.pop(peer, None)

    def reached(self, peer: PeerId) -> None:
        """It could be connected to: that it could not be before counts no more."""
        if peer in self._suspects and self._suspects[peer][3] is Fault.LOST:
            del self._suspects[peer]

    def out_until(self, peer: PeerId, now: float) -> float:
        """Until when the peer is not asked; 0 when it may be."""
        until = max(
            self._bans[peer][0] if peer in self._bans else 0.0,
            self._suspects[peer][0] if peer in self._suspects else 0.0,
        )
        return until if until > now else 0.0

    def banned(self, peer: PeerId, now: float) -> bool:
        """Whether it has lost its place by a grave fault: we do not serve it either."""
        return peer in self._bans and self._bans[peer][0] > now

    def faults_of(self, peer: PeerId) -> dict[str, int]:
        """How often a peer did what, by the fault's name."""
        return {str(fault): count for fault, count in self._of.get(peer, {}).items()}

    def out(self, now: float) -> list[PeerId]:
        """Those that are not asked now, the one whose last fault is the newest at the end."""
        return [peer for peer in self._of if self.out_until(peer, now)]
