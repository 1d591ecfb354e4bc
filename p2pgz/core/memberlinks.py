"""What `core.membership` keeps of each connection, and what it asks its caller to do with them."""

from __future__ import annotations

from typing import Final, NamedTuple

from p2pgz.core.crowdmsg import Member

# Unknown members from one link: a sync of a large cluster at once, then what joins in a cluster of 10 000
NEW_BURST: Final = 4096
NEW_PER_SECOND: Final = 100.0


class Link(NamedTuple):
    """Connect to this member, and say `linked`, or `unreachable`."""

    member: Member


class Unlink(NamedTuple):
    """This connection is not needed for membership any more."""

    peer: bytes


class LinkState:
    """One connection on which news go."""

    __slots__ = ("answered_at", "heard_at", "new", "new_at", "sent_at", "since")

    def __init__(self, now: float) -> None:
        self.since = self.heard_at = self.new_at = now
        self.answered_at = self.sent_at = 0.0
        self.new = float(NEW_BURST)
