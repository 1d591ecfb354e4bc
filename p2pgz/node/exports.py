"""Images in files: `p2pgz export`, `import` and `inventory`, for hosts that reach neither a registry nor a peer.

The `Exports` of the control API. Joins what knows images (`image.exporting`, `image.importing`) with pool, policy and peers.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.inventory import read_inventory, write_inventory
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.platform import Platform
from p2pgz.core.ports import Holder
from p2pgz.core.reference import Reference, parse_reference
from p2pgz.errors import ConfigError, ImageNotFound, UsageError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Shares
from p2pgz.image.exporting import LeaveOut, inventory, plan_export, write_export
from p2pgz.image.importing import ImageImport
from p2pgz.image.open import ImageOpener
from p2pgz.image.opened import OpenImage
from p2pgz.node.upkeep import Upkeep
from p2pgz.pool.catalog import ImageRecord
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN, Segment
from p2pgz.web.api import MountRequest, Progress, Warn
from p2pgz.web.exports import ExportRequest, ImportRequest, InventoryRequest

log = structlog.get_logger(component="node")

IMPORT_OWNER: Final = "import"
"""who pins an image while it comes in"""
# Bitmaps of a layer come within a round trip of asking for them
BITMAPS_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 0.05

Open = Callable[[MountRequest, Progress], Awaitable[OpenImage]]
InUse = Callable[[], AbstractAsyncContextManager[None]]
AddressesOf = Callable[[bytes], tuple[bytes, ...]]
"""where a connected peer listens, as far as that is known"""


class Exports:
    """One per node. `open_image` opens as for a mount; `in_use` keeps a node that a command has started."""

    def __init__(
        self,
        pool: Pool,
        fetcher: ChunkFetcher,
        opener: ImageOpener,
        shares: Shares,
        upkeep: Upkeep,
        *,
        open_image: Open,
        platform_of: Callable[[MountRequest], Platform],
        in_use: InUse,
        addresses_of: AddressesOf,
    ) -> None:
        self._pool = pool
        self._fetcher = fetcher
        self._opener = opener
        self._shares = shares
        self._upkeep = upkeep
        self._open_image = open_image
        self._platform_of = platform_of
        self._in_use = in_use
        self._addresses_of = addresses_of

    async def export(self, request: ExportRequest, other_side: bytes, warn: Warn) -> AsyncIterator[bytes]:
        """The bytes of an image's file, without what is in the inventory `other_side`, or what a peer has."""
        async with self._in_use():
            reference = parse_reference(request.reference)
            name = _name(reference, request.name)
            fields = msgspec.structs.asdict(request)
            for other in ("name", "peer", "inventory_name"):
                del fields[other]
            opening = MountRequest(**fields)
            known: frozenset[bytes] = frozenset()
            if other_side:
                known = await trio.to_thread.run_sync(
                    lambda: read_inventory(other_side, name=request.inventory_name)
                )
            image = await self._open_image(opening, _silent)
            for warning in image.warnings:
                warn(warning)
            leave_out: LeaveOut = lambda segment, n, digest: digest in known  # noqa: E731
            if request.peer:
                is_peer = await peer_named(request.peer, self._addresses_of)
                leave_out = await self._what_peer_has(image, request.peer, is_peer)
            export = await plan_export(
                image,
                reference,
                name,
                self._platform_of(opening),
                pool=self._pool,
                shares=self._shares,
                layers=self._opener.layers,
                leave_out=leave_out,
            )
            log.info(
                "export.begins",
                reference=str(reference),
                chunks=export.head.chunks,
                left_out=export.head.left_out_chunks,
            )
            async for piece in write_export(export, self._pool, self._fetcher):
                yield piece

    async def _what_peer_has(
        self, image: OpenImage, name: str, is_peer: Callable[[PeerId], bool]
    ) -> LeaveOut:
        """By the bitmaps of a connected peer: its chunks of these layers, not what it has of them in others."""
        holders: dict[Segment, Holder] = {}
        with trio.move_on_after(BITMAPS_SECONDS):
            while True:
                for segment in image.layers:
                    origin = self._fetcher.origin(segment)
                    for holder in self._fetcher.holders(origin) if origin is not None else ():
                        if is_peer(holder.peer):
                            holders[segment] = holder
                if len(holders) == len(image.layers):
                    break
                await trio.sleep(LOOK_SECONDS)
        peers = sorted({str(holder.peer) for holder in holders.values()})
        if len(peers) > 1:
            raise UsageError(
                f"{name}: there are several peers: {', '.join(peers)}", hint="name one by its id"
            )
        if not holders:
            raise ImageNotFound(
                f"{name}: no file, and no connected peer of that name has anything of {image.reference}",
                hint="`p2pgz status` lists the peers; or carry the other side's `p2pgz inventory` here",
            )
        return lambda segment, n, digest: segment in holders and holders[segment].has(n)

    @asynccontextmanager
    async def importing(self, request: ImportRequest) -> AsyncIterator[_Import]:
        """A file on its way in; leaving without `finish` gives the image up."""
        expected = Digest.parse(request.digest, where="--digest") if request.digest else None
        async with self._in_use():
            coming = _Import(self._pool, self._upkeep)
            coming.image = ImageImport(
                request.name,
                pool=self._pool,
                fetcher=self._fetcher,
                opener=self._opener,
                shares=self._shares,
                keep=coming.keep,
                expected=expected,
            )
            try:
                yield coming
            finally:
                with trio.CancelScope(shield=True):  # some rows of the index
                    await coming.let_go()

    async def inventory(self, request: InventoryRequest, warn: Warn) -> AsyncIterator[bytes]:
        """What this pool has that any image may take chunks from."""
        async with self._in_use():
            every = [
                segment
                for image in self._pool.heat()
                if (segment := self._pool.segment_of_row(image[0])) is not None
            ]
            pieces = await trio.to_thread.run_sync(
                lambda: list(write_inventory(inventory(self._pool, SHARED_DOMAIN, every)))
            )
            for piece in pieces:
                yield piece


