"""The swarm as the node sees it: identity, port, exchange, DHT and bootstrap, opened together and joined to the pool.

Called by `node.run`. The exchange is what the fetcher races against the registry; the DHT starts behind it, since its
library takes most of a second to load and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from p2pgz.config import PeersConfig
from p2pgz.core.admission import Admission
from p2pgz.core.crowdmsg import ZONE_MAX_BYTES
from p2pgz.core.digest import Digest
from p2pgz.core.hello import FEATURES
from p2pgz.core.keyspace import Contact
from p2pgz.core.messages import Feature
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault
from p2pgz.errors import ConfigError, P2pgzError, StateError
from p2pgz.fetch.announcing import Announcing
from p2pgz.fetch.discovery import DiscoveringPeers, Discovery
from p2pgz.fetch.indexes import INDEXES, PlainIndexes
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.shares import Shares
from p2pgz.fetch.startup import StartUpLists
from p2pgz.p2p import indirect
from p2pgz.p2p.addresses import OwnAddresses
from p2pgz.p2p.alternatives import Alternatives
from p2pgz.p2p.bootstrap import Bootstrapper
from p2pgz.p2p.budget import connections_within, raise_descriptor_limit
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials, Ourselves
from p2pgz.p2p.identity import Identity, load_identity
from p2pgz.p2p.leaving import drain, readmit
from p2pgz.p2p.mdns import Mdns
from p2pgz.p2p.membership import Members
from p2pgz.p2p.plane import ChunkPlane, open_plane
from p2pgz.p2p.remembered import RememberedPeers
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool

if TYPE_CHECKING:
    from p2pgz.p2p.dht import Dht

log = structlog.get_logger(component="peers")

DEFAULT_PORT: Final = 4801
# A libp2p connection that comes while the library is still being loaded
DHT_READY_SECONDS: Final = 10.0
# how long uploads may go on after SIGTERM; systemd waits for 90 s, Kubernetes for 30
DRAIN_SECONDS: Final = 5.0


NO_PEERS: Final[dict[str, Any]] = {
    "peer_id": None,
    "addrs": [],
    "faults": {},
    "faulty_peers": [],
    "identity_twins": 0,
    "busy_answers": 0,
    "connections_max": 0,
    "connections_accepted": 0,
    "connections_refused": 0,
    "connections_closed": 0,
}
"""the status of a node that has none"""


class Peering:
    """The peers of a node. Made by `open_peering`."""

    def __init__(
        self,
        identity: Identity,
        plane: ChunkPlane,
        discovery: Discovery,
        bootstrapper: Bootstrapper,
        own: OwnAddresses,
        indexes: PlainIndexes,
        members: Members,
    ) -> None:
        self.identity = identity
        self.exchange: Exchange = plane.exchange
        self._listener = plane.listener
        self.discovery = discovery
        self.bootstrapper = bootstrapper
        self.peers = DiscoveringPeers(plane.exchange, discovery)
        self.own = own
        """at which others reach us"""
        self.indexes = indexes
        self.members = members
        self.dht: Dht | None = None
        self._dht_ready = trio.Event()

    @property
    def peer_id(self) -> PeerId:
        """Ours."""
        return self.identity.peer_id

    def status(self) -> dict[str, Any]:
        """What `p2pgz status` says of the node's place in the swarm."""
        return {
            "peer_id": str(self.peer_id),
            "addrs": [f"{address}/p2p/{self.peer_id}" for address in self.own.current],
            "faults": {str(fault): self.exchange.standing.counts[fault] for fault in Fault},
            "faulty_peers": self.exchange.faulty_peers(),
            "identity_twins": self.exchange.dialler.twins,
            "busy_answers": self.exchange.uploads.busy,
            "connections_max": self.exchange.budget.limit,
            "connections_accepted": self.exchange.accepted,
            "connections_refused": self.exchange.budget.refused,
            "connections_closed": self.exchange.budget.closed,
        }

    def connected(self) -> list[dict[str, Any]]:
        """The open connections, and where those at their other ends are."""
        zones = [self.members.zone_of(connection.peer) for connection in self.exchange.connections()]
        return [{**row, "zone": zone} for row, zone in zip(self.exchange.status(), zones, strict=True)]

    def dht_is(self, dht: Dht | None) -> None:
        """The DHT runs, or (None) there is none."""
        self.dht = dht
        self._dht_ready.set()

    async def readmit(self, admission: Admission) -> None:
        """Let others in than before; who was let in already shows what he knows once more."""
        self.exchange.admission.adopt(admission)
        log.info("peers.readmitted", open=admission.open)
        warn_if_open(admission)
        await readmit(self.exchange)
        if self.dht is not None and not admission.open:
            await self.dht.readmit()

    async def first_meeting(self) -> None:
        """Before the first image is opened by a node that has just started: know some others, if there are any soon."""
        if self.bootstrapper.ips() and self.members.leases is not None:
            await self.members.first_meeting()

    async def drain(self) -> None:
        """Accept nobody any more, offer nothing, and let what is on its way to peers arrive."""
        self._listener.stop()
        self.members.leave()
        await drain(self.exchange, DRAIN_SECONDS)

    async def on_multistream(self, stream: trio.SocketStream) -> None:
        """A libp2p connection."""
        with trio.fail_after(DHT_READY_SECONDS):
            await self._dht_ready.wait()
        if self.dht is None:
            await trio.aclose_forcefully(stream)
            return
        await self.dht.accept(stream)


