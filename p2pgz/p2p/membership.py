"""The members of the cluster: `core.membership` on the connections of the exchange.

Made by `node.peering`. One task ticks and one dials each partner; frames come from the connections' own tasks, which end
the connection of a peer that breaks the rules. What goes wrong in here costs the member list, never the node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, Final, Protocol

import structlog
import trio

from p2pgz.core.crowdmsg import CrowdFrame, Member, MemberFlag, MemberFrame
from p2pgz.core.leaseactions import Send
from p2pgz.core.memberlinks import Link
from p2pgz.core.membership import QUIET_TICK_SECONDS, TICK_SECONDS, Action, Membership
from p2pgz.core.messages import Feature
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import ConfigError, P2pgzError
from p2pgz.p2p.asking import PeerBusy
from p2pgz.p2p.certificate import verify_signature
from p2pgz.p2p.connection import Connection
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.watcher import NotTaken

log = structlog.get_logger(component="members")

# A partner whose connections end again and again (it has no room, say) is not dialled more often
REDIAL_SECONDS: Final = 5.0
# Partners are six; the rest is for those that a burst of deaths makes necessary
DIALS_AT_ONCE: Final = 16
# Who is cut off cannot reach anybody, and chooses others each time: it need not try them all
DIALS_PER_SECOND: Final = 2.0
# What the first image that is opened may wait for, so that its leases can be asked for, by a node that began to run just now
FIRST_MEETING_SECONDS: Final = 0.2
YOUNG_SECONDS: Final = 10.0
# Frames about leases that wait for a connection: an asker has hundreds of extents
UNSENT_MAX: Final = 1024
NO_CLUSTER: Final[dict[str, Any]] = {
    "zone": "",
    "members": 0,
    "zones": {},
    "links": 0,
    "deaths": 0,
    "refuted": 0,
    "refused": 0,
    "view": "",
}
"""the status of a node that is in none"""


class LeaseSide(Protocol):
    """What is done with leases: `fetch.leasing.Leasing`."""

    def on_frame(self, peer: bytes, frame: CrowdFrame) -> None:
        """A frame has come."""

    def lost(self, peer: bytes) -> None:
        """There is no connection to a peer any more, or none to be had."""

    def leave(self) -> None:
        """This node stops."""


class Members:
    """The member list of a node. `wall_seconds`: seconds since 1970, now; time goes on from there by trio's clock."""

    def __init__(
        self,
        exchange: Exchange,
        identity: Identity,
        addresses: Sequence[PeerAddress],
        *,
        zone: str,
        seed: bool,
        leases: bool = False,
        wall_seconds: float,
        rng: Random | None = None,
        verify: Callable[[bytes, bytes, bytes], bool] = verify_signature,
    ) -> None:
        self._exchange = exchange
        self._begun_at = wall_seconds - trio.current_time()
        self._linking: set[bytes] = set()
        self._dialled: dict[bytes, float] = {}
        self._dials, self._dials_at = float(DIALS_AT_ONCE), trio.current_time()
        self._unsent: dict[bytes, list[CrowdFrame]] = {}
        self.leases: LeaseSide | None = None
        self._met = trio.Event()
        self._started = trio.current_time()
        self._meet_until: float | None = None
        self._nursery: trio.Nursery | None = None
        self._news = trio.lowlevel.ParkingLot()
        own = Member(
            identity.peer_id.raw,
            0,
            int(wall_seconds),
            (MemberFlag.SEED if seed else 0) | (0 if leases else MemberFlag.NO_LEASES),
            zone,
            _address(addresses),
            b"",
        )
        self.machine = Membership(
            own,
            sign=identity.sign,
            verify=verify,
            admits=exchange.admission.may_be_member,
            rng=rng or Random(),  # noqa: S311  # which partners: nothing to guess
            now=self.now(),
        )
        exchange.watchers.append(self)
        for connection in exchange.connections():
            self.opened(connection)

    def now(self) -> float:
        """Seconds since 1970, never going back."""
        return self._begun_at + trio.current_time()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    if not self.machine.has_news:
                        with trio.move_on_after(QUIET_TICK_SECONDS - TICK_SECONDS):
                            await self._news.park()
                    await trio.sleep(TICK_SECONDS)
                    with _guarded():
                        self._tick()
            finally:
                self._nursery = None  # connections may end after us

    async def first_meeting(self) -> None:
        """Return once this node knows others, or has waited for them. A node that has been there for a while never waits."""
        now = trio.current_time()
        if self._meet_until is None:
            young = now - self._started < YOUNG_SECONDS
            self._meet_until = now + FIRST_MEETING_SECONDS if young else now
        if len(self.machine.members) > 1 or now >= self._meet_until:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_at(self._meet_until):
            await self._met.wait()

    def leave(self) -> None:
        """This node is about to end: all members will know at once."""
        if self.leases is not None:
            with _guarded():
                self.leases.leave()
        self._do(self.machine.leave(self.now()))

    def readdress(self, addresses: Sequence[PeerAddress]) -> None:
        """This node is reached at other addresses now."""
        address = _address(addresses)
        if address != self.machine.own.address:
            self._do(self.machine.readdress(address, self.now()))

    def status(self) -> dict[str, Any]:
        """What `p2pgz status` says of the cluster."""
        machine = self.machine
        zones = Counter(member.zone for member in machine.members.values())
        return {
            "zone": machine.own.zone,
            "members": len(machine.members),
            "zones": dict(sorted(zones.items())),
            "links": len(machine.links),
            "deaths": machine.table.deaths,
            "refuted": machine.refuted,
            "refused": machine.refused,
            "view": f"{machine.view:016x}",
        }

    def zone_of(self, peer: PeerId) -> str:
        """The zone that a member says it is in; empty: it is none, or says nothing."""
        member = self.machine.members.get(peer.raw)
        return member.zone if member is not None else ""

    # --- leases: `fetch.leasing.LeaseLinks`

    def lease_view(self) -> int:
        """Another number when `lease_members` may be others."""
        machine = self.machine
        return machine.view if machine.hears(self.now()) else 0

    def lease_members(self) -> dict[bytes, Member]:
        """Those that take part in leases, this node among them; only itself when it hears nobody."""
        electable = self.machine.electable(self.now())
        return {
            peer: member
            for peer, member in electable.items()
            if not member.flags & MemberFlag.NO_LEASES or peer == self.machine.own.peer
        }

    def send(self, peer: bytes, frame: CrowdFrame) -> None:
        """A frame about leases; the member is connected to first if need be, and is `lost` if that fails."""
        connection = self._lease_connection(peer)
        if connection is not None:
            connection.say_crowd(frame)
            return
        waiting = self._unsent.setdefault(peer, [])
        if len(waiting) < UNSENT_MAX:
            waiting.append(frame)
        if len(waiting) == 1 and self._nursery is not None:
            self._nursery.start_soon(self._connect_and_send, peer)

    async def _connect_and_send(self, peer: bytes) -> None:
        with _guarded():
            member = self.machine.members.get(peer)
            try:
                if member is not None:
                    await self._reach(member, soon=True)
            finally:
                frames = self._unsent.pop(peer, [])
            connection = self._lease_connection(peer)
            if connection is not None:
                for frame in frames:
                    connection.say_crowd(frame)
            elif self.leases is not None:
                self.leases.lost(peer)

    def has(self, swarm: bytes, n: int) -> bool:
        """Whether a chunk is here and offered."""
        return self._exchange.has(swarm, n)

    def shares(self, peer: bytes, swarm: bytes) -> bool:
        """Whether that peer may have chunks of the swarm."""
        connection = self._lease_connection(peer)
        return connection is not None and connection.serving.shares(swarm)

    async def document(self, peer: bytes, digest: bytes, limit_bytes: int) -> bytes | None:
        """A document from that peer, checked; None when it does not have it, or is not connected."""
        connection = self._lease_connection(peer)
        if connection is None:
            await trio.lowlevel.checkpoint()
            return None
        try:
            return await self._exchange.document_from(connection, digest, limit_bytes)
        except PeerBusy:
            return None

    def held(self, swarm: bytes) -> int:
        """The chunks that connected peers say they have, as bits."""
        found = 0
        for connection in self._exchange.connections():
            found |= connection.bitmaps.held(swarm)
        return found

    def tells(self, peer: bytes, swarm: bytes, n: int) -> bool | None:
        """Whether that peer says that it has a chunk; None when it is not connected."""
        connection = self._lease_connection(peer)
        return connection.bitmaps.has(swarm, n) if connection is not None else None

    def heard(self) -> Iterable[tuple[bytes, float]]:
        """When something last came from each connected peer."""
        return [(c.peer.raw, self._begun_at + c.heard_at) for c in self._exchange.connections()]

    def _lease_connection(self, peer: bytes) -> Connection | None:
        connection = self._exchange.connection(PeerId(peer))
        return connection if connection is not None and connection.features & Feature.LEASES else None

    # --- connections

    def opened(self, connection: Connection) -> None:
        """See `exchange.Watcher`."""
        if connection.features & Feature.MEMBERS:
            connection.crowd = partial(self._receive, connection)
            with _guarded():
                self._linked(connection.peer.raw)

    def ended(self, connection: Connection) -> None:
        """See `exchange.Watcher`."""
        peer = connection.peer.raw
        with _guarded():
            if self._connection(peer) is None and peer in self.machine.links:
                self._do(self.machine.unlinked(peer, self.now()))
            if self.leases is not None and self._lease_connection(peer) is None:
                self.leases.lost(peer)

    def _linked(self, peer: bytes) -> None:
        if peer not in self.machine.links:
            self._do(self.machine.linked(peer, self.now()))

    def _connection(self, peer: bytes) -> Connection | None:
        connection = self._exchange.connection(PeerId(peer))
        return connection if connection is not None and connection.features & Feature.MEMBERS else None

    def _receive(self, connection: Connection, frame: CrowdFrame) -> None:
        peer = connection.peer.raw
        if not isinstance(frame, MemberFrame):
            connection.keep()
            if self.leases is not None:
                self.leases.on_frame(peer, frame)
            return
        self._do(self.machine.receive(peer, frame, self.now()))
        if len(self.machine.members) > 1:
            self._met.set()
        # those that others have chosen are kept, too, but not where connections are scarce
        machine, crowded = self.machine, 2 * len(self._exchange.connections()) > self._exchange.budget.limit
        if peer in machine.partners or (peer in machine.links and not crowded):
            connection.keep()

    def _tick(self) -> None:
        machine = self.machine
        for peer in list(machine.links):
            connection = self._connection(peer)
            if connection is not None:
                machine.heard(peer, self._begun_at + connection.heard_at)
        self._do(machine.tick(self.now()))

    def _do(self, actions: Sequence[Action]) -> None:
        if self.machine.has_news:
            self._news.unpark_all()
        for action in actions:
            match action:
                case Send(peer, frame):
                    connection = self._connection(peer)
                    if connection is not None:
                        connection.say_crowd(frame)
                case Link(member) if self._nursery is not None and self._may_link(member.peer):
                    self._linking.add(member.peer)
                    self._nursery.start_soon(self._link, member)
                case _:  # what is not needed any more ends when it has been idle for long enough
                    pass

    # --- dials

    def _may_link(self, peer: bytes) -> bool:
        """Whether to dial now. Otherwise the partners are chosen again half a minute later."""
        now = trio.current_time()
        self._dials = min(float(DIALS_AT_ONCE), self._dials + (now - self._dials_at) * DIALS_PER_SECOND)
        self._dials_at = now
        if peer in self._linking or len(self._linking) >= DIALS_AT_ONCE or self._dials < 1:
            return False
        self._dials -= 1
        return True

    async def _link(self, member: Member) -> None:
        with _guarded():
            try:
                reached = await self._reach(member)
            finally:
                self._linking.discard(member.peer)
            if reached:
                self._linked(member.peer)
            elif reached is not None:
                log.debug("member.unreachable", peer=str(PeerId(member.peer)), address=member.address)
                self._do(self.machine.unreachable(member.peer, self.now()))

    async def _reach(self, member: Member, *, soon: bool = False) -> bool | None:
        """Whether there is a connection now. None: there is none, and it is not the member's fault."""
        now = trio.current_time()
        await trio.sleep(0.0 if soon else max(0.0, self._dialled.get(member.peer, now) - now))
        self._dialled = {peer: at for peer, at in self._dialled.items() if at > now}
        if self._connection(member.peer) is not None:
            return True
        peer = PeerId(member.peer)
        try:
            address = PeerAddress.parse(member.address)
        except ConfigError:
            return None
        if address.is_name or self._exchange.standing.banned(peer, trio.current_time()):
            return None
        self._dialled[member.peer] = trio.current_time() + REDIAL_SECONDS
        try:
            await self._exchange.connect(address.host, address.port, expected=peer, insist=True)
        except NotTaken:
            return None
        except (P2pgzError, OSError):
            return False
        return self._connection(member.peer) is not None or None


@contextmanager
def _guarded() -> Iterator[None]:
    """A bug in here must not end the node."""
    try:
        yield
    except Exception:
        log.exception("members.bug")


def _address(addresses: Sequence[PeerAddress]) -> str:
    """The first one without a name, which others would have to look up. Who has none is a member all the same."""
    return next((str(address.without_peer()) for address in addresses if not address.is_name), "")
