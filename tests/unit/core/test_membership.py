"""Members know each other, and who is gone: many machines on a network without delays worth mention, and single ones."""

from __future__ import annotations

import hashlib
import tracemalloc
from random import Random

import msgspec
import pytest

from p2pgz.core import accusations, membership, membertable
from p2pgz.core.accusations import WRONG_MAX, WRONG_SECONDS, Accusations
from p2pgz.core.crowdframes import down_statement, encode, member_statement, peer_key
from p2pgz.core.crowdmsg import (
    BUCKETS,
    Ask,
    AskFlag,
    CrowdFrame,
    Down,
    Gossip,
    Heartbeat,
    Level,
    Member,
    MemberFlag,
    Range,
    Ranges,
)
from p2pgz.core.leaseactions import Send
from p2pgz.core.memberlinks import NEW_BURST, Link, Unlink
from p2pgz.core.membership import (
    LAG_SECONDS,
    LINKS_MAX,
    PARTNERS_NEAR,
    PARTNERS_RANDOM,
    PARTNERS_SECONDS,
    PROBE_SECONDS,
    RENEW_SECONDS,
    SILENT_SECONDS,
    TICK_SECONDS,
    Action,
    Membership,
)
from p2pgz.core.membertable import AHEAD_SECONDS, ENTRY_SECONDS, PER_ADDRESS_MAX, MemberTable
from p2pgz.core.peerid import PeerId
from p2pgz.errors import PeerFault

BEGIN = 1_700_000_000.0


def signed(key: bytes, message: bytes) -> bytes:
    """A signature as good as any: who has no Ed25519 key here has no other way to make one."""
    return hashlib.sha512(key + message).digest()


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    return signature == signed(key, message)


def peer_of(seed: int) -> bytes:
    return PeerId.of_ed25519(Random(seed).randbytes(32)).raw


def entry(seed: int, *, at: float = BEGIN, flags: int = 0, address: str = "", since: float = 0) -> Member:
    unsigned = Member(peer_of(seed), int(at * 1000), int(since), flags, "zone", address, b"")
    key = peer_key(unsigned.peer)
    return msgspec.structs.replace(unsigned, signature=signed(key, member_statement(unsigned)))


def report(seed: int, of: Member) -> Down:
    unsigned = Down(of.peer, of.stamp_ms, peer_of(seed), b"")
    key = peer_key(unsigned.reporter)
    return msgspec.structs.replace(unsigned, signature=signed(key, down_statement(unsigned)))


def machine(seed: int, now: float = BEGIN) -> Membership:
    own = Member(peer_of(seed), 0, int(now), 0, "zone", f"/ip4/10.0.{seed >> 8}.{seed & 255}/tcp/4801", b"")
    return Membership(
        own,
        sign=lambda message: signed(peer_key(own.peer), message),
        verify=verify,
        admits=lambda peer: True,
        rng=Random(seed),
        now=now,
    )


def sent(actions: list[Action], kind: type[CrowdFrame]) -> list[CrowdFrame]:
    return [a.frame for a in actions if isinstance(a, Send) and isinstance(a.frame, kind)]


class Cluster:
    """Machines whose frames arrive at once, with links that are made when asked for."""

    def __init__(self, count: int) -> None:
        self.now = BEGIN
        self.nodes = {peer_of(i): machine(i) for i in range(count)}
        self.dead: set[bytes] = set()
        self.silent: set[bytes] = set()
        self.sides: dict[bytes, int] = {}
        self.bytes: dict[bytes, int] = dict.fromkeys(self.nodes, 0)
        self._todo: list[tuple[bytes, Action]] = []

    def reach(self, one: bytes, other: bytes) -> bool:
        return other not in self.dead and self.sides.get(one, 0) == self.sides.get(other, 0)

    def join(self, peer: bytes, by: bytes) -> None:
        self._do(peer, self.nodes[peer].linked(by, self.now))
        self._do(by, self.nodes[by].linked(peer, self.now))
        self._settle()

    def _do(self, peer: bytes, actions: list[Action]) -> None:
        self._todo += [(peer, action) for action in actions]

    def _settle(self) -> None:
        while self._todo:
            peer, action = self._todo.pop(0)
            node = self.nodes[peer]
            match action:
                case Send(to, frame):
                    self.bytes[peer] += len(encode(frame))
                    if self.reach(peer, to):
                        self._do(to, self.nodes[to].receive(peer, frame, self.now))
                case Link(member):
                    if self.reach(peer, member.peer):
                        self.join(peer, member.peer)
                    elif member.peer not in self.silent:
                        self._do(peer, node.unreachable(member.peer, self.now))
                case Unlink():
                    pass

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_SECONDS
            for peer, node in self.nodes.items():
                if peer not in self.dead:
                    self._do(peer, node.tick(self.now))
                    self._settle()

    def die(self, peer: bytes, *, silent: bool) -> None:
        self.dead.add(peer)
        if silent:
            self.silent.add(peer)
            return
        for other, node in self.nodes.items():
            if other not in self.dead and peer in node.links:
                self._do(other, node.unlinked(peer, self.now))
        self._settle()

    def agree(self) -> bool:
        alive = [node for peer, node in self.nodes.items() if peer not in self.dead]
        expected = self.nodes.keys() - self.dead
        return all(node.members.keys() == expected for node in alive) and len({n.view for n in alive}) == 1