class _Import:
    """One file on its way in, and what keeps its image from eviction meanwhile."""

    image: ImageImport

    def __init__(self, pool: Pool, upkeep: Upkeep) -> None:
        self._pool = pool
        self._upkeep = upkeep
        self._kept: tuple[Digest, str] | None = None
        self._is_new = False

    async def feed(self, data: bytes) -> None:
        """The next bytes."""
        await self.image.feed(data)

    async def finish(self, progress: Progress) -> dict[str, Any]:
        """The file has ended: the image is whole, and stays until it is unpinned, or this raises."""
        image = await self.image.finish()
        await self._upkeep.pin(image)
        self._is_new = False
        log.info("import.done", reference=image.reference, digest=str(image.digest))
        return self.image.summary(image)

    async def keep(self, manifest: Digest, segments: list[Segment]) -> None:
        """Nothing of the image is evicted from now on."""
        catalog = self._pool.catalog
        for pin in catalog.pins(IMPORT_OWNER):  # of one that a crash has interrupted
            await catalog.unpin(pin.manifest, owner=IMPORT_OWNER)
        domain = segments[0].domain if segments else SHARED_DOMAIN
        self._is_new = not catalog.images(manifest)
        self._kept = manifest, domain
        if self._is_new:
            await catalog.put_image(
                ImageRecord(
                    manifest=manifest,
                    reference="",
                    tree_path="",
                    segments=tuple(segment.id for segment in segments),
                    created=time.time(),
                    domain=domain,
                )
            )
        await catalog.pin(manifest, "", time.time(), owner=IMPORT_OWNER)

    async def let_go(self) -> None:
        """The import is over, however it ended."""
        if self._kept is None:
            return
        manifest, domain = self._kept
        await self._pool.catalog.unpin(manifest, owner=IMPORT_OWNER)
        if self._is_new:
            await self._pool.catalog.remove_image(manifest, domain=domain)


async def peer_named(text: str, addresses_of: AddressesOf) -> Callable[[PeerId], bool]:
    """Whether a peer is the one that somebody means: by its id, or by its host with or without a port."""
    try:
        wanted = PeerId.parse(text)
    except ConfigError:
        pass
    else:
        await trio.lowlevel.checkpoint()
        return lambda peer: peer == wanted
    host, port = text, 0
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:]+)):(\d{1,5})", text)
    if match is not None:
        host, port = match[1] or match[2], int(match[3])
    try:
        found = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_STREAM)
    except OSError as error:
        raise ImageNotFound(
            f"{text}: no file, no peer id, and no host: {error.strerror or error}",
            hint="--missing-from takes an inventory, or a connected peer by its id or address",
        ) from error
    hosts = {str(entry[4][0]) for entry in found}

    def is_peer(peer: PeerId) -> bool:
        places = [PeerAddress.from_bytes(raw) for raw in addresses_of(peer.raw)]
        return any(place.host in hosts and port in (0, place.port) for place in places)

    return is_peer


def _name(reference: Reference, text: str) -> Reference:
    """What an image is to be called on the other side."""
    name = parse_reference(text) if text else reference
    if name.transport != "registry":
        raise UsageError(
            f"{name}: the other side needs a name as a registry would have it",
            hint="give one with --as NAME:TAG",
        )
    return name


async def _silent(_: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()
