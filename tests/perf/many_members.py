"""A large cluster as one node sees it: signed entries of many members, of which one process plays those that are talked to.

Members live at addresses of their own in 127.0.0.0/8 behind one listener. Who is dialled becomes a real exchange with a
real member list; the others are entries only, which the node must check, keep and compare like any others.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.crowdframes import member_statement
from p2pgz.core.crowdmsg import Gossip, Member
from p2pgz.core.hello import FEATURES
from p2pgz.core.messages import Feature
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.listener import PeerListener, listen
from p2pgz.p2p.membership import Members
from p2pgz.p2p.uploads import Uploads
from p2pgz.testing.told_offers import ToldOffers

AGE_SECONDS = 3600


class Cluster:
    """The members by their numbers. Made by `open_cluster`."""

    def __init__(self, count: int, port: int, nursery: trio.Nursery, swarms: dict[bytes, int]) -> None:
        self._identities = [Identity.new() for _ in range(count)]
        self._addresses = [
            PeerAddress.of_ip(f"127.{8 + (n >> 16)}.{n >> 8 & 255}.{n & 255}", port) for n in range(count)
        ]
        self._swarms = swarms
        self._nursery = nursery
        self.wall_seconds = time.time()
        self.entries = [self._entry(n, self.wall_seconds - AGE_SECONDS) for n in range(count)]
        self.playing: dict[int, tuple[Exchange, Members]] = {}

    def _entry(self, n: int, signed_seconds: float) -> Member:
        since = int(self.wall_seconds) - AGE_SECONDS - 1
        peer, address = self._identities[n].peer_id.raw, str(self._addresses[n])
        unsigned = Member(peer, int(signed_seconds * 1000), since, 0, "zone", address, b"")
        signature = self._identities[n].sign(member_statement(unsigned))
        return msgspec.structs.replace(unsigned, signature=signature)

    async def play(self, n: int) -> Exchange:
        """Have this member be there."""
        if n not in self.playing:
            await self._nursery.start(self._play, n)
        return self.playing[n][0]

    async def _play(self, n: int, task_status: trio.TaskStatus[None]) -> None:
        identity = self._identities[n]
        credentials = Credentials.make(identity, Admission(), FEATURES | Feature.MEMBERS)
        async with Exchange.open(credentials, ToldOffers(self._swarms), Uploads()) as exchange:
            members = Members(
                exchange,
                identity,
                [self._addresses[n]],
                zone="zone",
                seed=False,
                wall_seconds=self.wall_seconds - AGE_SECONDS,
                rng=random.Random(n),
                verify=lambda *_: True,
            )
            for entry in self.entries:
                if entry.peer != identity.peer_id.raw:
                    members.machine.table.put(entry)
            members.machine._choose_partners = lambda now: None  # type: ignore[method-assign]  # there is nobody else
            self.playing[n] = (exchange, members)
            task_status.started()
            await members.run()

    async def accept(self, stream: trio.abc.Stream) -> None:
        """A connection to the member at that address."""
        assert isinstance(stream, trio.SocketStream)
        host = stream.socket.getsockname()[0]
        number = next(n for n, address in enumerate(self._addresses) if address.host == host)
        exchange = await self.play(number)
        await exchange.accept(stream)

    async def renew(self, per_minute: float) -> None:
        """For ever: members sign anew, and those that the node is linked to tell it."""
        rng = random.Random(1)
        while True:
            await trio.sleep(60 / per_minute)
            n = rng.randrange(len(self.entries))
            self.entries[n] = self._entry(n, time.time())
            teller = self.playing[rng.choice(list(self.playing))][1]
            teller.machine.receive(self.entries[n].peer, Gossip(False, (self.entries[n],)), teller.now())


@asynccontextmanager
async def open_cluster(count: int, swarms: dict[bytes, int]) -> AsyncIterator[Cluster]:
    """A cluster whose members are there when they are dialled."""
    listeners = await listen("0.0.0.0", 0)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(count, listeners[0].socket.getsockname()[1], nursery, swarms)
        await nursery.start(PeerListener(cluster.accept).serve, listeners)
        yield cluster
        nursery.cancel_scope.cancel()