def joined(count: int) -> Cluster:
    cluster = Cluster(count)
    peers = list(cluster.nodes)
    for peer in peers[1:]:
        cluster.join(peer, peers[0])
    cluster.run(3.0)
    assert cluster.agree()
    return cluster


def test_all_know_all_soon_after_they_joined_by_one() -> None:
    cluster = joined(40)
    for node in cluster.nodes.values():
        assert len(node.links) >= len(node.partners) == PARTNERS_RANDOM + PARTNERS_NEAR
        assert all(member.since_seconds == int(BEGIN) for member in node.members.values())


@pytest.mark.parametrize("silent", [False, True])
def test_a_dead_member_is_known_within_ten_seconds(silent: bool) -> None:
    cluster = joined(30)
    victim = list(cluster.nodes)[7]
    cluster.die(victim, silent=silent)
    cluster.run(10.0 if silent else 0.5)
    assert cluster.agree()


def test_two_nodes_notice_that_one_is_gone() -> None:
    cluster = joined(2)
    cluster.die(list(cluster.nodes)[1], silent=True)
    cluster.run(10.0)
    assert cluster.agree()


def test_who_leaves_is_gone_at_once() -> None:
    cluster = joined(12)
    peer = list(cluster.nodes)[5]
    cluster._do(peer, cluster.nodes[peer].leave(cluster.now))
    cluster._settle()
    cluster.dead.add(peer)
    cluster.run(0.5)
    assert cluster.agree()


def test_news_cost_each_node_a_few_entries() -> None:
    """5 KB/s at 10 000 members and 1 % of them coming or going in a minute: 3.3 news a second."""
    cluster = joined(30)
    before = dict(cluster.bytes)
    cluster.run(10.0)
    idle = sum(cluster.bytes[peer] - before[peer] for peer in cluster.nodes) / len(cluster.nodes) / 10
    before = dict(cluster.bytes)
    for peer in list(cluster.nodes)[:20]:
        cluster._do(peer, cluster.nodes[peer].readdress("/ip4/192.168.100.200/tcp/4801", cluster.now))
    cluster.run(10.0)
    busy = sum(cluster.bytes[peer] - before[peer] for peer in cluster.nodes) / len(cluster.nodes) / 10
    per_news = (busy - idle) * 10 / 20
    assert idle < 600  # with a comparison of all hashes by some
    assert idle + per_news * 3.3 < 5000


def test_both_sides_of_a_partition_find_together_again() -> None:
    cluster = joined(16)
    peers = list(cluster.nodes)
    cluster.sides = dict.fromkeys(peers[:6], 1)
    cluster.silent = set(peers)  # nothing answers, nothing is refused
    cluster.run(12.0)
    assert {len(node.members) for node in cluster.nodes.values()} == {6, 10}
    cluster.sides = {}
    cluster.run(4 * PROBE_SECONDS)
    assert cluster.agree()


def test_a_node_whose_loop_was_late_accuses_nobody() -> None:
    cluster = joined(10)
    peers = list(cluster.nodes)
    cluster.now += 60.0  # the whole machine stood still, say
    cluster.run(SILENT_SECONDS + 1)
    assert cluster.agree()
    late = cluster.nodes[peers[0]]
    late.tick(cluster.now + LAG_SECONDS + 1)
    assert late.unreachable(peers[1], cluster.now + LAG_SECONDS + 1) == []
    assert late.table.members.keys() == cluster.nodes.keys()