def takes_part(config: PeersConfig, *, ephemeral: bool) -> bool:
    """Whether this node is to have peers."""
    if config.enabled == "auto":
        return config.configured or not ephemeral
    return config.enabled == "always"


def read_admission(config: PeersConfig) -> Admission:
    """Who may join, from the configuration; raises ConfigError."""
    keys: list[bytes] = []
    if config.cluster_key_file:
        path = Path(config.cluster_key_file)
        try:
            keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
        except OSError as error:
            raise ConfigError(
                f"peers.cluster_key_file: {path}: {error.strerror}",
                hint="make one with `openssl rand -hex 32`; it is the same on all hosts of the cluster",
            ) from error
        if not keys:
            raise ConfigError(
                f"peers.cluster_key_file: {path}: no key in it", hint="a line of at least 16 bytes"
            )
    return Admission(cluster_keys=keys, allowed=[PeerId.parse(text) for text in config.allow])


def read_zone(config: PeersConfig) -> str:
    """The zone of this host, from the configuration; raises ConfigError."""
    zone = config.zone
    if len(zone) > ZONE_MAX_BYTES or not (zone.isascii() and zone.isprintable()):
        raise ConfigError(
            f"peers.zone: {zone!r}", hint=f"a name of at most {ZONE_MAX_BYTES} ASCII characters"
        )
    return zone


def _features(config: PeersConfig) -> Feature:
    return FEATURES | Feature.MEMBERS | (Feature.LEASES if config.leases else Feature(0))


def warn_if_open(admission: Admission) -> None:
    """Say that anyone may join, which is good for a first try only."""
    if admission.open:
        log.warning(
            "peers.open",
            effect="whoever reaches the port may join",
            hint="peers.cluster_key_file admits only those who know the key",
        )


