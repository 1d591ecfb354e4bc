"""The node: the composition root. Builds pool → fetcher → images → mounts → control API, and owns their tasks.

What a command may ask for is `Node`'s methods (the `Control` protocol of `web.api`). Nothing here decides about chunks or
bytes; it only joins the packages.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
import trio

from p2pgz import __version__
from p2pgz.config import Config
from p2pgz.core.digest import Digest
from p2pgz.core.platform import Platform
from p2pgz.core.reference import Reference, parse_reference
from p2pgz.errors import ConfigError, ImageNotFound, UsageError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image import files
from p2pgz.image.listing import format_rows, list_directory
from p2pgz.image.open import ImageOpener, OpenImage
from p2pgz.image.verify import verify_image
from p2pgz.mount.mounts import MountOptions, Mounts
from p2pgz.mount.session import FsHost
from p2pgz.pool.pool import Pool
from p2pgz.registry import RegistryOptions, open_source
from p2pgz.registry.layout import LayoutSource
from p2pgz.registry.source import RegistrySource
from p2pgz.web import unix
from p2pgz.web.api import (
    GetRequest,
    MountRequest,
    Progress,
    VerifyRequest,
    WaitRequest,
    create_app,
    handler,
)

log = structlog.get_logger(component="node")

API_SOCKET = "api.sock"
DESCRIPTOR_SOCKET = "fd.sock"
Tell = Callable[[dict[str, object]], None]


class Node:
    """Everything a running node has. Made by `open_node`."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        fetcher: ChunkFetcher,
        opener: ImageOpener,
        mounts: Mounts,
        sources: Sources,
    ) -> None:
        self._config = config
        self._pool = pool
        self._fetcher = fetcher
        self._opener = opener
        self.mounts = mounts
        self._sources = sources
        self._platform = Platform.for_machine(os.uname().machine)
        self._started = time.monotonic()
        self.busy = 0
        """requests in progress that keep an ephemeral node alive"""
        self.last_use = trio.current_time()

    def status(self) -> dict[str, Any]:
        """The document of `p2pgz status --json` (docs/reference/control-api.md); fields may be added, never renamed."""
        counters = self._fetcher.counters
        return {
            "node": {
                "peer_id": None,
                "addrs": [],
                "uptime_seconds": time.monotonic() - self._started,
                "version": __version__,
                "pid": os.getpid(),
            },
            "peers": [],
            "mounts": self.mounts.status(),
            "pool": self._pool_status(),
            "sources": {
                "pool": {"chunks": counters.pool_chunks, "bytes": counters.pool_bytes},
                "peer": {"chunks": 0, "bytes": 0},
                "registry": {
                    "chunks": counters.registry_chunks,
                    "bytes": counters.registry_bytes,
                    **self._sources.totals(),
                },
            },
        }

    def _pool_status(self) -> dict[str, Any]:
        space = os.statvfs(self._pool.directory)
        return {
            **dataclasses.asdict(self._pool.stats()),
            "path": str(self._pool.directory),
            "free_bytes": space.f_bavail * space.f_frsize,
        }

    async def mount(self, request: MountRequest, progress: Progress) -> dict[str, Any]:
        """Open the image, start its file system and leave the mount's descriptor for the command."""
        if request.mode == "erofs":
            raise UsageError("--mode erofs is not available", hint="use --mode auto or --mode tree")
        async with self._in_use():
            image = await self._open(request, progress)
            defaults = self._config.mount
            options = MountOptions(
                directory=request.directory,
                suid=request.suid or defaults.suid,
                dev=request.dev or defaults.dev,
                context=request.context or defaults.context,
                fill=self._config.fetch.fill if request.fill is None else request.fill,
            )
            mounted = await self.mounts.mount(image, options)
            return {
                "id": mounted.id,
                "token": mounted.token,
                "reference": image.reference,
                "digest": str(image.digest),
                "dir": request.directory,
                "mode": "tree",
                "bytes": image.tree.total_bytes,
                "warnings": image.warnings,
            }

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
        async with self._in_use():
            image = await self._open(request, progress)
            rows = list_directory(image.tree, os.fsencode(request.path or "/"), recursive=request.recursive)
            return {"lines": format_rows(rows), "entries": [row.to_json() for row in rows]}

    async def read_file(self, request: MountRequest) -> AsyncIterator[memoryview]:
        """The bytes of one file."""
        async with self._in_use():
            image = await self._open(request, _silent)
            async for piece in files.read_path(image, self._fetcher, os.fsencode(request.path)):
                yield piece

    async def read_digest(self, request: GetRequest) -> AsyncIterator[bytes]:
        """A chunk, TOC, manifest or config that is here, or can be fetched because its image is known here."""
        digest = Digest.parse(request.digest)
        async with self._in_use():
            yield await files.read_digest(self._pool, self._fetcher, digest)

    async def verify(self, request: VerifyRequest, progress: Progress) -> dict[str, Any]:
        """Hash everything of an image again."""
        async with self._in_use():
            if request.directory and not request.reference:
                image = self.mounts.image_at(request.directory)
                return await verify_image(image, self._pool, self._fetcher, fetch=False, progress=progress)
            image = await self._open(request, progress)
            return await verify_image(image, self._pool, self._fetcher, fetch=True, progress=progress)

    async def _open(self, request: MountRequest, progress: Progress) -> OpenImage:
        reference = parse_reference(request.reference)
        source = await self._sources.get(reference, request)
        return await self._opener.open(
            reference,
            source,
            platform=Platform.parse(request.platform) if request.platform else self._platform,
            allow_unverified_toc=request.allow_unverified_toc,
            progress=progress,
        )

    @asynccontextmanager
    async def _in_use(self) -> AsyncIterator[None]:
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.last_use = trio.current_time()

    async def linger(self, seconds: float) -> None:
        """Return once nothing has been mounted, opened or asked for `seconds` (what an ephemeral node waits for)."""
        while True:
            if self.mounts.count or self.busy:
                self.last_use = trio.current_time()
            left = self.last_use + seconds - trio.current_time()
            if left <= 0:
                return
            await trio.sleep(min(left, 0.5) if self.mounts.count or self.busy else left)