def test_one_liar_costs_a_member_nothing_but_a_signature() -> None:
    cluster = joined(10)
    peers = list(cluster.nodes)
    victim, liar = cluster.nodes[peers[1]], peers[2]
    for _ in range(3):
        down = report(2, victim.own)
        for other in peers[3:]:
            cluster._do(other, cluster.nodes[other].receive(liar, Gossip(False, (), (down,)), cluster.now))
        cluster._settle()
        cluster.run(3.0)
        assert cluster.agree()
    assert victim.refuted == 3


class TestOne:
    def test_old_entries_bring_nobody_back(self) -> None:
        node = machine(0)
        old, new = entry(1, at=BEGIN), entry(1, at=BEGIN + 1, flags=MemberFlag.LEFT)
        node.receive(peer_of(2), Gossip(False, (old,)), BEGIN)
        assert old.peer in node.members
        node.receive(peer_of(2), Gossip(False, (new,)), BEGIN)
        assert old.peer not in node.members
        # and who still believes it is told
        (answer,) = sent(node.receive(peer_of(3), Gossip(False, (old,)), BEGIN), Gossip)
        assert answer == Gossip(False, (new,))
        assert old.peer not in node.members
        node.receive(peer_of(3), Gossip(False, (entry(1, at=BEGIN + 2),)), BEGIN)
        assert old.peer in node.members

    def test_entries_of_another_time_are_refused(self) -> None:
        node = machine(0)
        for member in (
            entry(1, at=BEGIN - ENTRY_SECONDS),
            entry(1, at=BEGIN + AHEAD_SECONDS + 1),
            entry(1, at=BEGIN, since=BEGIN + 1),
        ):
            node.receive(peer_of(2), Gossip(False, (member,)), BEGIN)
        assert list(node.members) == [node.own.peer]
        assert node.refused == 3

    def test_entries_that_are_not_renewed_are_forgotten(self) -> None:
        node = machine(0)
        node.receive(peer_of(2), Gossip(False, (entry(1),)), BEGIN)
        later = BEGIN
        while later < BEGIN + ENTRY_SECONDS:
            later += 0.4 * RENEW_SECONDS
            node.linked(peer_of(2), later)
            node.tick(later)
        assert list(node.members) == [node.own.peer]
        assert node.own.stamp_ms > BEGIN * 1000

    def test_wrong_signatures_are_their_senders_fault(self) -> None:
        node = machine(0)
        forged = msgspec.structs.replace(entry(1), zone="other")
        with pytest.raises(PeerFault, match="signature"):
            node.receive(peer_of(2), Gossip(False, (forged,)), BEGIN)
        good = entry(1)
        node.receive(peer_of(2), Gossip(False, (good, entry(2))), BEGIN)
        wrong = msgspec.structs.replace(report(2, good), signature=bytes(64))
        with pytest.raises(PeerFault, match="signature"):
            node.receive(peer_of(2), Gossip(False, (), (wrong,)), BEGIN)

    def test_reports_of_strangers_and_of_other_entries_do_not_count(self) -> None:
        node = machine(0)
        good = entry(1)
        node.receive(peer_of(2), Gossip(False, (good, entry(2), entry(3))), BEGIN)
        for down in (
            report(99, good),
            report(2, entry(1, at=BEGIN + 5)),
            report(2, entry(50)),
            report(1, good),
            report(0, good),
        ):
            node.receive(peer_of(2), Gossip(False, (), (down,)), BEGIN)
        assert good.peer in node.members
        node.receive(peer_of(2), Gossip(False, (), (report(2, good), report(2, good))), BEGIN)
        assert good.peer in node.members
        # the second one, who is dead by now himself, but was a member
        gone = entry(3, at=BEGIN + 1, flags=MemberFlag.LEFT)
        node.receive(peer_of(2), Gossip(False, (gone,), (report(3, good),)), BEGIN)
        assert good.peer not in node.members
        (answer,) = sent(node.receive(peer_of(4), Gossip(True, (good,)), BEGIN), Gossip)
        assert answer == Gossip(False, (), (report(2, good), report(3, good)))

    def test_an_entry_of_an_earlier_life_is_outdone(self) -> None:
        node = machine(0)
        earlier = entry(0, at=BEGIN + 500)
        node.receive(peer_of(2), Gossip(False, (earlier,)), BEGIN)
        assert node.own.stamp_ms == earlier.stamp_ms + 1
        node.receive(peer_of(2), Gossip(False, (earlier,)), BEGIN)
        assert node.own.stamp_ms == earlier.stamp_ms + 1

    def test_sybils_of_one_address_are_few(self) -> None:
        node = machine(0)
        sybils = [entry(1000 + i, address=f"/ip4/10.9.9.9/tcp/{i}") for i in range(PER_ADDRESS_MAX + 20)]
        for sybil in sybils:
            node.receive(peer_of(2), Gossip(False, (sybil,)), BEGIN)
        assert len(node.members) == PER_ADDRESS_MAX + 1
        node.table.remove(sybils[0].peer)
        node.table.remove(sybils[0].peer)
        node.receive(peer_of(2), Gossip(False, (sybils[-1],)), BEGIN)
        assert sybils[-1].peer in node.members

    def test_a_flood_of_joins_by_one_link_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(membership, "NEW_BURST", 10)
        node = machine(0)
        for i in range(50):
            node.receive(peer_of(2), Gossip(False, (entry(1000 + i),)), BEGIN)
        assert len(node.members) == 11
        # who is known may change, and later there is room again
        node.receive(peer_of(2), Gossip(False, (entry(1000, at=BEGIN + 1),)), BEGIN)
        assert node.members[peer_of(1000)].stamp_ms == (BEGIN + 1) * 1000
        node.receive(peer_of(2), Gossip(False, (entry(1049),)), BEGIN + 1)
        assert len(node.members) == 12
        assert NEW_BURST > 10

    def test_tables_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(membertable, "MEMBERS_MAX", 5)
        monkeypatch.setattr(membertable, "GONE_MAX", 3)
        node = machine(0)
        for i in range(10):
            node.receive(peer_of(2), Gossip(False, (entry(1000 + i),)), BEGIN)
        assert len(node.members) == 5
        for i in range(10):
            left = entry(1000 + i, at=BEGIN + 1, flags=MemberFlag.LEFT)
            node.receive(peer_of(2), Gossip(False, (left,)), BEGIN)
        assert len(node.table.gone) == 3

    def test_who_may_not_take_part_is_no_member(self) -> None:
        table = MemberTable(verify, lambda peer: peer == peer_of(1))
        assert table.has_room(entry(1), BEGIN)
        assert not table.has_room(entry(2), BEGIN)

    def test_a_full_node_still_answers_heartbeats(self) -> None:
        node = machine(0)
        for i in range(LINKS_MAX):
            node.linked(peer_of(100 + i), BEGIN)
        stranger = peer_of(9)
        assert sent(node.receive(stranger, Heartbeat(0, 1), BEGIN), Heartbeat) == [Heartbeat(node.view, 1)]
        assert node.receive(stranger, Gossip(False, (entry(9),)), BEGIN) == []
        node.linked(stranger, BEGIN)  # asked for by this node itself
        unlinked = [a for a in node.tick(BEGIN + TICK_SECONDS) if isinstance(a, Unlink)]
        assert len(unlinked) == 1
        assert len(node.links) == LINKS_MAX

    def test_links_that_neither_end_has_chosen_end_after_a_while(self) -> None:
        node = machine(0)
        members = [peer_of(n) for n in range(1, 20)]
        for n, peer in enumerate(members, 1):
            node.linked(peer, BEGIN)
            node.receive(peer, Gossip(False, (entry(n),)), BEGIN)
        chosen, at = set[bytes](), BEGIN
        while at < BEGIN + 3 * PARTNERS_SECONDS:
            at += TICK_SECONDS
            for peer in node.links:
                node.heard(peer, at)
            released = {
                a.peer for a in node.tick(at) if isinstance(a, Send) and a.frame == Heartbeat(node.view, 0)
            }
            if released:
                chosen = set(node.partners)
                break
        assert chosen == set(node.links)
        assert released == set(members) - chosen
        other = released.pop()  # to which this one matters
        node.receive(other, Heartbeat(1, 20), at)
        assert other in node.links
        node.receive(other, Heartbeat(1, 0), at)
        assert other not in node.links
        (partner, *_) = chosen
        assert sent(node.receive(partner, Heartbeat(1, 0), at), Heartbeat) == [Heartbeat(node.view, 20)]
        assert partner in node.links

    def test_comparisons_are_answered_with_what_differs_and_not_too_often(self) -> None:
        node = machine(0)
        for i in range(1, 200):
            node.receive(peer_of(2), Gossip(True, (entry(i),)), BEGIN)
        other = peer_of(3)
        same = Ranges(tuple(node.table.hashes))
        assert node.receive(other, same, BEGIN) == []
        empty = Ranges((0,) * BUCKETS)
        assert node.receive(other, empty, BEGIN) == []
        actions = node.receive(other, empty, BEGIN + 10)
        (wanted,) = sent(actions, Range)
        told = [member for frame in sent(actions, Gossip) for member in frame.members]  # type: ignore[union-attr]
        assert {m.peer for m in told} == set(node.members)
        assert isinstance(wanted, Range)
        assert wanted.buckets == tuple(sorted({peer[-1] for peer in node.members}))
        one = node.own.peer[-1]
        (frame,) = sent(node.receive(other, Range((one,)), BEGIN), Gossip)
        assert isinstance(frame, Gossip)
        assert frame.answer
        assert all(member.peer[-1] == one for member in frame.members)
        assert node.receive(other, Range((one,)), BEGIN + 4) == []
        assert len(sent(node.receive(other, Range((one,)), BEGIN + 5), Gossip)) == 1

    def test_who_hears_nobody_decides_alone(self) -> None:
        node = machine(0)
        node.receive(peer_of(2), Gossip(False, (entry(1), entry(2))), BEGIN)
        assert len(node.electable(BEGIN)) == 3
        node.heard(peer_of(2), BEGIN + 5)
        node.heard(peer_of(77), BEGIN + 5)
        assert len(node.electable(BEGIN + 10)) == 3
        assert list(node.electable(BEGIN + 12)) == [node.own.peer]

    def test_lost_partners_are_connected_to_again(self) -> None:
        node = machine(0)
        node.receive(peer_of(1), Gossip(False, (entry(1), entry(2))), BEGIN)
        links = [a.member.peer for a in node.tick(BEGIN + 1.5) if isinstance(a, Link)]
        assert links == [peer_of(2)]
        assert [a.member.peer for a in node.unlinked(peer_of(1), BEGIN + 2) if isinstance(a, Link)] == [
            peer_of(1)
        ]
        assert node.unlinked(peer_of(50), BEGIN + 2) == []
        node.unreachable(peer_of(50), BEGIN + 2)

    def test_frames_about_leases_are_not_for_it(self) -> None:
        ask = Ask(1, bytes(32), 1, Level.ZONE, 0, AskFlag.NONE, 0)
        assert machine(0).receive(peer_of(1), ask, BEGIN) == []

    def test_ten_thousand_members_are_no_more_than_8_megabytes(self) -> None:
        rng = Random(1)
        table = MemberTable(lambda *_: True, lambda peer: True)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(10_000):
            peer = PeerId.of_ed25519(rng.randbytes(32)).raw
            address = f"/ip4/10.{i >> 16}.{i >> 8 & 255}.{i & 255}/tcp/4801"
            table.put(
                Member(
                    peer, 1_700_000_000_000 + i, 1_700_000_000 + i, 0, "zone-a", address, rng.randbytes(64)
                )
            )
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert used < 8 << 20


