"""Leases, frame by frame: what homes answer, what members do when homes and parents are wrong, silent or gone."""

from __future__ import annotations

from random import Random

import pytest

from p2pgz.core import leaseflight, leasehome, leasesteps
from p2pgz.core.crowdmsg import (
    DEPTH_MAX,
    DEPTH_NONE,
    EXCLUDED_MAX,
    EXTENT_DOCUMENT,
    Ask,
    AskFlag,
    CrowdFrame,
    Done,
    Follow,
    Giveup,
    GiveupReason,
    Gone,
    Grant,
    Have,
    Heartbeat,
    LeaseRef,
    Level,
    Member,
    NotHome,
    Parent,
    Pending,
    Renew,
)
from p2pgz.core.homes import Electorate
from p2pgz.core.leaseactions import Action, Direct, Fetch, Send, Serve
from p2pgz.core.leaseflight import STALL_DEPTH_SECONDS
from p2pgz.core.leasehome import (
    AVOIDED_ALONE_SECONDS,
    AVOIDED_SECONDS,
    HAVE_AFTER_SECONDS,
    LEASE_SECONDS,
    OPEN_MAX,
    STALL_SECONDS,
    HomeDesk,
)
from p2pgz.core.leases import Leases
from p2pgz.core.leasesteps import FORGOTTEN_SECONDS, LAST_HOME_SECONDS, PAUSE_SECONDS, SILENCE_SECONDS

SWARM = bytes(range(32))
CLUSTER = Level.CLUSTER
EXTENT = 7


def ask(
    request: int = 1,
    *,
    exclude: tuple[bytes, ...] = (),
    lease: int = 0,
    depth: int = DEPTH_NONE,
    flags: AskFlag = AskFlag.NONE,
    extent: int = EXTENT,
    avoid: tuple[bytes, ...] = (),
    priority: int = 0,
) -> Ask:
    return Ask(request, SWARM, extent, CLUSTER, priority, flags, 0, lease, depth, exclude, avoid)


def desk(*, home: bool = True) -> HomeDesk:
    return HomeDesk(Random(1), lambda swarm, extent, level: home, lambda peer: "zone")


def grant(home: HomeDesk, asker: bytes, now: float = 0.0) -> LeaseRef:
    ((_, frame),) = home.ask(asker, ask(), 0, now)
    assert isinstance(frame, Grant)
    return LeaseRef(SWARM, EXTENT, CLUSTER, frame.lease)


