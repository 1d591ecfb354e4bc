"""Who is asked for a chunk, and when another one is asked as well: plain decisions, time and state passed in.

Called by `fetch.race`. The order is pool, the peer with the least estimated wait, a second peer once the first takes longer
than nine in ten of its answers did, the registry when no peer has shown progress for a second (design, "Race").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from p2pgz.core.schedule import Priority

# A peer in the same rack answers in a millisecond; below this a pause of either event loop would count as slowness
HEDGE_MIN_SECONDS: Final = 0.02
# Nobody has answered yet: what a peer in another region may take
HEDGE_UNKNOWN_SECONDS: Final = 0.1
# No peer has shown progress for this long: the registry is asked as well
PROGRESS_SECONDS: Final = 1.0
# Bytes asked for twice, of all bytes asked for; a burst of slowness at the start must not be stuck for want of history
HEDGE_SHARE: Final = 0.05
HEDGE_ALLOWANCE_BYTES: Final = 8 << 20
SAMPLES: Final = 64
QUANTILE: Final = 0.9
BUSY_PEERS_MAX: Final = 4096
# What a peer is assumed to send before it has been measured: half of 1 Gbit/s
RATE_UNKNOWN_BYTES_PER_SECOND: Final = 60e6


class Latencies:
    """How long the first chunk of recent requests to a peer took."""

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)

    def sample(self, seconds: float) -> None:
        """Count one request."""
        self._samples.append(seconds)

    def hedge_after_seconds(self) -> float:
        """When a request without a first chunk counts as slow."""
        if not self._samples:
            return HEDGE_UNKNOWN_SECONDS
        ordered = sorted(self._samples)
        return max(HEDGE_MIN_SECONDS, ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))])


class HedgeBudget:
    """Keeps what is asked for twice to a share of what is asked for."""

    __slots__ = ("asked_bytes", "hedged_bytes")

    def __init__(self) -> None:
        self.asked_bytes = 0
        self.hedged_bytes = 0

    def ask(self, count: int) -> None:
        """Bytes asked for the first time."""
        self.asked_bytes += count

    def hedge(self, count: int) -> bool:
        """Whether these bytes may be asked for once more; counts them if so."""
        if self.hedged_bytes + count > HEDGE_ALLOWANCE_BYTES + HEDGE_SHARE * self.asked_bytes:
            return False
        self.hedged_bytes += count
        return True


PeerT = TypeVar("PeerT", bound=Hashable)


class BusyPeers(Generic[PeerT]):
    """Who wants to be left alone until when. Who has no room for the background may still serve a blocked read."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[PeerT, list[float]] = {}

    def note(self, peer: PeerT, priority: int, until: float) -> None:
        """A request of this class was refused; those of lesser ones would be, too."""
        times = self._until.pop(peer, None) or [0.0] * len(Priority)
        self._until[peer] = times[:priority] + [max(until, time) for time in times[priority:]]
        if len(self._until) > BUSY_PEERS_MAX:
            del self._until[next(iter(self._until))]

    def until(self, peer: PeerT, priority: int) -> float:
        """When a request of this class may be sent."""
        times = self._until.get(peer)
        return times[priority] if times is not None else 0.0


def assign(
    holders: Mapping[int, Sequence[PeerT]],
    sizes: Sequence[int] | memoryview,
    wait_seconds: Mapping[PeerT, float],
    bytes_per_second: Mapping[PeerT, float],
) -> dict[PeerT, list[int]]:
    """Give each chunk to the holder that would finish it first, counting what this call has given it before.

    Chunks keep their order, so that neighbours stay together as long as one peer is the quickest. Chunks without holders
    are left out.
    """
    waits = dict(wait_seconds)
    plan: dict[PeerT, list[int]] = {}
    for n, candidates in holders.items():
        if not candidates:
            continue
        best = min(candidates, key=lambda peer: waits.get(peer, 0.0))
        plan.setdefault(best, []).append(n)
        rate = bytes_per_second.get(best, 0.0) or RATE_UNKNOWN_BYTES_PER_SECOND
        waits[best] = waits.get(best, 0.0) + sizes[n] / rate
    return plan
