"""What a command may ask of a running node: the methods of `Node`, which are the `Control` protocol of `web.api`.

Made by `node.run`. Nothing here decides about chunks or bytes; it only asks the packages that do.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
import trio

from p2pgz import __version__
from p2pgz.config import Config
from p2pgz.core.digest import Digest
from p2pgz.core.platform import Platform
from p2pgz.core.reference import parse_reference
from p2pgz.errors import ImageNotFound, P2pgzError, UsageError
from p2pgz.fetch.leaselayer import NO_LEASES
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image import files
from p2pgz.image.listing import format_rows, list_directory
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import OpenImage
from p2pgz.image.tags import LOOK_UP_SECONDS
from p2pgz.image.verify import verify_image
from p2pgz.mount.mounts import MountDocument, MountOptions, Mounts
from p2pgz.mount.startup import StartUps
from p2pgz.node.layers import Layers
from p2pgz.node.peering import NO_PEERS, Peering
from p2pgz.node.questions import Questions
from p2pgz.node.seeding import Seeder
from p2pgz.node.upkeep import Upkeep
from p2pgz.p2p.membership import NO_CLUSTER
from p2pgz.pool.catalog import MountRecord
from p2pgz.pool.pool import Pool
from p2pgz.registry.lazy import LazySource
from p2pgz.registry.sources import Sources
from p2pgz.telemetry import process
from p2pgz.web import unix
from p2pgz.web.api import (
    GcRequest,
    GetRequest,
    MountRequest,
    Progress,
    ScrubRequest,
    UnpinRequest,
    UpgradeRequest,
    VerifyRequest,
    WaitRequest,
    Warn,
    kept_fields,
    recorded_request,
)

if TYPE_CHECKING:
    from p2pgz.node.drills import Drills
    from p2pgz.node.exports import Exports
    from p2pgz.node.live import LiveSettings

log = structlog.get_logger(component="node")

MODES = ("auto", "tree", "erofs")
MOUNT_RETRY_START_SECONDS, MOUNT_RETRY_MAX_SECONDS = 1.0, 60.0
ANSWER_FIRST_SECONDS = 0.1


class Node:
    """Everything a running node has. Made by `node.run.open_node`."""

    live: LiveSettings
    """the configuration that is in effect"""
    exports: Exports
    drills: Drills

    def __init__(
        self,
        config: Config,
        pool: Pool,
        fetcher: ChunkFetcher,
        opener: ImageOpener,
        mounts: Mounts,
        sources: Sources,
        peering: Peering | None,
        upkeep: Upkeep,
        startups: StartUps,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._pool = pool
        self._fetcher = fetcher
        self._opener = opener
        self.mounts = mounts
        self._sources = sources
        self._peering = peering
        self._upkeep = upkeep
        self._startups = startups
        self._nursery = nursery
        self.questions = Questions(fetcher, mounts, peering, has_dht=config.peers.dht)
        self.platform = Platform.for_machine(os.uname().machine)
        self.seeds = Seeder(
            config.seed,
            pool.catalog,
            fetcher,
            upkeep,
            self.open_image,
            self.platform,
            has_peers=peering is not None,
        )
        self.layers = Layers(self.open_image, opener, sources, pool.directory.parent)
        self._started = time.monotonic()
        self.http_urls: list[str] = []
        """where its status page is"""
        self.busy = 0
        """requests in progress that keep an ephemeral node alive"""
        self.last_use = trio.current_time()
        self.restart = trio.Event()
        """set when this node is to go on as the version that is installed now"""

    def use(self, config: Config) -> None:
        """Go by another configuration for what is asked for from now on."""
        self._config = config

    def status(self) -> dict[str, Any]:
        """The document of `p2pgz status --json` (docs/reference/control-api.md); fields may be added, never renamed."""
        counters, peering = self._fetcher.counters, self._peering
        return {
            "node": {
                **(peering.status() if peering is not None else NO_PEERS),
                "uptime_seconds": time.monotonic() - self._started,
                "version": __version__,
                "pid": os.getpid(),
                "http": self.http_urls,
                **process.figures(),
            },
            "peers": peering.connected() if peering is not None else [],
            "cluster": peering.members.status() if peering is not None else NO_CLUSTER,
            "leases": self._fetcher.leasing.status() if self._fetcher.leasing is not None else NO_LEASES,
            "config": self.live.status(),
            "mounts": self.mounts.status(),
            "seeds": self.seeds.status(),
            "unpacked": self.layers.status(),
            "diffid_conflicts": self.layers.diff_ids.status(),
            "pool": self._upkeep.status(),
            "sources": {
                "pool": {"chunks": counters.pool_chunks, "bytes": counters.pool_bytes},
                "peer": {
                    "chunks": counters.peer_chunks,
                    "bytes": counters.peer_bytes,
                    "failures": counters.peer_failures,
                    "wasted_bytes": counters.wasted_bytes
                    + (peering.exchange.dropped_bytes if peering else 0),
                },
                "registry": {
                    "chunks": counters.registry_chunks,
                    "bytes": counters.registry_bytes,
                    **self._sources.totals(),
                },
            },
        }

    @property
    def pool_state(self) -> tuple[str, str]:
        """How the pool is, and what a failing disk said."""
        status = self._upkeep.evictor.status()
        return str(status["state"]), str(status["error"])

    async def mount(self, request: MountRequest, progress: Progress) -> dict[str, Any]:
        """Open the image, start its file system and leave the mount's descriptor for the command."""
        if request.mode not in MODES:
            raise UsageError(f"mode {request.mode!r} is not known", hint=f"use one of {', '.join(MODES)}")
        async with self.in_use():
            self.mounts.prepare(request.mode)
            image = await self.open_image(request, progress)
            options = self._options(request)
            mounted = await self.mounts.mount(image, options, kept_fields(request))
            return {
                "id": mounted.id,
                "token": mounted.token,
                "reference": image.reference,
                "digest": str(image.digest),
                "dir": request.directory,
                "mode": mounted.mode,
                "mode_reason": mounted.mode_reason,
                "bytes": image.tree.total_bytes,
                "warnings": image.warnings,
            }

    def _options(self, request: MountRequest) -> MountOptions:
        defaults = self._config.mount
        return MountOptions(
            directory=request.directory,
            suid=request.suid or defaults.suid,
            dev=request.dev or defaults.dev,
            context=request.context or defaults.context,
            fill=self._config.fetch.fill if request.fill is None else request.fill,
            mode=request.mode,
            persist=request.persist,
        )

    async def recover(self, nursery: trio.Nursery, *, replace_all: bool) -> None:
        """Take over the mounts of the node before this one, then mount what should be mounted and is not."""
        again = await self.mounts.recover(self._open_known)
        await self.mounts.replace_all(only_other_versions=not replace_all)
        for record, document in again:
            request = recorded_request(document)
            nursery.start_soon(self._mount_here, request, document.options, record)
        for wanted in self._config.mounts:
            if any(record.directory == wanted.directory for record, _ in again):
                continue
            request = MountRequest(reference=wanted.reference, directory=wanted.directory, mode=wanted.mode)
            nursery.start_soon(self._mount_here, request, self._options(request), None)

    async def _mount_here(
        self, request: MountRequest, options: MountOptions, record: MountRecord | None
    ) -> None:
        """Mount in this process's namespace; again and again until it succeeds. Asks nobody when the image is known here."""
        delay = MOUNT_RETRY_START_SECONDS
        reference = parse_reference(request.reference)
        while not self.mounts.has(options.directory):
            try:
                tag = self._pool.catalog.tag(str(reference), str(self.platform_of(request)))
                digest = record.manifest if record is not None else tag.digest if tag is not None else None
                image = await self._known_or_open(digest, request)
                replaces = record.id if record is not None else ""
                await self.mounts.mount(image, options, kept_fields(request), here=True, replaces=replaces)
                log.info("mount.made_at_start", reference=str(reference), directory=options.directory)
            except (P2pgzError, OSError) as error:
                log.warning("mount.not_yet", reference=str(reference), reason=str(error), again_seconds=delay)
                await trio.sleep(delay)
                delay = min(delay * 2, MOUNT_RETRY_MAX_SECONDS)

    async def _known_or_open(self, digest: Digest | None, request: MountRequest) -> OpenImage:
        if digest is not None:
            try:
                return await self._known(digest, request)
            except P2pgzError as error:
                log.info("image.not_known", reference=request.reference, reason=str(error))
        return await self.open_image(request, _silent)

    async def _open_known(self, record: MountRecord, document: MountDocument) -> OpenImage:
        request = recorded_request(document)
        return await self._known(record.manifest, request)

    async def _known(self, digest: Digest, request: MountRequest) -> OpenImage:
        reference = parse_reference(request.reference)
        return await self._opener.open_known(
            digest,
            reference,
            LazySource(reference.name, lambda: self._sources.get(reference, request)),
            allow_unverified_toc=request.allow_unverified_toc,
            lowest=request.layers,
        )

    async def upgrade(self, request: UpgradeRequest, progress: Progress) -> dict[str, Any]:
        """Answer, then end this program and start the one that is installed now in its place."""
        await progress({"event": "progress", "text": "restarting"})
        self._nursery.start_soon(self._restart_soon)
        return {
            "pid": os.getpid(),
            "version": __version__,
            "uptime_seconds": time.monotonic() - self._started,
        }

    async def _restart_soon(self) -> None:
        await trio.sleep(ANSWER_FIRST_SECONDS)
        self.restart.set()

    async def hand_over(self, stream: trio.SocketStream) -> None:
        """Give the descriptor of a new mount to the command that names its token."""
        with trio.fail_after(unix.HANDSHAKE_SECONDS):
            token = (await stream.receive_some(256)).decode("ascii", "replace").strip()
            try:
                _, descriptor = self.mounts.take(token)
            except ImageNotFound:
                return
            try:
                await unix.send_descriptor(stream, b"m", descriptor)
            finally:
                os.close(descriptor)

    async def wait_mount(self, request: WaitRequest, progress: Progress) -> dict[str, Any]:
        """Return when a mount has ended."""
        await self.mounts.wait(request.id)
        return {}

    async def list_files(self, request: MountRequest, progress: Progress) -> dict[str, Any]:
        """The rows of `p2pgz ls`."""
        async with self.in_use():
            image = await self.open_image(request, progress)
            rows = list_directory(image.tree, os.fsencode(request.path or "/"), recursive=request.recursive)
            entries = [row.to_json() for row in rows]
            return {"lines": format_rows(rows), "entries": entries, "warnings": image.staleness}

    async def read_file(self, request: MountRequest, warn: Warn) -> AsyncIterator[memoryview]:
        """The bytes of one file."""
        async with self.in_use():
            image = await self.open_image(request, _silent)
            for warning in image.staleness:
                warn(warning)
            async for piece in files.read_path(image, self._fetcher, os.fsencode(request.path)):
                yield piece

    async def read_digest(self, request: GetRequest, warn: Warn) -> AsyncIterator[bytes]:
        """A chunk, TOC, manifest or config that is here, or can be fetched because its image is known here."""
        digest = Digest.parse(request.digest)
        async with self.in_use():
            yield await files.read_digest(self._pool, self._fetcher, digest)

    async def startup_files(self, request: MountRequest, progress: Progress) -> dict[str, Any]:
        """The files that start an image, in the order in which they are read."""
        async with self.in_use():
            image = await self.open_image(request, progress)
            return await self._startups.begin(image, record=False).files()

    async def verify(self, request: VerifyRequest, progress: Progress) -> dict[str, Any]:
        """Hash everything of an image again."""
        async with self.in_use():
            if request.directory and not request.reference:
                image = self.mounts.image_at(request.directory)
                return await verify_image(image, self._pool, self._fetcher, fetch=False, progress=progress)
            image = await self.open_image(request, progress)
            found = await verify_image(image, self._pool, self._fetcher, fetch=True, progress=progress)
            return {**found, "warnings": image.staleness}

    async def pool_gc(self, request: GcRequest, progress: Progress) -> dict[str, Any]:
        """Give back what the pool need not hold."""
        async with self.in_use():
            return await self._upkeep.gc(request, progress)

    async def pool_scrub(self, request: ScrubRequest, progress: Progress) -> dict[str, Any]:
        """Check every chunk on the disk and fetch what is wrong again."""
        async with self.in_use():
            return await self._upkeep.scrub(request, progress)

    async def pool_pin(self, request: MountRequest, progress: Progress) -> dict[str, Any]:
        """Keep an image's chunks, those that are here and those that come."""
        async with self.in_use():
            return await self._upkeep.pin(await self.open_image(request, progress))

    async def pool_unpin(self, request: UnpinRequest, progress: Progress) -> dict[str, Any]:
        """Undo that."""
        async with self.in_use():
            return await self._upkeep.unpin(request)

    async def open_image(
        self, request: MountRequest, progress: Progress, *, tag_seconds: float = LOOK_UP_SECONDS
    ) -> OpenImage:
        """Open the image of a request; see `image.open`."""
        reference = parse_reference(request.reference)
        source = await self._sources.get(reference, request)
        if self._peering is not None:
            await self._peering.first_meeting()
        return await self._opener.open(
            reference,
            source,
            platform=self.platform_of(request),
            allow_unverified_toc=request.allow_unverified_toc,
            progress=progress,
            insist_on_platform=bool(request.platform),
            tag_seconds=tag_seconds,
            lowest=request.layers,
        )

    def platform_of(self, request: MountRequest) -> Platform:
        """The one that is asked for, or this machine's."""
        return Platform.parse(request.platform) if request.platform else self.platform

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Keep an ephemeral node alive."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.last_use = trio.current_time()

    async def drain(self) -> None:
        """Take leave of peers before the end: nothing new, and what they were promised."""
        if self._peering is not None:
            await self._peering.drain()

    async def linger(self, seconds: float) -> None:
        """Return once nothing has been mounted, opened or asked for `seconds` (what an ephemeral node waits for)."""
        while True:
            if self.mounts.count or self.busy:
                self.last_use = trio.current_time()
            left = self.last_use + seconds - trio.current_time()
            if left <= 0:
                return
            await trio.sleep(min(left, 0.5) if self.mounts.count or self.busy else left)


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()
