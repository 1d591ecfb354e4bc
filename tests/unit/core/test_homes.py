"""Who is home of an extent: the same members for everyone, evenly spread, elders before seeds before the rest."""

from __future__ import annotations

from collections import Counter
from random import Random

from p2pgz.core import homes
from p2pgz.core.crowdmsg import Level, Member, MemberFlag
from p2pgz.core.homes import ELDER_SECONDS, PART_MEMBERS, Electorate, Roster, place, score
from p2pgz.core.peerid import PeerId

SWARM = bytes(range(32))
NOW = 1_000_000.0


def members(count: int, *, zones: int = 1, since: float = 0.0, seed: int = 1) -> dict[bytes, Member]:
    rng = Random(seed)
    found = [
        Member(PeerId.of_ed25519(rng.randbytes(32)).raw, 1, int(since), 0, f"z{i % zones}", "", b"")
        for i in range(count)
    ]
    return {member.peer: member for member in found}


def test_the_packed_scores_are_the_scores() -> None:
    peers = list(members(50))
    for extent in range(20):
        expected = sorted(peers, key=lambda peer: -score(peer, SWARM, extent))[:6]
        assert list(Roster(peers).top(place(SWARM, extent), 6)) == expected
    assert Roster([]).top(3, 3) == ()
    assert Roster(peers[:2]).top(place(SWARM, 1), 3) != ()


def test_homes_are_spread_evenly() -> None:
    electorate = Electorate(members(50), NOW)
    first = Counter(electorate.homes(SWARM, extent, Level.CLUSTER, "z0")[0] for extent in range(5000))
    assert len(first) == 50
    assert max(first.values()) < 1.6 * 100


def test_a_member_that_goes_moves_only_its_own_extents() -> None:
    some = members(20)
    gone = next(iter(some))
    before, after = (
        Electorate(some, NOW),
        Electorate({peer: m for peer, m in some.items() if peer != gone}, NOW),
    )
    for extent in range(200):
        was = before.homes(SWARM, extent, Level.CLUSTER, "")
        now = after.homes(SWARM, extent, Level.CLUSTER, "")
        assert now[0] == (was[0] if was[0] != gone else was[1])


def test_elders_are_home_before_seeds_and_seeds_before_the_rest() -> None:
    young = members(5, since=NOW - ELDER_SECONDS + 1)
    assert len(Electorate(young, NOW).homes(SWARM, 0, Level.CLUSTER, "")) == 3
    seed = Member(b"seed", 1, int(NOW), MemberFlag.SEED, "z0", "", b"")
    assert Electorate({**young, b"seed": seed}, NOW).homes(SWARM, 0, Level.CLUSTER, "") == (b"seed",)
    elder = Member(b"elder", 1, int(NOW) - ELDER_SECONDS, 0, "z0", "", b"")
    both = Electorate({**young, b"seed": seed, b"elder": elder}, NOW)
    assert both.homes(SWARM, 0, Level.CLUSTER, "") == (b"elder",)
    assert both.is_home(b"elder", SWARM, 0, Level.CLUSTER, "")
    assert not both.is_home(b"seed", SWARM, 0, Level.CLUSTER, "")


def test_zones_have_homes_of_their_own() -> None:
    some = members(20, zones=2)
    electorate = Electorate(some, NOW)
    assert electorate.levels() == (Level.ZONE, Level.CLUSTER)
    for zone in ("z0", "z1"):
        assert {some[peer].zone for peer in electorate.homes(SWARM, 1, Level.ZONE, zone)} == {zone}
    # a zone that nobody is known in is the cluster's affair
    assert electorate.homes(SWARM, 1, Level.ZONE, "?") == electorate.homes(SWARM, 1, Level.CLUSTER, "")
    assert Electorate(members(3), NOW).levels() == (Level.CLUSTER,)
    assert electorate.zone_of(next(iter(some))) == "z0"
    assert electorate.zone_of(b"?") is None


def test_large_zones_are_split_into_parts() -> None:
    some = members(2 * PART_MEMBERS + 1)
    electorate = Electorate(some, NOW)
    parts = Counter(electorate.part("z0", peer) for peer in some)
    assert len(parts) == 4
    assert max(parts.values()) < PART_MEMBERS
    assert electorate.levels() == (Level.ZONE, Level.CLUSTER)
    part = next(iter(parts))
    assert all(electorate.part("z0", peer) == part for peer in electorate.homes(SWARM, 1, Level.ZONE, part))


def test_the_same_electors_mean_the_same_homes() -> None:
    some = members(5)
    young = {**some, b"young": Member(b"young", 1, int(NOW), 0, "z0", "", b"")}
    assert Electorate(some, NOW).same_electors(Electorate(young, NOW))
    assert not Electorate(some, NOW).same_electors(Electorate(young, NOW + ELDER_SECONDS))
    assert len(Electorate(young, NOW)) == 6


def test_what_is_remembered_is_bounded() -> None:
    electorate = Electorate(members(3), NOW)
    for extent in range(homes._REMEMBERED + 5):
        electorate.homes(SWARM, extent, Level.CLUSTER, "")
    assert len(electorate._known) <= homes._REMEMBERED
