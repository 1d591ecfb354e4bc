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
    """The faults of peers."""

    def __init__(self) -> None:
        self.counts: Counter[Fault] = Counter()
        self._until: dict[PeerId, tuple[float, float, int, bool]] = {}  # until, since, how often, grave

    def fault(self, peer: PeerId, fault: Fault, now: float) -> float:
        """Note a fault; returns until when the peer is not asked."""
        self.counts[fault] += 1
        grave = fault in GRAVE
        _, since, times, was_grave = self._until.pop(peer, (0.0, now, 0, grave))
        if now - since > BAN_MAX_SECONDS or grave != was_grave:
            times = 0 if grave or not was_grave else times
        grave = grave or was_grave
        start, longest = (
            (BAN_START_SECONDS, BAN_MAX_SECONDS) if grave else (SUSPECT_START_SECONDS, SUSPECT_MAX_SECONDS)
        )
        until = now + min(longest, start * 2.0 ** min(times, 30))
        self._until[peer] = (until, now, times + 1, grave)
        while len(self._until) > PEERS_MAX:
            del self._until[next(iter(self._until))]
        return until

    def good(self, peer: PeerId) -> None:
        """It answered well: what had innocent reasons is forgotten."""
        entry = self._until.get(peer)
        if entry is not None and not entry[3]:
            del self._until[peer]

    def out_until(self, peer: PeerId, now: float) -> float:
        """Until when the peer is not asked; 0 when it may be."""
        entry = self._until.get(peer)
        return entry[0] if entry is not None and entry[0] > now else 0.0

    def banned(self, peer: PeerId, now: float) -> bool:
        """Whether it has lost its place by a grave fault: we do not serve it either."""
        entry = self._until.get(peer)
        return entry is not None and entry[3] and entry[0] > now