class TestHome:
    def test_the_first_gets_the_lease_and_the_others_parents(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        depths: dict[bytes, int] = {b"a": 0}
        children: dict[bytes, int] = {}
        for i in range(100):
            asker = b"%d" % i
            ((to, frame),) = home.ask(asker, ask(), 0, 0.1)
            assert (to, isinstance(frame, Parent)) == (asker, True)
            assert isinstance(frame, Parent)
            assert frame.lease == ref.lease
            assert frame.depth == depths[frame.peer] + 1
            depths[asker] = frame.depth
            children[frame.peer] = children.get(frame.peer, 0) + 1
        assert max(children.values()) <= 2
        assert max(depths.values()) <= 12

    def test_what_is_not_its_own_it_refuses(self) -> None:
        home = desk(home=False)
        assert home.ask(b"a", ask(3), 99, 0.0) == [(b"a", NotHome(3, 99))]
        ref = LeaseRef(SWARM, EXTENT, CLUSTER, 5)
        assert home.renewed(b"a", Renew(ref, 0), 0.0) == []
        assert home.given_up(b"a", Giveup(ref, GiveupReason.FAILED), 0.0) == []
        assert len(home) == 0

    def test_a_lease_that_is_not_renewed_ends(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        assert home.renewed(b"a", Renew(ref, 10), LEASE_SECONDS - 1) == []
        home.tick(LEASE_SECONDS + 1)
        assert isinstance(home.ask(b"b", ask(), 0, LEASE_SECONDS + 1)[0][1], Parent)
        home.tick(2 * LEASE_SECONDS)
        assert isinstance(home.ask(b"c", ask(), 0, 2 * LEASE_SECONDS)[0][1], Grant)
        assert home.grants == 2

    def test_a_holder_without_progress_loses_its_lease(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        at = 0.0
        while at < STALL_SECONDS - 1:
            at += 1.0
            home.renewed(b"a", Renew(ref, 10 if at < 5 else 20), at)
            home.tick(at)
        assert isinstance(home.ask(b"b", ask(), 0, at)[0][1], Parent)
        while at < STALL_SECONDS + 6:
            at += 1.0
            home.renewed(b"a", Renew(ref, 20), at)
            home.tick(at)
        assert isinstance(home.ask(b"c", ask(), 0, at)[0][1], Grant)
        assert home.renewed(b"a", Renew(ref, 21), at) == []  # somebody else's by now

    def test_after_a_giveup_somebody_who_waits_gets_it(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.given_up(b"x", Giveup(ref, GiveupReason.FAILED), 0.1)  # not its lease
        home.given_up(b"a", Giveup(ref, GiveupReason.REFUSED), 0.1)
        assert home.ask(b"a", ask(2, flags=AskFlag.NO_GRANT), 0, 0.2) == []
        assert home.tick(0.5) == [(b"a", Pending((2,)))]
        (granted, follows) = home.ask(b"b", ask(3), 0, 0.6)
        assert granted == (b"b", Grant(3, ref.lease, 3000))
        assert follows == (b"a", Parent(2, ref.lease, 1, b"b"))

    def test_one_that_asks_again_keeps_its_depth(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.ask(b"b", ask(), 0, 0.0)
        home.ask(b"c", ask(), 0, 0.0)
        # the holder is dead: the first below it takes its place, the other one follows it
        now = 2.5
        exclude = (b"a",)
        again = ask(2, exclude=exclude, lease=ref.lease, depth=1)
        assert home.ask(b"b", again, 0, now) == [(b"b", Grant(2, ref.lease, 3000))]
        assert home.ask(b"c", again, 0, now) == [(b"c", Parent(2, ref.lease, 1, b"b"))]

    def test_an_accused_holder_is_not_replaced_at_once(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        again = ask(2, exclude=(b"a",), lease=ref.lease, depth=1)
        assert home.ask(b"b", again, 0, 1.0) == []
        assert home.tick(1.1) == [(b"b", Pending((2,)))]
        assert home.tick(2.1) == [(b"b", Grant(2, ref.lease, 3000))]

    def test_two_accusations_take_a_members_place_in_the_tree(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        for peer in (b"b", b"c", b"d", b"e"):
            home.ask(peer, ask(), 0, 0.0)
        home.ask(b"x", ask(exclude=(b"b", *(b"%d" % i for i in range(7)))), 0, 0.1)
        home.ask(b"y", ask(exclude=(b"b",)), 0, 0.1)
        seats = home._records[SWARM, EXTENT, CLUSTER].seats
        assert b"b" not in seats
        for i in range(OPEN_MAX + 1):
            home.ask(b"z", ask(exclude=(b"liar%d" % i,)), 0, 0.2)
        record = home._records[SWARM, EXTENT, CLUSTER]
        assert len(record.excluded_by) <= OPEN_MAX
        assert record.root == b"a"
        assert ref.lease == record.lease

    def test_later_homes_adopt_what_the_first_has_granted(self) -> None:
        second = desk()
        ref = LeaseRef(SWARM, EXTENT, CLUSTER, 77)
        second.renewed(b"a", Renew(ref, 5), 0.0)
        second.renewed(b"liar", Renew(ref, 5), 0.0)
        assert second.ask(b"b", ask(2), 0, 0.1) == [(b"b", Parent(2, 77, 1, b"a"))]
        assert (second.adopted, second.grants) == (1, 0)
        # the same holder with another number: it has asked yet another home meanwhile
        second.renewed(b"a", Renew(LeaseRef(SWARM, EXTENT, CLUSTER, 78), 5), 0.2)
        assert second.ask(b"c", ask(2), 0, 0.3) == [(b"c", Parent(2, 78, 1, b"a"))]

    def test_a_holder_that_asks_has_lost_its_lease(self) -> None:
        home = desk()
        grant(home, b"a")
        assert isinstance(home.ask(b"a", ask(2), 0, 0.1)[0][1], Grant)

    def test_long_after_everything_is_there_any_of_them_is_named(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.ask(b"b", ask(), 0, 0.0)
        home.renewed(b"a", Done(ref, complete=True), 1.0)
        home.renewed(b"a", Done(ref, complete=True), 2.0)
        later = 1.5 + HAVE_AFTER_SECONDS
        ((_, frame),) = home.ask(b"c", ask(2), 0, later)
        assert isinstance(frame, Have)
        assert set(frame.peers) == {b"a", b"b"}
        # the holder has a child and was named: it has sent enough
        assert home.ask(b"d", ask(3), 0, later) == [(b"d", Have(3, (b"b",)))]
        # when all have, one gets a parent, and is named later, once it must have it
        ((_, frame),) = home.ask(b"e", ask(4), 0, later)
        assert isinstance(frame, Parent)
        assert frame.lease == ref.lease
        later += HAVE_AFTER_SECONDS
        assert home.ask(b"f", ask(5), 0, later) == [(b"f", Have(5, (b"e",)))]
        # who did not get it from them gets a parent, and at last the lease
        ((_, frame),) = home.ask(b"f", ask(6, exclude=(b"a", b"e")), 0, later)
        assert frame == Parent(6, ref.lease, 2, b"b")
        ((_, frame),) = home.ask(b"g", ask(7, exclude=(b"a", b"b", b"e", b"f")), 0, later)
        assert isinstance(frame, Grant)

    def test_a_holder_that_two_readers_got_nothing_from_is_replaced(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.ask(b"b", ask(), 0, 0.0)
        home.ask(b"c", ask(), 0, 0.0)
        home.renewed(b"a", Done(ref, complete=False), 1.0)
        again = ask(2, avoid=(b"a",), lease=ref.lease, depth=1)
        later = 1.0 + AVOIDED_SECONDS
        assert home.ask(b"b", again, 0, later - 0.1) == [(b"b", Parent(2, ref.lease, 2, b"c"))]
        assert home.ask(b"b", again, 0, later)[0][1] == Parent(2, ref.lease, 2, b"c")
        slow = ask(2, avoid=(b"a",), lease=ref.lease, depth=1, priority=3)
        assert isinstance(home.ask(b"c", slow, 0, later)[0][1], Parent)
        assert home.ask(b"c", again, 0, later) == [(b"c", Grant(2, ref.lease, 3000))]
        assert home.ask(b"b", again, 0, later) == [(b"b", Parent(2, ref.lease, 1, b"c"))]

    def test_one_that_is_left_alone_with_a_holder_that_gives_nothing_gets_the_lease(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.renewed(b"a", Done(ref, complete=False), 1.0)
        again = ask(2, avoid=(b"a",), lease=ref.lease, depth=1)
        later = 1.0 + AVOIDED_SECONDS
        assert home.ask(b"b", again, 0, later) == [(b"b", Parent(2, ref.lease, 1, b"a"))]
        later += AVOIDED_ALONE_SECONDS
        assert home.ask(b"b", again, 0, later) == [(b"b", Grant(2, ref.lease, 3000))]

    def test_who_is_slow_is_named_only_when_there_is_nobody_else(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        for i in range(10):
            ((_, frame),) = home.ask(b"%d" % i, ask(avoid=(b"a",)), 0, 0.0)
            assert isinstance(frame, Parent)
            assert (frame.peer == b"a") == (i == 0)
        assert ref.lease == frame.lease

    def test_a_closed_connection_ends_a_lease_that_is_in_use(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.ask(b"b", ask(), 0, 0.0)
        home.lost(b"b", 0.1, dead=False)
        home.lost(b"b", 0.1, dead=True)
        home.lost(b"a", 0.1, dead=False)
        assert isinstance(home.ask(b"c", ask(2), 0, 0.2)[0][1], Grant)
        # done: it may close its connections and still be there
        home.renewed(b"c", Done(ref, complete=False), 0.3)
        home.lost(b"c", 0.4, dead=False)
        assert home.ask(b"d", ask(3), 0, 0.5)[0][1] == Parent(3, ref.lease, 1, b"c")
        # gone for good: the others got what it had
        home.lost(b"c", 0.6, dead=True)
        assert home.ask(b"e", ask(4), 0, 0.7)[0][1] == Parent(4, ref.lease, 2, b"d")

    def test_its_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leasehome, "RECORDS_MAX", 20)
        monkeypatch.setattr(leasehome, "WAITERS_MAX", 5)
        home = desk()
        for extent in range(50):
            home.ask(b"a", ask(extent=extent), 0, 0.0)
        assert len(home) == 20
        for i in range(500):
            home.ask(b"%d" % i, ask(extent=49), 0, 0.0)
        record = home._records[SWARM, 49, CLUSTER]
        assert len(record.seats) <= OPEN_MAX
        for i in range(10):
            home.ask(b"w%d" % i, ask(flags=AskFlag.NO_GRANT, extent=60), 0, 0.0)
        assert len(home._records[SWARM, 60, CLUSTER].waiters) == 5
        home.lost(b"w0", 0.0, dead=False)
        home.tick(1000.0)
        assert len(home) == 1
        for i in range(1, 5):
            home.lost(b"w%d" % i, 0.0, dead=False)
        home.tick(1000.0)
        assert len(home) == 0

    def test_seats_without_children_are_forgotten_when_all_are(self) -> None:
        home = desk()
        grant(home, b"a")
        record = home._records[SWARM, EXTENT, CLUSTER]
        for i in range(OPEN_MAX):
            record.seats[b"s%d" % i] = leasehome._Seat(3, 0.0)
        home.ask(b"new", ask(), 0, 0.0)
        assert len(record.seats) == OPEN_MAX + 1
        assert b"a" in record.seats

    def test_depth_ends_somewhere(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        record = home._records[SWARM, EXTENT, CLUSTER]
        record.seats = {b"a": record.seats[b"a"], b"deep": leasehome._Seat(DEPTH_MAX, 0.0)}
        assert home.ask(b"b", ask(exclude=(b"a",)), 0, 0.0) == []
        # one that had a place under the holder has it still
        kept = ask(3, lease=ref.lease, depth=1)
        assert home.ask(b"c", kept, 0, 0.0) == [(b"c", Parent(3, ref.lease, 1, b"a"))]

    def test_one_whose_parents_are_all_gone_gets_any_place(self) -> None:
        home = desk()
        ref = grant(home, b"a")
        home.ask(b"b", ask(), 0, 0.0)
        home.ask(b"c", ask(), 0, 0.0)
        record = home._records[SWARM, EXTENT, CLUSTER]
        record.seats.pop(b"a")
        ((_, frame),) = home.ask(b"c", ask(2, lease=ref.lease, depth=1), 0, 0.1)
        assert frame == Parent(2, ref.lease, 2, b"b")

    def test_in_the_cluster_a_parent_of_the_same_zone_comes_first(self) -> None:
        home = HomeDesk(Random(1), lambda *_: True, lambda peer: peer[:1].decode())
        grant(home, b"x1")
        for i in range(2, 8):
            home.ask(b"x%d" % i, ask(), 0, 0.0)
        ((_, first),) = home.ask(b"y1", ask(), 0, 0.0)
        ((_, second),) = home.ask(b"y2", ask(), 0, 0.0)
        assert isinstance(first, Parent)
        assert isinstance(second, Parent)
        assert (first.peer[:1], second.peer) == (b"x", b"y1")


class Machine:
    """One node between peers that the test plays."""

    def __init__(self, *, peers: int = 4, own_home: bool = False, zones: int = 1) -> None:
        names = [b"own", *(b"p%d" % i for i in range(peers))]
        self.members = {
            name: Member(name, 1, 0, 0, f"z{i % zones}", "", b"")
            for i, name in enumerate(names)
            if own_home or name != b"own"
        }
        self.present: set[int] = set()
        self.now = 1000.0
        self.leases = Leases(
            b"own",
            "z0",
            Electorate(self.members, self.now),
            Random(1),
            has=lambda _, n: n in self.present,
            complete=lambda *_: False,
        )

    def homes(self, level: Level = CLUSTER) -> tuple[bytes, ...]:
        return Electorate(self.members, self.now).homes(SWARM, EXTENT, level, "z0")

    def want(self, *chunks: int, priority: int = 0, seconds: float = 100.0, extent: int = EXTENT) -> None:
        self.leases.want(SWARM, extent, chunks, priority=priority, deadline=self.now + seconds, now=self.now)

    def land(self, *chunks: int) -> None:
        self.present.update(chunks)
        self.leases.fetched(100)
        self.leases.landed(SWARM, EXTENT, chunks, self.now)

    def get(self, peer: bytes, frame: CrowdFrame) -> list[Action]:
        self.leases.receive(peer, frame, self.now)
        return self.leases.actions()

    def wait(self, seconds: float) -> list[Action]:
        end, found = self.now + seconds, []
        while self.now < end:
            self.now = min(end, max(self.now + 0.01, self.leases.next_at() or end))
            self.leases.tick(self.now)
            found += self.leases.actions()
        return found

    def asked(self) -> tuple[bytes, Ask]:
        """The ASK that was sent last."""
        return asks(self.leases.actions())[-1]

    def follow(self, *, lease: int = 5, depth: int = 3, parent: bytes = b"par") -> Follow:
        """Want chunk 1 and get a parent."""
        self.want(1)
        home, question = self.asked()
        actions = self.get(home, Parent(question.request, lease, depth, parent))
        return follows(actions)[-1]

    def hold(self, lease: int = 5) -> None:
        self.want(1)
        home, question = self.asked()
        self.get(home, Grant(question.request, lease, 3000))


def asks(actions: list[Action]) -> list[tuple[bytes, Ask]]:
    return [(a.peer, a.frame) for a in actions if isinstance(a, Send) and isinstance(a.frame, Ask)]


def follows(actions: list[Action]) -> list[Follow]:
    return [a.frame for a in actions if isinstance(a, Send) and isinstance(a.frame, Follow)]


def of_child(
    request: int, *, lease: int = 5, depth: int = 4, chunks: int = 1, level: Level = CLUSTER
) -> Follow:
    return Follow(request, 0, SWARM, EXTENT, level, lease, depth, ((1, chunks),))


class TestMember:
    def test_alone_it_is_its_own_home(self) -> None:
        machine = Machine(peers=0, own_home=True)
        assert machine.leases.next_at() is None
        machine.want(1, 2)
        assert machine.leases.actions() == [Fetch(SWARM, EXTENT, (1, 2), 0)]
        assert machine.leases.next_at() is not None
        machine.want(3, priority=2)
        machine.want(3, priority=1)
        assert machine.leases.actions() == [Fetch(SWARM, EXTENT, (3,), 2)]
        machine.land(1, 2, 3)
        assert machine.leases.actions() == []
        assert machine.wait(400.0) == []
        assert machine.leases.next_at() is None

    def test_a_holder_tells_all_homes_and_goes_on_answering(self) -> None:
        machine = Machine()
        machine.want(1)
        home, question = machine.asked()
        assert home == machine.homes()[0]
        actions = machine.get(home, Grant(question.request, 5, 3000))
        ref = LeaseRef(SWARM, EXTENT, CLUSTER, 5)
        assert actions[:3] == [Send(peer, Renew(ref, 0)) for peer in machine.homes()]
        assert actions[3] == Fetch(SWARM, EXTENT, (1,), 0)
        assert Send(home, Renew(ref, 0)) in machine.wait(1.5)
        machine.land(1)
        assert machine.leases.actions() == [Send(peer, Done(ref, complete=False)) for peer in machine.homes()]
        actions = machine.get(b"p0", of_child(9, lease=5, depth=1, chunks=2))
        assert actions[0] == Serve(b"p0", 9, SWARM, EXTENT, (1,), 0)
        assert Fetch(SWARM, EXTENT, (2,), 0) in actions
        assert Send(home, Renew(ref, 100)) in actions
        machine.land(2)
        assert machine.leases.actions()[0] == Serve(b"p0", 9, SWARM, EXTENT, (2,), 0)
        assert Send(b"p0", Pending((9,))) in machine.wait(0.5)
        machine.get(b"p1", of_child(10, chunks=2))
        machine.leases.lost(b"p1", machine.now)
        assert Send(b"p1", Pending((10,))) not in machine.wait(0.5)
        machine.leases.sent(b"p0", 9, (1,))
        machine.leases.sent(b"p0", 9, (2,))
        machine.leases.sent(b"p0", 9, (2,))
        assert Send(b"p0", Pending((9,))) not in machine.wait(0.5)

    def test_documents_are_followed_as_a_whole(self) -> None:
        machine = Machine()
        machine.want(0, extent=EXTENT_DOCUMENT)
        home, question = machine.asked()
        assert question.extent == EXTENT_DOCUMENT
        (follow,) = follows(machine.get(home, Parent(question.request, 5, 1, b"par")))
        assert follow.runs == ()
        other = Machine()
        other.present.add(0)
        assert other.get(b"x", follow) == [Serve(b"x", follow.request, SWARM, EXTENT_DOCUMENT, (0,), 0)]

    def test_a_silent_home_is_passed_over(self) -> None:
        machine = Machine()
        machine.want(1)
        first, question = machine.asked()
        assert asks(machine.wait(SILENCE_SECONDS - 0.3)) == []
        machine.get(first, Pending((question.request, 12345)))
        assert asks(machine.wait(SILENCE_SECONDS - 0.3)) == []
        ((second, question),) = asks(machine.wait(0.6))
        assert (first, second) == machine.homes()[:2]
        assert machine.get(first, Grant(question.request, 5, 3000)) == []  # not the one that was asked
        machine.leases.lost(second, machine.now)
        third, question = machine.asked()
        assert third == machine.homes()[2]
        assert asks(machine.wait(LAST_HOME_SECONDS - 0.3)) == []

    def test_a_home_that_was_silent_twice_comes_last(self) -> None:
        machine = Machine()
        for extent in (EXTENT, EXTENT_DOCUMENT):
            machine.want(1, extent=extent)
            machine.leases.lost(machine.asked()[0], machine.now)
            machine.leases.lost(machine.asked()[0], machine.now)
            machine.leases.lost(machine.asked()[0], machine.now)
            machine.leases.actions()
        bad = {peer for peer, (times, _) in machine.leases._home_faults.items() if times >= 2}
        assert bad
        machine.want(1, extent=8)
        home, _ = machine.asked()
        homes = Electorate(machine.members, 0).homes(SWARM, 8, CLUSTER, "z0")
        assert home == next((peer for peer in homes if peer not in bad), homes[0])
        machine.now += 601
        machine.leases._home_fault(homes[0], machine.now)
        assert machine.leases._home_faults[homes[0]][0] == 1

    def test_without_homes_a_few_chunks_come_directly_and_the_rest_is_asked_for_again(self) -> None:
        machine = Machine(peers=4)
        machine.leases._asked_chunks = 200  # one of them per member
        machine.want(1, 2)
        for _ in range(3):
            peer, _ = machine.asked()
            machine.leases.lost(peer, machine.now)
        assert machine.leases.actions() == [Direct(SWARM, EXTENT, (1,))]
        assert machine.leases.direct_chunks == 1
        assert asks(machine.wait(PAUSE_SECONDS + 0.3)) != []

    def test_new_members_are_asked_at_once(self) -> None:
        machine = Machine()
        machine.want(1)
        for _ in range(3):
            machine.leases.lost(machine.asked()[0], machine.now)
        machine.leases.actions()
        machine.leases.elect(Electorate(machine.members, machine.now), 5, machine.now)
        assert machine.leases.actions() == []
        machine.members[b"new"] = Member(b"new", 1, 0, 0, "z0", "", b"")
        machine.leases.elect(Electorate(machine.members, machine.now), 6, machine.now)
        _, question = machine.asked()
        assert question.view == 6

    def test_new_homes_are_told_of_leases(self) -> None:
        machine = Machine(peers=3)
        machine.hold()
        gone = machine.homes()[0]
        old = machine.homes()
        machine.members = {peer: m for peer, m in machine.members.items() if peer != gone}
        for i in range(3):
            machine.members[b"n%d" % i] = Member(b"n%d" % i, 1, 0, 0, "z0", "", b"")
        machine.leases.elect(Electorate(machine.members, machine.now), 6, machine.now)
        told = {a.peer for a in machine.leases.actions() if isinstance(a, Send)}
        assert told == set(machine.homes()) - set(old)

    def test_the_deadline_sends_to_the_registry(self) -> None:
        machine = Machine()
        machine.want(1, seconds=3.0)
        machine.leases.actions()
        assert Direct(SWARM, EXTENT, (1,)) in machine.wait(3.5)

    def test_what_it_fetches_itself_is_not_fetched_twice_at_the_deadline(self) -> None:
        machine = Machine(peers=0, own_home=True)
        machine.want(1, seconds=2.0)
        machine.leases.actions()
        assert machine.wait(4.0) == []

    def test_what_nobody_wants_any_more_is_not_asked_for(self) -> None:
        machine = Machine()
        machine.want(1)
        home, question = machine.asked()
        machine.leases.unwant(SWARM, EXTENT, [1])
        machine.leases.unwant(SWARM, 99, [1])
        assert follows(machine.get(home, Parent(question.request, 5, 1, b"par"))) == []
        machine.want(2)
        (follow,) = follows(machine.leases.actions())
        assert follow.runs == ((2, 1),)
        machine.leases.landed(SWARM, 99, [1], machine.now)

    def test_a_parent_that_says_nothing_is_left(self) -> None:
        machine = Machine()
        follow = machine.follow()
        for _ in range(8):
            machine.get(b"par", Pending((follow.request,)))
            assert asks(machine.wait(0.5)) == []
        ((_, question),) = asks(machine.wait(1.3))
        assert (question.exclude, question.lease, question.depth) == ((b"par",), 5, 3)

    def test_a_parent_that_sends_other_things_is_left_later(self) -> None:
        machine = Machine()
        machine.follow()
        found = []
        while not found:
            machine.leases.heard(b"par", machine.now)
            found = asks(machine.wait(0.5))
        assert machine.now - 1000.0 == pytest.approx(FORGOTTEN_SECONDS, abs=0.3)

    def test_a_parent_that_promises_for_ever_is_left(self) -> None:
        machine = Machine()
        follow = machine.follow()
        found = []
        while not found:
            machine.get(b"par", Pending((follow.request,)))
            found = asks(machine.wait(0.5))
        assert machine.now - 1000 == pytest.approx(
            leaseflight.STALL_SECONDS + 3 * STALL_DEPTH_SECONDS, abs=0.6
        )
        # nor is it followed for anything else
        machine.want(1, extent=8)
        _, question = machine.asked()
        assert (question.exclude, question.avoid) == ((), (b"par",))

    def test_a_parent_that_sends_other_chunks_is_busy(self) -> None:
        machine = Machine()
        follow = machine.follow()
        for _ in range(20):
            machine.leases.landed(SWARM, 99, [1], machine.now, source=b"par")
            machine.get(b"par", Pending((follow.request,)))
            assert asks(machine.wait(0.5)) == []

    def test_a_parent_that_is_none_is_left_at_once(self) -> None:
        machine = Machine()
        follow = machine.follow()
        assert machine.get(b"other", Gone(follow.request)) == []
        assert machine.get(b"par", Gone(99)) == []
        ((home, question),) = asks(machine.get(b"par", Gone(follow.request)))
        # the same one again, then itself: this home is of no use
        ((second, question),) = asks(machine.get(home, Parent(question.request, 5, 2, b"par")))
        assert second != home
        ((third, question),) = asks(machine.get(second, Parent(question.request, 5, 2, b"own")))
        assert third != second
        assert machine.get(third, Have(question.request, (b"par", b"own"))) == []

    def test_two_parents_in_vain_and_another_home_is_asked(self) -> None:
        machine = Machine()
        machine.follow()
        homes = []
        for i in range(4):
            machine.leases.lost(machine.leases.waits_for(SWARM, EXTENT)[0], machine.now)  # type: ignore[index]
            home, question = machine.asked()
            homes.append(home)
            machine.get(home, Parent(question.request, 5, 2, b"q%d" % i))
        first, second = machine.homes()[:2]
        assert homes == [first, second, second, machine.homes()[2]]
        machine.leases.lost(b"q3", machine.now)
        _, question = machine.asked()
        assert question.exclude == (b"par", b"q0", b"q1", b"q2", b"q3")

    def test_the_last_parents_in_vain_are_told(self) -> None:
        machine = Machine()
        machine.want(1)
        flight = machine.leases._flights[SWARM, EXTENT]
        for i in range(EXCLUDED_MAX + 3):
            flight.exclude(b"%d" % i)
        flight.exclude(b"5")
        assert len(flight.excluded) == EXCLUDED_MAX
        assert flight.excluded[-1] == b"5"

    def test_not_home_asks_the_next(self) -> None:
        machine = Machine()
        machine.want(1)
        home, question = machine.asked()
        ((other, _),) = asks(machine.get(home, NotHome(question.request, 3)))
        assert other == machine.homes()[1]

    def test_one_of_those_who_have_it_is_asked(self) -> None:
        machine = Machine()
        machine.want(1)
        home, question = machine.asked()
        (follow,) = follows(machine.get(home, Have(question.request, (b"own", b"x"))))
        assert (follow.lease, follow.depth) == (0, DEPTH_MAX)
        assert machine.leases.waits_for(SWARM, EXTENT) == (b"x", frozenset({1}))

    def test_who_stands_deeper_in_the_same_lease_may_wait(self) -> None:
        machine = Machine()
        machine.follow(lease=5, depth=3)
        assert machine.get(b"c", of_child(9, lease=5, depth=4)) == []
        assert machine.leases.followers(SWARM, EXTENT) == {b"c"}
        assert machine.leases.followers(SWARM, 99) == frozenset()
        for wrong in (
            of_child(10, lease=5, depth=3),
            of_child(10, lease=6, depth=9),
            of_child(10, lease=5, depth=9, level=Level.ZONE),
        ):
            assert machine.get(b"d", wrong) == [Send(b"d", Gone(10, ((1, 1),)))]
        machine.leases.forgotten(b"c", 9)
        assert machine.leases.followers(SWARM, EXTENT) == frozenset()

    def test_one_without_a_flight_has_nobody_waiting(self) -> None:
        machine = Machine()
        assert machine.get(b"d", of_child(10)) == [Send(b"d", Gone(10, ((1, 1),)))]
        assert machine.leases.waits_for(SWARM, EXTENT) is None

    def test_who_asks_takes_children_and_lets_go_of_strangers(self) -> None:
        machine = Machine()
        machine.want(1)
        home, question = machine.asked()
        assert machine.get(b"c", of_child(9, lease=5, depth=4)) == []
        assert machine.get(b"d", of_child(9, lease=6, depth=4)) == []
        actions = machine.get(home, Parent(question.request, 5, 3, b"par"))
        assert Send(b"d", Gone(9, ((1, 1),))) in actions
        assert machine.leases.followers(SWARM, EXTENT) == {b"c"}
        # what only a child wants is asked for, too
        machine.land(8)
        machine.leases.actions()
        machine.leases.unwant(SWARM, EXTENT, [1])
        (follow,) = follows(machine.get(b"c", of_child(10, lease=5, depth=4, chunks=3)))
        assert follow.runs == ((2, 2),)
        machine.leases.lost(b"c", machine.now)
        assert machine.leases.followers(SWARM, EXTENT) == frozenset()

    def test_too_many_children_are_sent_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leasesteps, "CHILDREN_MAX", 2)
        machine = Machine()
        machine.follow()
        results = [machine.get(b"c%d" % i, of_child(9)) for i in range(3)]
        assert [bool(actions) for actions in results] == [False, False, True]

    def test_a_fetch_that_fails_goes_to_somebody_else(self) -> None:
        machine = Machine()
        machine.leases.failed(SWARM, EXTENT, machine.now)
        machine.hold(lease=5)
        assert machine.get(b"c", of_child(9, lease=5, depth=1)) == []
        machine.leases.failed(SWARM, EXTENT, machine.now, refused=True)
        actions = machine.leases.actions()
        ref = LeaseRef(SWARM, EXTENT, CLUSTER, 5)
        assert Send(machine.homes()[0], Giveup(ref, GiveupReason.REFUSED)) in actions
        ((home, question),) = asks(actions)
        assert question.flags == AskFlag.NO_GRANT
        machine.leases.failed(SWARM, EXTENT, machine.now)  # not the holder any more
        assert machine.leases.actions() == []
        actions = machine.get(home, Parent(question.request, 5, 2, b"par"))
        assert Send(b"c", Gone(9, ((1, 1),))) in actions

    def test_leaving_gives_everything_back(self) -> None:
        machine = Machine(zones=2)
        machine.want(1)
        home, question = machine.asked()
        assert question.level is Level.ZONE
        ((home, question),) = asks(machine.get(home, Grant(question.request, 4, 3000)))
        assert question.level is CLUSTER
        machine.get(home, Grant(question.request, 5, 3000))
        machine.get(b"c", of_child(9))
        machine.leases.leave(machine.now)
        frames = [a.frame for a in machine.leases.actions() if isinstance(a, Send)]
        left = {f.ref.level: f.ref.lease for f in frames if isinstance(f, Giveup)}
        assert left == {Level.ZONE: 4, CLUSTER: 5}
        assert Gone(9, ((1, 1),)) in frames

    def test_who_brings_an_extent_into_a_zone_serves_the_zone(self) -> None:
        machine = Machine(zones=2)
        machine.want(1)
        home, question = machine.asked()
        assert machine.get(b"c", of_child(8, level=Level.ZONE, lease=4, depth=1)) == []
        assert machine.get(b"d", of_child(8, level=Level.ZONE, lease=3, depth=1)) == []
        actions = machine.get(home, Grant(question.request, 4, 3000))
        assert Send(b"d", Gone(8, ((1, 1),))) in actions
        ((home, question),) = asks(actions)
        machine.get(home, Parent(question.request, 5, 3, b"par"))
        assert machine.get(b"e", of_child(9, level=Level.ZONE, lease=4, depth=1)) == []
        assert machine.get(b"f", of_child(9, level=CLUSTER, lease=5, depth=4)) == []
        assert machine.leases.followers(SWARM, EXTENT) == {b"c", b"e", b"f"}

    def test_a_zone_without_homes_asks_those_of_the_cluster(self) -> None:
        machine = Machine(zones=2)
        machine.want(1)
        asked = []
        for _ in range(3):
            home, question = machine.asked()
            asked.append((question.level, home))
            machine.leases.lost(home, machine.now)
        assert [home for level, home in asked if level is Level.ZONE] == list(machine.homes(Level.ZONE))
        # one that is silent about the zone is not asked about the cluster
        left = [home for home in machine.homes() if home not in machine.homes(Level.ZONE)]
        assert asked[2:] == [(CLUSTER, left[0])]

    def test_its_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leasesteps, "FLIGHTS_MAX", 3)
        machine = Machine()
        for extent in range(6):
            machine.want(1, extent=extent)
        assert len(machine.leases._flights) == 3
        machine.leases.unwant(SWARM, 4, [1])
        machine.leases.landed(SWARM, 4, [1], machine.now)
        machine.want(1, extent=9)
        assert (SWARM, 4) not in machine.leases._flights

    def test_frames_about_members_are_not_for_it(self) -> None:
        assert Machine().get(b"x", Heartbeat(1, 2)) == []

    def test_long_requests_are_split(self) -> None:
        machine = Machine()
        machine.want(*range(0, 3000, 2))
        home, question = machine.asked()
        found = follows(machine.get(home, Parent(question.request, 5, 1, b"par")))
        assert [len(follow.runs) for follow in found] == [512, 512, 476]

    def test_ticks_come_no_sooner_than_they_are_due(self) -> None:
        machine = Machine()
        machine.want(1)
        machine.leases.tick(machine.now)
        at = machine.leases.next_at()
        machine.leases.tick(machine.now + 0.1)
        assert machine.leases.next_at() == at
