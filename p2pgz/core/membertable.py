"""The member list: who is in the cluster, by entries that each member signs itself. State and rules, no messages.

Owned by `core.membership`. The entry with the highest stamp counts. Who has left or was found dead stays known for a while
with its last stamp, so that its old entries, which anybody may keep, do not bring it back; it comes back by signing anew.
Every table is bounded: ids and signatures cost nothing to make.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Final

from p2pgz.core.crowdframes import member_statement, peer_key
from p2pgz.core.crowdmsg import BUCKETS, Down, Member, MemberFlag
from p2pgz.errors import PeerFault

MEMBERS_MAX: Final = 16_384
GONE_MAX: Final = 4096
# Nodes at one address: several on a host, or behind one router; sybils would be more
PER_ADDRESS_MAX: Final = 64
# An entry is renewed every 8 hours and counts for 24, so that clocks may be wrong by half a day
ENTRY_SECONDS: Final = 86_400.0
AHEAD_SECONDS: Final = 43_200.0

Verify = Callable[[bytes, bytes, bytes], bool]
"""public key, signature, message"""


class Gone:
    """A member that has left or died: its last entry, and the reports that show others that it is dead."""

    __slots__ = ("downs", "member")

    def __init__(self, member: Member, downs: tuple[Down, ...] = ()) -> None:
        self.member = member
        self.downs = downs


class MemberTable:
    """The members, and those that were. `view` and `hashes` are the same in nodes that know the same."""

    def __init__(self, verify: Verify, admits: Callable[[bytes], bool]) -> None:
        self.members: dict[bytes, Member] = {}
        self.gone: dict[bytes, Gone] = {}
        self.hashes = [0] * BUCKETS
        self.view = 0
        self.deaths = 0
        self._verify = verify
        self._admits = admits
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.members)

    def is_news(self, member: Member) -> bool:
        """Whether an entry would change anything; cheap, before its signature is checked."""
        known = self.members.get(member.peer)
        if known is not None:
            return member.stamp_ms > known.stamp_ms
        gone = self.gone.get(member.peer)
        return gone is None or member.stamp_ms > gone.member.stamp_ms

    def has_room(self, member: Member, now: float) -> bool:
        """Whether it may be believed at all: its time, who it is, and that there are not too many like it."""
        age = now - member.stamp_ms / 1000
        if not -AHEAD_SECONDS <= age < ENTRY_SECONDS or member.since_seconds * 1000 > member.stamp_ms:
            return False
        if not self._admits(member.peer):
            return False
        if member.peer in self.members:
            return True
        host = host_of(member)
        return len(self.members) < MEMBERS_MAX and (not host or self._addresses[host] < PER_ADDRESS_MAX)

    def check(self, member: Member) -> None:
        """Check the signature; raises PeerFault, as whoever passes an entry on has checked it."""
        if not self._verify(peer_key(member.peer), member.signature, member_statement(member)):
            raise PeerFault("a member entry whose signature is wrong")

    def put(self, member: Member) -> None:
        """Take a checked entry."""
        self.remove(member.peer)
        if member.flags & MemberFlag.LEFT:
            self._keep_gone(Gone(member))
            return
        self.gone.pop(member.peer, None)
        self.members[member.peer] = member
        self._addresses[host_of(member)] += 1
        self._mix(member)

    def down(self, peer: bytes, downs: tuple[Down, ...]) -> None:
        """A member was found dead."""
        gone = Gone(self.members[peer], downs)
        self.deaths += 1
        self.remove(peer)
        self._keep_gone(gone)

    def remove(self, peer: bytes) -> None:
        """Forget a member, if it is one."""
        member = self.members.pop(peer, None)
        if member is None:
            return
        self._mix(member)
        host = host_of(member)
        self._addresses[host] -= 1
        if not self._addresses[host]:
            del self._addresses[host]

    def expire(self, now: float) -> None:
        """Forget those whose entries are too old: they would have renewed them."""
        old = [peer for peer, m in self.members.items() if now - m.stamp_ms / 1000 >= ENTRY_SECONDS]
        for peer in old:
            self.remove(peer)

    def bucket(self, buckets: set[int]) -> list[Member]:
        """The members in some buckets."""
        return [member for peer, member in self.members.items() if peer[-1] in buckets]

    def _keep_gone(self, gone: Gone) -> None:
        self.gone.pop(gone.member.peer, None)
        self.gone[gone.member.peer] = gone
        if len(self.gone) > GONE_MAX:
            del self.gone[next(iter(self.gone))]

    def _mix(self, member: Member) -> None:
        """Into the hashes, or out of them."""
        digest = hashlib.sha256(member.peer + member.stamp_ms.to_bytes(8, "big")).digest()
        number = int.from_bytes(digest[:8], "big")
        self.view ^= number
        self.hashes[member.peer[-1]] ^= number


def host_of(member: Member) -> str:
    """The part of an address that sybils share."""
    return member.address.partition("/tcp/")[0]