@asynccontextmanager
async def open_peering(
    config: PeersConfig,
    pool: Pool,
    state_path: Path,
    shares: Shares,
    startups: StartUpLists | None,
    *,
    is_seed: bool = False,
) -> AsyncIterator[Peering]:
    """Take part until the context ends; raises StateError when the port cannot be had, ConfigError for what is unusable."""
    identity = load_identity(state_path)
    admission = read_admission(config)
    bootstrap = [PeerAddress.parse(text, where="peers.bootstrap") for text in config.bootstrap]
    uploads = Uploads(bytes_per_second=config.upload_bytes_per_second, slots=config.upload_slots)
    credentials = Credentials.make(identity, admission, _features(config))
    indexes = PlainIndexes(pool, state_path / INDEXES, identity)
    early: list[Peering] = []

    async def on_multistream(stream: trio.SocketStream) -> None:
        await early[0].on_multistream(stream)

    async with _open_plane(
        config, credentials, PoolOffers(pool, shares, indexes, startups), uploads, on_multistream
    ) as plane:
        own = OwnAddresses(
            plane.addresses,
            configured=[PeerAddress.parse(text, where="peers.announce") for text in config.announce],
        )
        await indexes.load()

        def layer_names(segment: Digest) -> list[Digest]:
            diff_id, known = indexes.diff_id_of(segment), pool.segment(segment)
            if diff_id is None or known is None:
                return []
            return [diff_id, *([known.meta.blob_digest] if known.meta.blob_digest is not None else [])]

        announcing = Announcing(
            pool, shares, provide_chunks=config.provide == "chunk", layer_names=layer_names
        )
        plane.exchange.budget.limit = connections_within(raise_descriptor_limit(), config.connections)
        discovery = Discovery(plane.exchange, pool, shares, announcing)
        uploads.alternatives = Alternatives(plane.exchange, discovery.addresses_of)

        async def connect(host: str, port: int, expected: PeerId | None) -> PeerId:
            try:
                connection = await plane.exchange.connect(host, port, expected=expected, insist=True)
            except Ourselves as error:
                if error.twin:
                    raise
                return identity.peer_id  # a name that stands for all hosts stands for this one, too
            discovery.learned(connection.peer, PeerAddress.of_ip(host, port))
            return connection.peer

        bootstrapper = Bootstrapper(
            bootstrap,
            own=identity.peer_id,
            dial=connect,
            connected=lambda: {connection.peer for connection in plane.exchange.connections()},
            known=discovery.connected,
            is_own=own.is_own,
            on_addresses=own.bootstrap,
            remembered=await trio.to_thread.run_sync(RememberedPeers.load, state_path, time.time()),
        )
        members = Members(
            plane.exchange,
            identity,
            own.current,
            zone=read_zone(config),
            seed=is_seed or not bootstrap,
            leases=config.leases,
            wall_seconds=time.time(),
        )
        own.watchers.append(members.readdress)
        peering = Peering(identity, plane, discovery, bootstrapper, own, indexes, members)
        early.append(peering)
        warn_if_open(admission)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(discovery.run)
            nursery.start_soon(members.run)
            await nursery.start(peering.bootstrapper.run)
            nursery.start_soon(own.run)
            if config.mdns:
                _start_mdns(peering, nursery)
            log.info(
                "peers.ready", peer=str(identity.peer_id), addrs=[str(address) for address in own.current]
            )
            if config.dht:
                nursery.start_soon(_run_dht, peering, admission)
            else:
                peering.dht_is(None)
            try:
                yield peering
            except Exception as error:  # noqa: BLE001  # goes on below, not wrapped in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


@asynccontextmanager
async def _open_plane(
    config: PeersConfig, credentials: Credentials, offers: PoolOffers, uploads: Uploads, on_multistream: Any
) -> AsyncIterator[ChunkPlane]:
    if config.listen:
        address = PeerAddress.parse(config.listen[0], where="peers.listen", any_port=True)
        tries = [(address.host, address.port)]
    else:
        tries = [("", DEFAULT_PORT), ("0.0.0.0", 0)]  # noqa: S104  # peers are elsewhere
    while True:
        host, port = tries.pop(0)
        opened = False
        try:
            async with open_plane(
                credentials, offers, uploads, host=host, port=port, on_multistream=on_multistream
            ) as plane:
                opened = True
                yield plane
            return
        except StateError as error:
            if opened or not tries:
                raise
            log.warning("peers.port_taken", port=port, reason=error.what, effect="another port is used")


def _start_mdns(peering: Peering, nursery: trio.Nursery) -> None:
    async def look_at_twin(contact: Contact) -> None:
        """Dial what announces our own id: the dialler says loudly when it is another host."""
        for raw in contact.addresses:
            with contextlib.suppress(ValueError, P2pgzError):
                address = PeerAddress.from_bytes(raw)
                await peering.exchange.connect(address.host, address.port)

    mdns = Mdns(
        peering.peer_id,
        addresses=lambda: peering.own.current,
        found=peering.bootstrapper.offer,
        twin=lambda contact: nursery.start_soon(look_at_twin, contact),
    )
    peering.own.watchers.append(lambda _addresses: mdns.changed())
    nursery.start_soon(mdns.run)


async def _run_dht(peering: Peering, admission: Admission) -> None:
    """The DHT, whose library is loaded in a thread."""
    try:
        dht_module = await trio.to_thread.run_sync(_load_dht)
        async with dht_module.open_dht(
            peering.identity,
            announce=[str(address) for address in peering.own.current],
            admission=admission,
            holdings=peering.discovery.holdings,
            bootstrap=peering.bootstrapper.contacts,
        ) as dht:
            peering.dht_is(dht)
            dht.host.serve_streams(indirect.PROTOCOL, peering.exchange.accept)
            dht.host.on_observed(peering.own.observed)

            def moved(found: Sequence[PeerAddress]) -> None:
                dht.host.announce([str(address) for address in found])
                dht.announcer.moved()

            peering.own.watchers.append(moved)
            await peering.discovery.use(dht)
    except P2pgzError as error:
        log.error("dht.failed", reason=str(error), effect="peers that are connected go on being asked")
    finally:
        peering.dht_is(None)


def _load_dht() -> Any:
    from p2pgz.p2p import dht

    return dht
