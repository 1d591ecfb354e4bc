"""The member list over real connections: the machine itself is tested in core."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import pytest
import trio

from p2pgz.core import crowdframes
from p2pgz.core.admission import Admission
from p2pgz.core.crowdmsg import Grant, Heartbeat, MemberFrame
from p2pgz.core.hello import FEATURES
from p2pgz.core.messages import Feature
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.standing import Fault
from p2pgz.p2p.handshake import Credentials, dial
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.membership import FIRST_MEETING_SECONDS, Members
from p2pgz.p2p.plane import ChunkPlane, open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.testing.told_offers import ToldOffers

pytestmark = pytest.mark.trio

BEGIN = 1_800_000_000.0
WITH_MEMBERS = FEATURES | Feature.MEMBERS
WITHIN_SECONDS = 20.0


class Host:
    """A node without a pool. Its members run until `stop`, its connections until `kill`."""

    def __init__(self, plane: ChunkPlane, members: Members, scope: trio.CancelScope) -> None:
        self.plane = plane
        self.members = members
        self.kill = scope.cancel

    @property
    def count(self) -> int:
        return len(self.members.machine.members)

    async def meet(self, other: Host) -> None:
        await self.plane.exchange.connect("127.0.0.1", other.plane.port)


@asynccontextmanager
async def hosts(count: int, *, admission: Admission | None = None) -> AsyncIterator[list[Host]]:
    """Nodes that do not know each other yet."""
    made: list[Host] = []
    async with trio.open_nursery() as nursery:

        async def host(number: int, task_status: trio.TaskStatus[Host]) -> None:
            identity = Identity.new()
            credentials = Credentials.make(identity, admission or Admission(), WITH_MEMBERS)
            with trio.CancelScope() as scope:
                async with AsyncExitStack() as stack:
                    plane = await stack.enter_async_context(
                        open_plane(credentials, ToldOffers(), Uploads(), host="127.0.0.1")
                    )
                    members = Members(
                        plane.exchange,
                        identity,
                        [PeerAddress.of_ip("127.0.0.1", plane.port)],
                        zone=f"z{number}",
                        seed=not number,
                        wall_seconds=BEGIN,
                        rng=Random(number),
                    )
                    task_status.started(Host(plane, members, scope))
                    await members.run()

        for number in range(count):
            made.append(await nursery.start(host, number))
        yield made
        nursery.cancel_scope.cancel()


async def settled(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WITHIN_SECONDS):
        while not condition():
            await trio.sleep(0.01)


async def test_all_know_all_after_each_met_one() -> None:
    async with hosts(5) as nodes:
        for node in nodes[1:]:
            await node.meet(nodes[0])
        await settled(lambda: {node.count for node in nodes} == {5})
        assert {node.members.status()["view"] for node in nodes} == {nodes[0].members.status()["view"]}
        assert nodes[3].members.status()["zones"] == {f"z{number}": 1 for number in range(5)}


async def test_a_dead_member_is_found_dead_and_one_that_leaves_is_not() -> None:
    async with hosts(4) as nodes:
        for node in nodes[1:]:
            await node.meet(nodes[0])
        await settled(lambda: {node.count for node in nodes} == {4})
        nodes[3].members.leave()
        await settled(lambda: {node.count for node in nodes[:3]} == {3})
        assert nodes[0].members.status()["deaths"] == 0
        await settled(lambda: nodes[0].members.machine.partners)
        nodes[2].kill()
        await settled(lambda: {node.count for node in nodes[:2]} == {2})
        assert nodes[0].members.status()["deaths"] == 1


async def test_members_know_where_one_is_that_moved() -> None:
    async with hosts(3) as nodes:
        for node in nodes[1:]:
            await node.meet(nodes[0])
        await settled(lambda: {node.count for node in nodes} == {3})
        moved = nodes[1].members
        moved.readdress(
            [PeerAddress.parse("/dns/somewhere/tcp/1"), PeerAddress.parse("/ip4/127.0.0.2/tcp/9")]
        )
        peer = moved.machine.own.peer
        await settled(lambda: nodes[2].members.machine.members[peer].address == "/ip4/127.0.0.2/tcp/9")


async def test_a_peer_without_the_feature_is_told_nothing_of_members_and_may_say_nothing() -> None:
    async with hosts(1) as (node,):
        stream = await trio.open_tcp_stream("127.0.0.1", node.plane.port)
        async with stream:
            ends = await dial(stream, Credentials.make(Identity.new(), Admission(), FEATURES))
            heard = list(ends.frames)
            with trio.move_on_after(1.0):
                heard += ends.reader.feed(await ends.stream.receive())
            assert [frame for frame in heard if isinstance(frame, MemberFrame)] == []
            assert (node.members.machine.links or None, node.count) == (None, 1)
            await ends.stream.send_all(crowdframes.encode(Heartbeat(0, 1)))
            await settled(lambda: node.plane.exchange.standing.counts[Fault.PROTOCOL] == 1)


async def test_frames_about_leases_need_their_own_feature() -> None:
    async with hosts(1) as (node,):
        stream = await trio.open_tcp_stream("127.0.0.1", node.plane.port)
        async with stream:
            ends = await dial(stream, Credentials.make(Identity.new(), Admission(), WITH_MEMBERS))
            await ends.stream.send_all(crowdframes.encode(Heartbeat(0, 1)))
            await ends.stream.send_all(crowdframes.encode(Grant(1, 1, 1)))
            await settled(lambda: node.plane.exchange.standing.counts[Fault.PROTOCOL] == 1)


async def test_one_with_another_key_is_no_member() -> None:
    keys = Admission(cluster_keys=[b"k" * 32])
    others = Admission(cluster_keys=[b"o" * 32])
    async with hosts(2, admission=keys) as nodes, hosts(1, admission=others) as (stranger,):
        await nodes[1].meet(nodes[0])
        await settled(lambda: {node.count for node in nodes} == {2})
        with pytest.raises(Exception, match=r"admitted|hello|refused"):
            await stranger.meet(nodes[0])
        assert [node.count for node in (*nodes, stranger)] == [2, 2, 1]


async def test_a_young_node_waits_for_others_once_and_not_for_long() -> None:
    async with hosts(3) as (one, other, alone):
        met: list[float] = []

        async def wait(node: Host) -> None:
            began = trio.current_time()
            await node.members.first_meeting()
            met.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, alone)
            nursery.start_soon(wait, other)
            await other.meet(one)
        await settled(lambda: other.count == 2)
        assert len(met) == 2
        assert max(met) >= FIRST_MEETING_SECONDS
        began = trio.current_time()
        await alone.members.first_meeting()
        assert trio.current_time() - began < FIRST_MEETING_SECONDS


async def test_a_bug_in_the_machine_ends_neither_node_nor_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosts(2) as nodes:
        await nodes[1].meet(nodes[0])
        await settled(lambda: {node.count for node in nodes} == {2})

        def broken(now: float) -> None:
            raise RuntimeError

        monkeypatch.setattr(nodes[0].members.machine, "tick", broken)
        await trio.sleep(0.5)
        assert len(nodes[0].plane.exchange.connections()) == 1
        monkeypatch.undo()
        nodes[1].members.leave()
        await settled(lambda: nodes[0].count == 1)