class Sources:
    """The open registry clients: one for each way to a repository, kept for its connections and tokens."""

    def __init__(self, config: Config, stack: AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._open: dict[tuple[object, ...], RegistrySource | LayoutSource] = {}

    async def get(self, reference: Reference, request: MountRequest) -> RegistrySource | LayoutSource:
        """A source for the reference as the request wants to reach it."""
        registry = self._config.registry
        options = RegistryOptions(
            plain_http=request.plain_http or reference.host in registry.plain_http,
            ca_file=request.ca_file or registry.ca_file,
            hosts_dir=request.hosts_dir or registry.hosts_dir,
            docker_config=registry.docker_config,
            user=request.user or None,
        )
        # an archive that was replaced is another one; images of the old one keep reading from the old file
        version = Path(reference.path).stat().st_mtime_ns if Path(reference.path).is_file() else 0
        key = (reference.transport, reference.host, reference.repository, reference.path, version, options)
        source = self._open.get(key)
        if source is None:
            source = await self._stack.enter_async_context(open_source(reference, options))
            self._open[key] = source
        return source

    def totals(self) -> dict[str, int]:
        """Requests and received bytes of all registries."""
        stats = [source.stats for source in self._open.values() if isinstance(source, RegistrySource)]
        return {
            "requests": sum(s.requests for s in stats),
            "wire_bytes": sum(s.received_bytes for s in stats),
        }


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_node(config: Config, state_path: Path, run_path: Path) -> AsyncIterator[Node]:
    """A node that answers on its sockets until the context ends; raises StateError when the state cannot be used."""
    prepare_directories(state_path, run_path)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            Pool.open(state_path, boot_id=boot_id(), check_filesystem=config.pool.check_filesystem)
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        host = await stack.enter_async_context(FsHost.open(run_path))
        fetcher = ChunkFetcher(
            pool,
            nursery,
            connections=config.registry.connections,
            fill_bytes_per_second=config.fetch.fill_bytes_per_second,
            read_deadline_seconds=config.fetch.read_deadline_seconds,
        )
        opener = ImageOpener(pool, fetcher, state_path)
        mounts = Mounts(host, fetcher, nursery, config.fetch)
        node = Node(config, pool, fetcher, opener, mounts, Sources(config, stack))
        api, descriptors = unix.listen(run_path / API_SOCKET), unix.listen(run_path / DESCRIPTOR_SOCKET)
        await nursery.start(unix.serve, api, handler(create_app(node)))
        await nursery.start(unix.serve, descriptors, node.hand_over)
        log.info("node.ready", state=str(state_path), pid=os.getpid())
        yield node
        nursery.cancel_scope.cancel()


def boot_id() -> str:
    """Names this boot of the machine: what was verified in another one is verified again."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def prepare_directories(state_path: Path, run_path: Path) -> None:
    """Make the directories, for the owner only; raises ConfigError that says which one cannot be made."""
    for path in (state_path, run_path):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be made: {error.strerror}", hint="choose another one with --state-dir"
            ) from error


async def run_node(config: Config, state_path: Path, run_path: Path, ephemeral: bool, tell: Tell) -> None:
    """Run until SIGTERM or SIGINT, or, when ephemeral, until nothing is mounted any more. A second signal ends at once."""
    async with open_node(config, state_path, run_path) as node:
        tell({"event": "ready", "pid": os.getpid()})
        async with trio.open_nursery() as nursery:
            if ephemeral:

                async def end_when_idle() -> None:
                    await node.linger(config.node.ephemeral_linger_seconds)
                    log.info("node.idle")
                    nursery.cancel_scope.cancel()

                nursery.start_soon(end_when_idle)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    log.info("node.stopping", signal=signal.Signals(number).name)
                    break
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            nursery.cancel_scope.cancel()
