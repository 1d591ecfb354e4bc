"""A running node takes a changed configuration: which keys take effect at once, and how.

`node.run` calls `reload` on SIGHUP. Everything is read and checked before anything is changed: a configuration that cannot
be used leaves the one of before in effect, whole. Keys that are not in AT_ONCE wait for a restart, and the log says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog
import trio

from p2pgz.config import Config, PeersConfig, SharingRule, flatten
from p2pgz.core.admission import Admission
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.reference import Reference
from p2pgz.core.sharing import Mode, Policy, Rule
from p2pgz.errors import P2pgzError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Shares
from p2pgz.mount.mounts import Mounts
from p2pgz.node.node import Node
from p2pgz.node.peering import Peering, read_admission, read_zone
from p2pgz.node.seeding import configured_seeds
from p2pgz.node.upkeep import Upkeep
from p2pgz.p2p.budget import connections_within, raise_descriptor_limit
from p2pgz.pool.pool import Pool
from p2pgz.registry.sources import Sources
from p2pgz.telemetry.log import set_level
from p2pgz.web.http import AUTO, NONE, parse_listen

log = structlog.get_logger(component="node")

AT_ONCE: Final = frozenset(
    {
        "log.level",
        "pool.quota_bytes",
        "pool.free_floor_bytes",
        "registry.plain_http",
        "registry.ca_file",
        "registry.hosts_dir",
        "registry.docker_config",
        "registry.bytes_per_second",
        "fetch.fill",
        "fetch.fill_bytes_per_second",
        "fetch.fill_delay_seconds",
        "mount.suid",
        "mount.dev",
        "mount.context",
        "peers.announce",
        "peers.bootstrap",
        "peers.cluster_key_file",
        "peers.allow",
        "peers.download_bytes_per_second",
        "peers.upload_bytes_per_second",
        "peers.upload_slots",
        "seed.images",
        "seed.watch_seconds",
        "seed.bytes_per_second",
        "peers.connections",
        "sharing",
    }
)
"""what a reload changes; of `registry` and `mount`, and `fetch.fill`: for what is opened or mounted from then on"""

Read = Callable[[], Config]


def policy_of(rules: list[SharingRule]) -> Policy:
    """The rules of `[[sharing]]`."""
    return Policy(Rule(rule.repository, Mode(rule.mode)) for rule in rules)


class _Prepared(msgspec.Struct, frozen=True):
    """What is made of a configuration and may fail, made before anything is changed."""

    policy: Policy
    seeds: list[Reference]
    admission: Admission
    zone: str
    bootstrap: list[PeerAddress]
    announce: list[PeerAddress]


class LiveSettings:
    """The configuration that is in effect. Made by `node.run`, which has it reload."""

    def __init__(
        self,
        config: Config,
        *,
        node: Node,
        pool: Pool,
        shares: Shares,
        fetcher: ChunkFetcher,
        mounts: Mounts,
        sources: Sources,
        peering: Peering | None,
        upkeep: Upkeep,
    ) -> None:
        self._started_with = self._current = config
        self._node = node
        self._pool = pool
        self._shares = shares
        self._fetcher = fetcher
        self._mounts = mounts
        self._sources = sources
        self._peering = peering
        self._upkeep = upkeep
        self._turn = trio.Lock()
        self.refused = ""
        """why the configuration that was read last is not in effect"""

    async def reload(self, read: Read) -> None:
        """Read the configuration and adopt it; what is wrong with it is logged, never raised."""
        async with self._turn:
            try:
                new = await trio.to_thread.run_sync(read)
                prepared = await trio.to_thread.run_sync(_prepare, new)
            except P2pgzError as error:
                self.refused = error.what
                log.error(
                    "config.refused",
                    reason=error.what,
                    hint=error.hint,
                    effect="the configuration of before stays in effect",
                )
                return
            changed = _differences(self._current, new)
            try:
                await self._adopt(new, prepared, changed)
            except Exception:  # a bug here must not end the mounts' node
                log.exception("config.bug")
                return
            self.refused = ""
            self._current = new
            log.info(
                "config.reloaded",
                changed=sorted(changed & AT_ONCE),
                waiting_for_restart=self.waiting_for_restart,
            )

    @property
    def waiting_for_restart(self) -> list[str]:
        """Keys that have another value in the configuration than in this process."""
        return sorted(_differences(self._started_with, self._current) - AT_ONCE)

    def status(self) -> dict[str, Any]:
        """What `config` in the status document says."""
        return {"refused": self.refused or None, "waiting_for_restart": self.waiting_for_restart}

    async def _adopt(self, new: Config, prepared: _Prepared, changed: set[str]) -> None:
        if "log.level" in changed:
            set_level(new.log.level)
        self._node.use(new)
        self._mounts.config = new.fetch
        # how many requests at a time: the lanes were made for it
        self._sources.config = msgspec.structs.replace(
            new.registry, connections=self._started_with.registry.connections
        )
        self._fetcher.rates.limit(
            fill=new.fetch.fill_bytes_per_second,
            registry=new.registry.bytes_per_second,
            peers=new.peers.download_bytes_per_second,
        )
        if changed & {"pool.quota_bytes", "pool.free_floor_bytes"}:
            self._upkeep.limit(new.pool)
        if "sharing" in changed:
            await self._share(prepared.policy)
        await self._node.seeds.adopt(new.seed)
        if self._peering is not None:
            await self._adopt_peers(self._peering, new.peers, prepared, changed)

    async def _share(self, policy: Policy) -> None:
        await self._shares.adopt(policy, self._pool)
        verdicts = self._shares.verdicts()
        for origin in self._fetcher.origins():
            segment = origin.segment
            origin.peers = verdicts.get((segment.domain, segment.id.raw), origin.peers)

    async def _adopt_peers(
        self, peering: Peering, peers: PeersConfig, prepared: _Prepared, changed: set[str]
    ) -> None:
        peering.exchange.uploads.limit(
            bytes_per_second=peers.upload_bytes_per_second, slots=peers.upload_slots
        )
        peering.exchange.budget.limit = connections_within(raise_descriptor_limit(), peers.connections)
        if "peers.announce" in changed:
            peering.own.configure(prepared.announce)
        if "peers.bootstrap" in changed:
            peering.bootstrapper.configure(prepared.bootstrap)
        # the file of the keys may have changed under the same name
        if prepared.admission != peering.exchange.admission:
            await peering.readmit(prepared.admission)


def _prepare(config: Config) -> _Prepared:
    peers = config.peers
    if config.http.listen not in (AUTO, NONE):
        parse_listen(config.http.listen)
    # for the next start: who writes it now wants to know now
    for text in peers.listen:
        PeerAddress.parse(text, where="peers.listen", any_port=True)
    for text in peers.trusted_indexers:
        PeerId.parse(text)
    return _Prepared(
        policy=policy_of(config.sharing),
        seeds=configured_seeds(config.seed),
        admission=read_admission(peers),
        zone=read_zone(peers),
        bootstrap=[PeerAddress.parse(text, where="peers.bootstrap") for text in peers.bootstrap],
        announce=[PeerAddress.parse(text, where="peers.announce") for text in peers.announce],
    )


def _differences(one: Config, other: Config) -> set[str]:
    """The keys whose values differ."""
    left, right = (flatten(msgspec.to_builtins(config)) for config in (one, other))
    return {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}