class TestAccusations:
    def test_reports_are_forgotten_after_a_while(self) -> None:
        found = Accusations()
        victim = entry(1)
        assert found.add(report(2, victim), 9, BEGIN) == ()
        assert found.add(report(3, victim), 9, BEGIN + 31) == ()
        assert found.add(report(2, victim), 9, BEGIN + 32) == (report(3, victim), report(2, victim))

    def test_who_is_wrong_often_is_not_believed_for_a_while(self) -> None:
        found = Accusations()
        for i in range(WRONG_MAX):
            assert found.believes(peer_of(2), BEGIN)
            found.refuted(peer_of(1), [report(2, entry(1, at=BEGIN + i))], BEGIN)
        assert not found.believes(peer_of(2), BEGIN)
        assert found.believes(peer_of(2), BEGIN + WRONG_SECONDS)
        found.refuted(peer_of(1), [report(2, entry(1))], BEGIN + WRONG_SECONDS)
        assert found.believes(peer_of(2), BEGIN + WRONG_SECONDS)

    def test_its_tables_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(accusations, "ACCUSED_MAX", 3)
        monkeypatch.setattr(accusations, "REPORTERS_MAX", 3)
        found = Accusations()
        for i in range(9):
            found.add(report(1, entry(10 + i)), 9, BEGIN)
        assert len(found._reports) == 3
        for i in range(9):
            found.refuted(peer_of(1), [report(100 + i, entry(1))], BEGIN)
        assert len(found._wrong) == 3
