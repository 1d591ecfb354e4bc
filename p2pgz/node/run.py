"""The composition root: builds pool → peers → fetcher → images → mounts → control API, and owns their tasks.

Called by `p2pgz node` and by tests. Nothing here decides about chunks or bytes; it only joins the packages.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog
import trio

from p2pgz.config import Config
from p2pgz.directories import boot_id, prepare_directories
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Shares
from p2pgz.fetch.startup import StartUpLists
from p2pgz.image.open import TREES, ImageOpener
from p2pgz.mount.erofs_mode import ErofsMode
from p2pgz.mount.held import HolderClient
from p2pgz.mount.mounts import Mounts
from p2pgz.mount.segment_client import SegmentClient
from p2pgz.mount.servers import Servers
from p2pgz.mount.session import FsHost
from p2pgz.mount.startup import StartUps
from p2pgz.mount.users import SegmentUsers
from p2pgz.node.cycles import collect_cycles
from p2pgz.node.drills import Drills
from p2pgz.node.exports import Exports
from p2pgz.node.live import LiveSettings, Read, policy_of
from p2pgz.node.node import Node
from p2pgz.node.peering import open_peering, takes_part
from p2pgz.node.plainly import share_plain_layers
from p2pgz.node.site import Site, open_port, start_site
from p2pgz.node.supervision import Supervisor
from p2pgz.node.upkeep import Upkeep
from p2pgz.pool.pool import Pool
from p2pgz.registry.sources import Sources
from p2pgz.web import unix
from p2pgz.web.api import create_app, handler

log = structlog.get_logger(component="node")

Tell = Callable[[dict[str, object]], None]
# Taking mounts over takes milliseconds; when it takes longer (a hung process), commands need not wait for it
RECOVERY_WAIT_SECONDS = 3.0


@asynccontextmanager
async def open_node(
    config: Config, state_path: Path, run_path: Path, *, replace_fs: bool = False, ephemeral: bool = False
) -> AsyncIterator[Node]:
    """A node that answers on its sockets until the context ends; raises StateError when the state cannot be used."""
    prepare_directories(state_path, run_path)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            Pool.open(state_path, boot_id=boot_id(), check_filesystem=config.pool.check_filesystem)
        )
        listeners = await stack.enter_async_context(open_port(config, ephemeral=ephemeral))
        shares = Shares(policy_of(config.sharing), state_path)
        await shares.load(pool)
        lists = StartUpLists(state_path) if config.fetch.startup_list else None
        peering = None
        if takes_part(config.peers, ephemeral=ephemeral):
            peering = await stack.enter_async_context(
                open_peering(config.peers, pool, state_path, shares, lists, is_seed=bool(config.seed.images))
            )
        peers = peering.peers if peering is not None else None
        if lists is not None:
            lists.peers = peers
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        holder = await stack.enter_async_context(
            HolderClient.open(run_path, abandon_seconds=config.mount.abandon_seconds)
        )
        host = await stack.enter_async_context(FsHost.open(run_path))
        fetcher = ChunkFetcher(
            pool,
            nursery,
            connections=config.registry.connections,
            fill_bytes_per_second=config.fetch.fill_bytes_per_second,
            read_deadline_seconds=config.fetch.read_deadline_seconds,
            registry_bytes_per_second=config.registry.bytes_per_second,
            peers_bytes_per_second=config.peers.download_bytes_per_second,
            peers=peers,
        )
        plain = None
        if peering is not None:
            if config.peers.leases:
                peering.members.leases = fetcher.lease(
                    peering.members, peering.peer_id.raw, config.peers.zone
                )
            plain = share_plain_layers(config.peers, peering, pool, fetcher, state_path, nursery)
        opener = ImageOpener(pool, fetcher, state_path, peers, shares=shares, plain=plain)
        segments = await stack.enter_async_context(SegmentClient.open(run_path, holder, host.spawner))
        erofs = ErofsMode(segments, pool, run_path, state_path / TREES, boot_id(), resend=config.mount.resend)
        startups = StartUps(fetcher, pool, lists)
        servers = Servers(
            host,
            holder,
            fetcher,
            read_deadline_seconds=config.fetch.read_deadline_seconds,
            resend=config.mount.resend,
            startups=startups,
            erofs=erofs,
        )
        mounts = Mounts(servers, pool.catalog, fetcher, nursery, config.fetch, boot_id())
        upkeep = Upkeep(config.pool, pool, fetcher, SegmentUsers(mounts, servers))
        sources = Sources(config.registry, stack, fetcher.rates.whole_blob)
        node = Node(config, pool, fetcher, opener, mounts, sources, peering, upkeep, startups, nursery)
        node.drills = Drills(fetcher, node.open_image, peers)
        node.exports = Exports(
            pool,
            fetcher,
            opener,
            shares,
            upkeep,
            open_image=node.open_image,
            platform_of=node.platform_of,
            in_use=node.in_use,
            addresses_of=peering.discovery.addresses_of if peering is not None else lambda _: (),
        )
        node.live = LiveSettings(
            config,
            node=node,
            pool=pool,
            shares=shares,
            fetcher=fetcher,
            mounts=mounts,
            sources=sources,
            peering=peering,
            upkeep=upkeep,
        )
        site = Site(node, fetcher, sources, peering)
        node.http_urls = start_site(config, site, listeners, nursery)
        await holder.take_from_systemd()
        recovered = trio.Event()

        async def recover() -> None:
            await node.recover(nursery, replace_all=replace_fs)
            recovered.set()

        nursery.start_soon(recover)
        with trio.move_on_after(RECOVERY_WAIT_SECONDS):
            await recovered.wait()
        upkeep.start(nursery)
        await node.seeds.start(nursery, persistent=not ephemeral)
        api, descriptors = (
            unix.listen(run_path / unix.API_SOCKET),
            unix.listen(run_path / unix.DESCRIPTOR_SOCKET),
        )
        await nursery.start(unix.serve, api, handler(create_app(node)))
        await nursery.start(unix.serve, descriptors, node.hand_over)
        site.is_started = True
        log.info("node.ready", state=str(state_path), pid=os.getpid())
        yield node
        nursery.cancel_scope.cancel()


async def run_node(
    config: Config,
    read: Read,
    state_path: Path,
    run_path: Path,
    ephemeral: bool,
    replace_fs: bool,
    tell: Tell,
) -> bool:
    """Run until SIGTERM or SIGINT, or, when ephemeral, until nothing is mounted any more. A second signal ends at once.
    SIGHUP: `read` the configuration again. Mounts live on. True: the caller is to start the version that is installed now,
    with `replace_fs`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # not the end of a node that is about to listen for it
    async with open_node(config, state_path, run_path, replace_fs=replace_fs, ephemeral=ephemeral) as node:
        tell({"event": "ready", "pid": os.getpid()})
        supervisor = Supervisor({} if ephemeral else os.environ)
        supervisor.ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect_cycles)
            nursery.start_soon(supervisor.keep_alive)
            if ephemeral:

                async def end_when_idle() -> None:
                    await node.linger(config.node.ephemeral_linger_seconds)
                    log.info("node.idle")
                    nursery.cancel_scope.cancel()

                nursery.start_soon(end_when_idle)

            async def end_to_restart() -> None:
                await node.restart.wait()
                log.info("node.restarting")
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_to_restart)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async for number in signals:
                    if number == signal.SIGHUP:
                        supervisor.reloading()
                        await node.live.reload(read)
                        supervisor.ready()
                        continue
                    log.info("node.stopping", signal=signal.Signals(number).name)
                    supervisor.stopping()
                    break
            nursery.cancel_scope.cancel()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        await node.drain()
        return node.restart.is_set()
