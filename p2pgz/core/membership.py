"""Membership: every node knows all others of its cluster within seconds, and that one is dead within ten.

Sans-io: the caller passes in frames, time (seconds since 1970, never going back) and what happens to connections, and does
what each call returns. A node keeps links to 6 partners, 3 at random and 3 next to it in the order of ids, on which
heartbeats go every 2 s and news are flooded in batches. One link a minute is compared by hashes, which repairs whatever a
flood has missed. docs/reference/wire.md, "Membership".

A member is dead when two others say so, signed, and it does not refute it by signing its entry anew. A node whose own loop
has been late accuses nobody. Wrong views cost a copy of an extent (`core.homes`), never an error.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Final

import msgspec

from p2pgz.core.accusations import Accusations
from p2pgz.core.crowdframes import down_statement, member_statement, peer_key
from p2pgz.core.crowdmsg import (
    BUCKETS,
    ENTRIES_MAX,
    CrowdFrame,
    Down,
    Gossip,
    Heartbeat,
    Member,
    MemberFlag,
    Range,
    Ranges,
)
from p2pgz.core.leaseactions import Send
from p2pgz.core.memberlinks import NEW_BURST, NEW_PER_SECOND, Link, LinkState, Unlink
from p2pgz.core.membertable import ENTRY_SECONDS, Gone, MemberTable, Verify
from p2pgz.errors import PeerFault

TICK_SECONDS: Final = 0.1  # also how long news are collected
QUIET_TICK_SECONDS: Final = 0.5
HEARTBEAT_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 6.0
# A loop that was late by this much has not heard what was there to be heard
LAG_SECONDS: Final = 1.0
PARTNERS_RANDOM: Final = 3
PARTNERS_NEAR: Final = 3
LINKS_MAX: Final = 32
PARTNERS_SECONDS: Final = 30.0
JOIN_SECONDS: Final = 1.0  # partners are chosen again this soon while there are too few
COMPARE_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 5.0  # between answers to comparisons of one link: they are large
PROBE_SECONDS: Final = 30.0
RENEW_SECONDS: Final = ENTRY_SECONDS / 3
REFUTE_SECONDS: Final = 2.0
Action = Send | Link | Unlink


class Membership:
    """`own` is this node's entry without stamp and signature; `sign` signs for it, `admits(peer)`: who may be a member."""

    def __init__(
        self,
        own: Member,
        *,
        sign: Callable[[bytes], bytes],
        verify: Verify,
        admits: Callable[[bytes], bool],
        rng: Random,
        now: float,
    ) -> None:
        self.table = MemberTable(verify, admits)
        self.own = own
        self.refuted = 0
        self.refused = 0
        self._sign = sign
        self._verify = verify
        self._rng = rng
        self._links: dict[bytes, LinkState] = {}
        self._partners: set[bytes] = set()
        self._news: dict[bytes, tuple[Member, set[bytes]]] = {}
        self._down_news: dict[tuple[bytes, bytes], tuple[Down, set[bytes]]] = {}
        self._accusations = Accusations()
        self._sent: list[Action] = []
        self._begun = self._ticked_at = self._calm_at = self._signed_at = now
        self._heartbeat_at = self._partners_at = 0.0
        self._compare_at = now + rng.random() * COMPARE_SECONDS
        self._probe_at = now + PROBE_SECONDS
        self._renew_at = 0.0
        self._sign_own(now)

    @property
    def members(self) -> Mapping[bytes, Member]:
        """All that are known, this node among them."""
        return self.table.members

    @property
    def view(self) -> int:
        """The same in nodes that know the same members."""
        return self.table.view

    @property
    def links(self) -> Collection[bytes]:
        """Whom news go to."""
        return self._links.keys()

    @property
    def has_news(self) -> bool:
        """Whether the next `tick` has something to send on."""
        return bool(self._news or self._down_news)

    @property
    def partners(self) -> Collection[bytes]:
        """Those of them, or of those to be linked, that this node has chosen."""
        return self._partners

    def electable(self, now: float) -> dict[bytes, Member]:
        """Who may be home. A node that hears nobody decides for itself: it waits for none of those it knows."""
        return dict(self.table.members) if self.hears(now) else {self.own.peer: self.own}

    def hears(self, now: float) -> bool:
        """Whether there is anybody."""
        return any(now - link.heard_at < SILENT_SECONDS for link in self._links.values())

    # --- what the caller says; each returns what is to be done

    def linked(self, peer: bytes, now: float) -> list[Action]:
        """There is a connection to another node: a partner, or one that may become a member by it."""
        self._link(peer, now)
        self._send(peer, Gossip(False, (self.own,)))
        self._send(peer, Ranges(tuple(self.table.hashes)))
        return self._actions()

    def unlinked(self, peer: bytes, now: float) -> list[Action]:
        """A connection has ended. It is made again if it is needed; only when that fails the peer is reported."""
        self._links.pop(peer, None)
        member = self.table.members.get(peer)
        if member is not None and peer in self._partners:
            self._sent.append(Link(member))
        return self._actions()

    def unreachable(self, peer: bytes, now: float) -> list[Action]:
        """A member cannot be connected to."""
        self._links.pop(peer, None)
        self._partners.discard(peer)
        self._accuse(peer, now)
        self._partners_at = 0.0
        return self._actions()

    def heard(self, peer: bytes, now: float) -> None:
        """Bytes of any kind have come from a peer."""
        link = self._links.get(peer)
        if link is not None:
            link.heard_at = now

    def readdress(self, address: str, now: float) -> list[Action]:
        """This node is reached at another address now."""
        self.own = msgspec.structs.replace(self.own, address=address)
        self._sign_own(now)
        return self._actions()

    def leave(self, now: float) -> list[Action]:
        """This node stops."""
        self.own = msgspec.structs.replace(self.own, flags=self.own.flags | MemberFlag.LEFT)
        self._sign_own(now)
        self._flush()
        return self._actions()

    def receive(self, peer: bytes, frame: CrowdFrame, now: float) -> list[Action]:
        """A frame about members has come; raises PeerFault when its sender cannot have checked what it says.

        A Gossip takes up to 10 ms (signatures); the caller lets others run between two.
        """
        if isinstance(frame, Heartbeat) and not frame.members:
            self._released(peer)
            return self._actions()
        link = self._links.get(peer)
        if link is None and len(self._links) < LINKS_MAX:
            link = self._link(peer, now)
        if link is None:  # full: but it must not take this node for dead
            if isinstance(frame, Heartbeat):
                self._send(peer, Heartbeat(self.table.view, len(self.table)))
            return self._actions()
        link.heard_at = now
        match frame:
            case Gossip(answer, members, downs):
                known = [self._heard_of(member, peer, link, now, quiet=answer) for member in members]
                for down in downs:
                    self._reported(down, peer, now)
                self._contradict(peer, [gone for gone in known if gone is not None])
            case Ranges(hashes) if now - link.answered_at >= ANSWER_SECONDS:
                link.answered_at = now
                ours = self.table.hashes
                differing = {n for n in range(BUCKETS) if hashes[n] != ours[n]}
                if differing:
                    self._send(peer, Range(tuple(sorted(differing))))
                    self._answer(peer, differing)
            case Range(buckets) if now - link.sent_at >= ANSWER_SECONDS:
                link.sent_at = now
                self._answer(peer, set(buckets))
            case _:  # heartbeats have been heard by now; what comes too often is not answered
                pass
        return self._actions()

    def tick(self, now: float) -> list[Action]:
        """To be called every TICK_SECONDS while it `has_news`, else every QUIET_TICK_SECONDS."""
        late = now - self._ticked_at
        self._ticked_at = now
        if late > LAG_SECONDS:
            self._calm_at = now + SILENT_SECONDS
            for link in self._links.values():
                link.heard_at += late
        for peer, link in list(self._links.items()):
            if now - link.heard_at >= SILENT_SECONDS:
                del self._links[peer]
                self._partners.discard(peer)
                self._partners_at = 0.0
                self._sent.append(Unlink(peer))
                self._accuse(peer, now)
        if now >= self._renew_at:
            self._sign_own(now)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + HEARTBEAT_SECONDS
            for peer in self._links:
                self._send(peer, Heartbeat(self.table.view, len(self.table)))
        if now >= self._partners_at:
            self._partners_at = now + PARTNERS_SECONDS
            self._choose_partners(now)
        if now >= self._compare_at and self._links:
            self._compare_at = now + COMPARE_SECONDS
            self.table.expire(now)
            self._send(self._rng.choice(list(self._links)), Ranges(tuple(self.table.hashes)))
        if now >= self._probe_at:
            self._probe_at = now + PROBE_SECONDS
            self._probe()
        self._flush()
        return self._actions()

    # --- entries

    def _heard_of(
        self, member: Member, peer: bytes, link: LinkState, now: float, *, quiet: bool
    ) -> Gone | None:
        """Take an entry; returns what is known of it when it is of one that has gone."""
        if member.peer == self.own.peer:
            if member.stamp_ms > self.own.stamp_ms:  # of an earlier life, by another clock
                self.table.check(member)
                self._sign_own(now, above=member.stamp_ms)
            return None
        if member.peer in self._news:
            self._news[member.peer][1].add(peer)
        if not self.table.is_news(member):
            return None if member.flags & MemberFlag.LEFT else self.table.gone.get(member.peer)
        if not self.table.has_room(member, now) or not self._affords(member, link, now):
            self.refused += 1
            return None
        self.table.check(member)
        gone = self.table.gone.get(member.peer)
        self._accusations.refuted(member.peer, gone.downs if gone is not None else (), now)
        self.table.put(member)
        if len(self._partners) < PARTNERS_RANDOM + PARTNERS_NEAR:
            self._partners_at = min(self._partners_at, now + JOIN_SECONDS)
        # a newcomer learns what all others know: it has nothing to tell
        if not quiet or now - self._begun > COMPARE_SECONDS:
            self._news[member.peer] = (member, {peer})
        return None

    def _contradict(self, peer: bytes, gone: list[Gone]) -> None:
        """Tell a link that those whose entries it sent have gone; if they have not, they will sign anew."""
        downs = [down for one in gone for down in one.downs]
        left = [one.member for one in gone if one.member.flags & MemberFlag.LEFT]
        for at in range(0, max(len(downs), len(left)), ENTRIES_MAX):
            part = slice(at, at + ENTRIES_MAX)
            self._send(peer, Gossip(False, tuple(left[part]), tuple(downs[part])))

    def _affords(self, member: Member, link: LinkState, now: float) -> bool:
        """Whether this link may tell of one more member that was unknown."""
        if member.peer in self.table.members:
            return True
        link.new = min(float(NEW_BURST), link.new + (now - link.new_at) * NEW_PER_SECOND)
        link.new_at = now
        if link.new < 1:
            return False
        link.new -= 1
        return True

    def _sign_own(self, now: float, *, above: int = 0) -> None:
        stamp = max(self.own.stamp_ms + 1, above + 1, int(now * 1000))
        unsigned = msgspec.structs.replace(self.own, stamp_ms=stamp, signature=b"")
        self.own = msgspec.structs.replace(unsigned, signature=self._sign(member_statement(unsigned)))
        self._signed_at = now
        self._renew_at = now + RENEW_SECONDS * self._rng.uniform(0.8, 1.2)
        self.table.put(self.own)
        self._news[self.own.peer] = (self.own, set())

    # --- deaths

    def _accuse(self, peer: bytes, now: float) -> None:
        member = self.table.members.get(peer)
        if member is None or now < self._calm_at:
            return
        unsigned = Down(peer, member.stamp_ms, self.own.peer, b"")
        down = msgspec.structs.replace(unsigned, signature=self._sign(down_statement(unsigned)))
        self._count(down, self.own.peer, now)

    def _reported(self, down: Down, peer: bytes, now: float) -> None:
        if (down.peer, down.reporter) in self._down_news:
            self._down_news[down.peer, down.reporter][1].add(peer)
        member = self.table.members.get(down.peer)
        if member is None or member.stamp_ms != down.stamp_ms or self._accusations.has(down):
            return
        if down.reporter in (down.peer, self.own.peer) or not self._accusations.believes(down.reporter, now):
            return
        about_this_node = down.peer == self.own.peer
        known = down.reporter in self.table.members or down.reporter in self.table.gone
        if now - self._signed_at < REFUTE_SECONDS if about_this_node else not known:
            return
        if not self._verify(peer_key(down.reporter), down.signature, down_statement(down)):
            raise PeerFault("a report of a dead member whose signature is wrong")
        if about_this_node:
            self.refuted += 1
            self._sign_own(now)
        else:
            self._count(down, peer, now)

    def _count(self, down: Down, source: bytes, now: float) -> None:
        self._down_news[down.peer, down.reporter] = (down, {source})
        enough = self._accusations.add(down, len(self.table) - 1, now)
        if enough:
            self._links.pop(down.peer, None)
            self.table.down(down.peer, enough)

    # --- links

    def _link(self, peer: bytes, now: float) -> LinkState:
        return self._links.setdefault(peer, LinkState(now))

    def _choose_partners(self, now: float) -> None:
        members = self.table.members
        own = self.own.peer
        above = heapq.nsmallest(PARTNERS_NEAR, (peer for peer in members if peer > own))
        below = heapq.nsmallest(PARTNERS_NEAR - len(above), (peer for peer in members if peer < own))
        near = {*above, *below}
        kept = [peer for peer in self._partners - near if peer in members and peer in self._links]
        chosen = near | set(kept[:PARTNERS_RANDOM])
        rest = [peer for peer in members if peer not in chosen and peer != own]
        wanted = PARTNERS_RANDOM - (len(chosen) - len(near))
        chosen.update(self._rng.sample(rest, min(wanted, len(rest))))
        self._partners = chosen
        self._sent += [Link(members[peer]) for peer in sorted(chosen) if peer not in self._links]
        spare = [peer for peer in self._links if peer not in chosen]
        excess = len(self._links) - LINKS_MAX
        joined = chosen <= self._links.keys()  # then the others are not needed, if the other end agrees
        for at, peer in enumerate(spare):
            if at >= excess and not (joined and now - self._links[peer].since >= PARTNERS_SECONDS):
                continue
            del self._links[peer]
            self._sent.append(Unlink(peer))
            self._send(peer, Heartbeat(self.table.view, 0))

    def _released(self, peer: bytes) -> None:
        """It has no need of this link. If we have chosen it, it hears of us, and has the link again."""
        if peer in self._partners:
            self._send(peer, Heartbeat(self.table.view, len(self.table)))
        else:
            self._links.pop(peer, None)

    def _probe(self) -> None:
        """Somebody found dead may be on the other side of a partition that is over."""
        dead = [gone.member for gone in self.table.gone.values() if gone.downs]
        if dead:
            self._sent.append(Link(self._rng.choice(dead)))

    # --- sending

    def _answer(self, peer: bytes, buckets: set[int]) -> None:
        entries = self.table.bucket(buckets)
        for at in range(0, len(entries), ENTRIES_MAX):
            self._send(peer, Gossip(True, tuple(entries[at : at + ENTRIES_MAX])))

    def _flush(self) -> None:
        news, self._news = self._news, {}
        downs, self._down_news = self._down_news, {}
        for peer in self._links:
            entries = [member for member, known_by in news.values() if peer not in known_by]
            reports = [down for down, known_by in downs.values() if peer not in known_by]
            for at in range(0, max(len(entries), len(reports)), ENTRIES_MAX):
                part = slice(at, at + ENTRIES_MAX)
                self._send(peer, Gossip(False, tuple(entries[part]), tuple(reports[part])))

    def _send(self, peer: bytes, frame: CrowdFrame) -> None:
        self._sent.append(Send(peer, frame))

    def _actions(self) -> list[Action]:
        sent, self._sent = self._sent, []
        return sent
