"""Homes: which members decide about an extent. A rendezvous hash, the same for everyone who knows the same members.

Called by `core.leases` with what `core.membership` knows. Electors are the elders (their own signed entry says that they
started 30 s ago or more): when a cluster starts cold, nobody knows the same newcomers. Without elders the seeds are
electors, without seeds everybody. Members that know other members find other homes: that costs a copy, never an error.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from p2pgz.core.crowdmsg import Level, Member, MemberFlag

ELDER_SECONDS: Final = 30
HOMES: Final = 3
# Who asks somebody whose view differs a little is answered: within this many of the highest scores
HOMES_TOLERATED: Final = 6
# A zone with more members is split into parts, each with its own homes: a home's loop takes about 1 ms for an asker to whom
# it was not connected. Simulated with 1 000 nodes in one second: 4.8 s without parts, 0.3 s with four.
PART_MEMBERS: Final = 256
_REMEMBERED: Final = 16_384
_LANE_BYTES: Final = 16
_MASK: Final = (1 << 64) - 1
_LABEL: Final = b"p2pgz home 1\0"


def place(swarm: bytes, extent: int) -> int:
    """The number of an extent that scores are made with."""
    digest = hashlib.sha256(_LABEL + swarm + struct.pack(">I", extent)).digest()
    return int.from_bytes(digest[:8], "big") | 1


@lru_cache(maxsize=16_384)  # asked for all members each time that one comes or goes
def weight(peer: bytes) -> int:
    """The number of a member that scores are made with."""
    return int.from_bytes(hashlib.sha256(peer).digest()[:8], "big") | 1


def score(peer: bytes, swarm: bytes, extent: int) -> int:
    """The members with the highest scores are the homes of an extent."""
    return (weight(peer) * place(swarm, extent)) & _MASK


class Roster:
    """Electors, with their numbers packed so that one multiplication scores all of them (1 to 2 ms for 10 000)."""

    __slots__ = ("_packed", "_unpack", "peers")

    def __init__(self, peers: Iterable[bytes]) -> None:
        self.peers = sorted(peers)
        lanes = b"".join([weight(peer).to_bytes(_LANE_BYTES, "little") for peer in self.peers])
        self._packed = int.from_bytes(lanes, "little")
        self._unpack = struct.Struct("<" + "Q8x" * len(self.peers))

    def top(self, number: int, count: int) -> tuple[bytes, ...]:
        """The `count` electors with the highest scores, highest first."""
        product = (self._packed * number).to_bytes(self._unpack.size + _LANE_BYTES, "little")
        scores = list(self._unpack.unpack_from(product))
        found = []
        for _ in range(min(count, len(scores))):
            at = scores.index(max(scores))
            scores[at] = -1
            found.append(self.peers[at])
        return tuple(found)


class Electorate:
    """Who may be home, as of one moment: made anew when the members have changed, and while some become elders.

    `members` are by peer id, and must not change while this is in use, but for what nobody asks for any more. What the
    rest of the leases calls a zone is a part here.
    """

    def __init__(self, members: Mapping[bytes, Member], now: float) -> None:
        self._members = members
        sizes = Counter(member.zone for member in members.values())
        self._parts = {zone: _parts(size) for zone, size in sizes.items()}
        inside: dict[str, list[Member]] = {}
        for member in members.values():
            inside.setdefault(self.part(member.zone, member.peer), []).append(member)
        self._rosters = {part: Roster(_electors(some, now)) for part, some in inside.items()}
        self._cluster = Roster(_electors(list(members.values()), now))
        self._known: dict[tuple[bytes, int, str | None], tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def part(self, zone: str, peer: bytes) -> str:
        """Which part of its zone a member belongs to."""
        count = self._parts.get(zone, 1)
        return zone if count == 1 else f"{zone}/{(weight(peer) >> 1) % count}"

    def zone_of(self, peer: bytes) -> str | None:
        """The zone of a member; None for others."""
        member = self._members.get(peer)
        return member.zone if member is not None else None

    def levels(self) -> tuple[Level, ...]:
        """Whom to ask, first to last: the part's homes only where there are several parts."""
        return (Level.ZONE, Level.CLUSTER) if len(self._rosters) > 1 else (Level.CLUSTER,)

    def homes(self, swarm: bytes, extent: int, level: Level, part: str) -> tuple[bytes, ...]:
        """The homes of an extent, the first to ask first."""
        return self._ranked(swarm, extent, level, part)[:HOMES]

    def is_home(self, peer: bytes, swarm: bytes, extent: int, level: Level, part: str) -> bool:
        """Whether a member may take itself for a home."""
        return peer in self._ranked(swarm, extent, level, part)

    def same_electors(self, other: Electorate) -> bool:
        """Whether all homes are the same in the other one."""
        return self._electors() == other._electors()

    def _electors(self) -> dict[str | None, list[bytes]]:
        return {None: self._cluster.peers, **{part: roster.peers for part, roster in self._rosters.items()}}

    def _ranked(self, swarm: bytes, extent: int, level: Level, part: str) -> tuple[bytes, ...]:
        key = (swarm, extent, part if level is Level.ZONE else None)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            roster = self._rosters.get(part, self._cluster) if level is Level.ZONE else self._cluster
            found = self._known[key] = roster.top(place(swarm, extent), HOMES_TOLERATED)
        return found


def _parts(members: int) -> int:
    """A power of two, so that a zone that grows splits its parts rather than mixing them."""
    count = 1
    while members > count * PART_MEMBERS:
        count *= 2
    return count


def _electors(members: Sequence[Member], now: float) -> list[bytes]:
    elders = [m.peer for m in members if m.since_seconds + ELDER_SECONDS <= now]
    seeds = [m.peer for m in members if m.flags & MemberFlag.SEED]
    return elders or seeds or [m.peer for m in members]
