"""The mounts of a node: each with its `fs` process, written down for the next node, taken up again from the last one.

A mount's life ends with its FUSE session, never with our bookkeeping: whoever unmounts it, however, ends the `fs` process
and the holder's interest in it, and that is all we look at. Everything else that ends an `fs` costs its readers a wait.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import trio

from p2pgz import __version__
from p2pgz.config import FetchConfig
from p2pgz.errors import ImageNotFound, MountUnavailable, P2pgzError, StateError
from p2pgz.fetch.background import calm, fill
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.mount.records import MountDocument, MountOptions, from_record, to_record
from p2pgz.mount.relink import mount_id_of
from p2pgz.mount.roster import listening, weeded
from p2pgz.mount.servers import EROFS, Served, Servers
from p2pgz.mount.session import FsSession
from p2pgz.mount.setup import READ_AHEAD_COMPLETE_KB
from p2pgz.mount.shutdown import system_is_stopping
from p2pgz.mount.umount import is_ours, top_mount
from p2pgz.pool.catalog import Catalog, MountRecord
from p2pgz.pool.segment import Segment

__all__ = ["Mount", "MountDocument", "MountOptions", "Mounts"]

log = structlog.get_logger(component="mount")

# A command that has asked for a mount fetches its descriptor within milliseconds; one that died never does
CLAIM_SECONDS = 30.0

OpenKnown = Callable[[MountRecord, MountDocument], Awaitable[OpenImage]]
"""opens the image of a recorded mount without a request to anybody"""


@dataclass(slots=True, kw_only=True, eq=False)
class Mount(Served):
    """One mounted image."""

    id: str
    token: str
    image: OpenImage
    options: MountOptions
    session: FsSession
    restarts: int = 0
    """how often another process had to take over"""
    ended: trio.Event = field(default_factory=trio.Event)
    claimed: bool = False
    changing: trio.Lock = field(default_factory=trio.Lock)
    """held while its process is exchanged"""


class Mounts:
    """All mounts of this node, by id."""

    def __init__(
        self,
        servers: Servers,
        catalog: Catalog,
        fetcher: ChunkFetcher,
        nursery: trio.Nursery,
        config: FetchConfig,
        boot_id: str,
    ) -> None:
        self._servers = servers
        self._catalog = catalog
        self._fetcher = fetcher
        self._nursery = nursery
        self.config = config
        self._boot_id = boot_id
        self._mounts: dict[str, Mount] = {}
        self._recovering: dict[str, MountRecord] = {}
        self._lost: dict[str, dict[str, Any]] = {}  # by directory
        self.strangers: list[Path] = []  # sockets of processes that could not be taken over
        self._recovered = False

    @property
    def count(self) -> int:
        """How many are alive, those included that are being taken over."""
        return len(self._mounts) + len(self._recovering)

    def prepare(self, mode: str) -> None:
        """A mount is about to be asked for: the process that will serve it starts while the image is opened."""
        self._nursery.start_soon(self._servers.prepare, mode)

    async def mount(
        self,
        image: OpenImage,
        options: MountOptions,
        request: dict[str, Any] | None = None,
        *,
        here: bool = False,
        replaces: str = "",
    ) -> Mount:
        """Start a file system for the image; the command fetches its descriptor with `take`, unless it is mounted `here`,
        in the node's own mount namespace. `request` is kept for the node that comes after this one; the record of the
        mount that this one `replaces` is not."""
        served = Served(secrets.token_hex(8), image, options)
        document = MountDocument(
            reference=image.reference, options=options, request=request or {}, boot_id=self._boot_id
        )
        await self._catalog.put_mount(to_record(served.id, image.digest, document))
        try:
            if here:
                session = await self._servers.mount_here(served, replaces=bool(replaces))
            else:
                session = await self._servers.start(served)
        except BaseException:
            with (
                trio.CancelScope(shield=True),
                suppress(P2pgzError),
            ):  # one row; the next start would remove it too
                await self._catalog.remove_mount(served.id)
            raise
        self._lost.pop(options.directory, None)
        if replaces:
            await self._catalog.remove_mount(replaces)
        return self._add(served, session, attached=session.mount_fd < 0)

    def _add(self, served: Served, session: FsSession, *, attached: bool) -> Mount:
        mounted = Mount(
            id=served.id,
            token="" if attached else secrets.token_urlsafe(16),
            image=served.image,
            options=served.options,
            mode=served.mode,
            mode_reason=served.mode_reason,
            startup=served.startup,
            session=session,
            claimed=attached,
        )
        self._mounts[mounted.id] = mounted
        self._nursery.start_soon(self._live, mounted)
        self._nursery.start_soon(self._note_mounted, mounted)
        return mounted

    async def _note_mounted(self, mounted: Mount) -> None:
        try:
            await self._catalog.note_mounted(mounted.image.segments, time.time())
        except P2pgzError as error:  # costs nothing but the order of eviction
            log.info("mount.not_noted", reason=str(error))

    async def _live(self, mounted: Mount) -> None:
        """Owns everything that runs for one mount, until it has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expect_claim, mounted)
            if mounted.startup is not None:
                nursery.start_soon(mounted.startup.run)
            if mounted.options.fill:

                async def fill_all() -> None:
                    requests = lambda: mounted.session.stats.requests  # noqa: E731
                    await calm(requests, delay_seconds=self.config.fill_delay_seconds)
                    await fill(self._fetcher, mounted.image.segments)
                    mounted.session.set_read_ahead(READ_AHEAD_COMPLETE_KB)

                nursery.start_soon(fill_all)
            await self._serve(mounted)
            nursery.cancel_scope.cancel()
        del self._mounts[mounted.id]
        mounted.ended.set()
        await self._note_end(mounted)

    async def _serve(self, mounted: Mount) -> None:
        """Keep the mount served until it is unmounted or lost."""
        while True:
            session = mounted.session
            await session.wait_closed()
            async with mounted.changing:
                if mounted.session is not session:
                    continue
                if session.options.socket_path:
                    Path(session.options.socket_path).unlink(missing_ok=True)
                if session.exit_status == 0 and not session.is_draining:
                    return
                successor = await self._servers.revive(mounted)
                if successor is None:
                    return
                log.warning(
                    "fs.ended",
                    directory=mounted.options.directory,
                    pid=session.pid,
                    status=session.exit_status,
                    successor=successor.pid,
                )
                mounted.session = successor
                mounted.restarts += 1

    async def _note_end(self, mounted: Mount) -> None:
        directory = mounted.options.directory
        left = top_mount(directory) if directory else None
        others = any(other.options.directory == directory for other in self._mounts.values())
        if left is not None and is_ours(left) and not others:
            error = MountUnavailable(
                f"{directory}: its file system process and the holder are gone",
                hint="`p2pgz mount` it there again",
            )
            if mounted.mode == EROFS:
                error = MountUnavailable(
                    f"{directory}: the process that fetches its missing bytes is gone",
                    hint="`p2pgz umount` it, then mount it again",
                )
            log.error("mount.lost", reference=mounted.image.reference, directory=directory, reason=str(error))
            self._lost[directory] = {**self._describe(mounted), "state": "lost", "error": str(error)}
            return  # its record stays: a persistent one is mounted again at the next start
        log.info("mount.ended", reference=mounted.image.reference, directory=directory)
        if not (mounted.options.persist and await system_is_stopping()):
            await self._catalog.remove_mount(mounted.id)

    async def _expect_claim(self, mounted: Mount) -> None:
        await trio.sleep(CLAIM_SECONDS)
        if not mounted.claimed:
            log.warning("mount.unclaimed", reference=mounted.image.reference)
            mounted.session.drop_mount_fd()

    async def recover(self, open_known: OpenKnown) -> list[tuple[MountRecord, MountDocument]]:
        """Take over what an earlier node mounted and is still there; returns what is to be mounted again."""
        sockets: dict[str, list[Path]] = {}
        for path in self._servers.orphans():
            sockets.setdefault(mount_id_of(path), []).append(path)
        held = await self._servers.held()
        gone: list[tuple[MountRecord, MountDocument]] = []
        async with trio.open_nursery() as nursery:
            for record in self._catalog.mounts():
                paths = sockets.pop(record.id, [])
                try:
                    document = from_record(record)
                except StateError as error:
                    log.error("mount.record_unusable", directory=record.directory, reason=str(error))
                    self.strangers += listening(paths)
                    continue
                self._recovering[record.id] = record
                nursery.start_soon(
                    self._recover, record, document, paths, record.id in held, open_known, gone
                )
        for path in weeded([path for paths in sockets.values() for path in paths]):
            self.strangers.append(path)
            log.warning(
                "mount.unknown", socket=str(path), effect="it serves what it has until it is unmounted"
            )
        self._recovered = True
        return gone

    async def _recover(
        self,
        record: MountRecord,
        document: MountDocument,
        paths: list[Path],
        held: bool,
        open_known: OpenKnown,
        gone: list[tuple[MountRecord, MountDocument]],
    ) -> None:
        try:
            if (held or paths) and await self._recover_one(record, document, paths, open_known):
                return
            if self._is_to_be_mounted_again(document):
                gone.append((record, document))
            else:
                await self._catalog.remove_mount(record.id)
        except P2pgzError as error:
            self.strangers += listening(paths)
            log.error("mount.not_recovered", directory=record.directory, reason=str(error))
        finally:
            del self._recovering[record.id]

    def _is_to_be_mounted_again(self, document: MountDocument) -> bool:
        """A persistent one after a reboot, any whose dead mount is still there; not what was unmounted without a node."""
        if document.boot_id != self._boot_id:
            return document.options.persist
        left = top_mount(document.options.directory) if document.options.directory else None
        return left is not None and is_ours(left)

    async def _recover_one(
        self, record: MountRecord, document: MountDocument, paths: list[Path], open_known: OpenKnown
    ) -> bool:
        """Take over the process of a mount, or give it a new one; false when the mount is gone."""
        image = await open_known(record, document)
        served = Served(record.id, image, document.options)
        session = None
        for path in paths:
            try:
                session = await self._servers.reattach(served, path)
            except P2pgzError as error:
                log.warning("fs.not_taken_over", directory=record.directory, reason=str(error))
                if alive := listening([path]):
                    self.strangers += alive  # its socket stays: that is how its end is noticed
                else:
                    path.unlink(missing_ok=True)
        restarted = session is None
        if session is None:
            session = await self._servers.revive(served)
        if session is None:
            return False
        mounted = self._add(served, session, attached=True)
        mounted.restarts = int(restarted)
        log.info("mount.recovered", directory=record.directory, reference=image.reference, pid=session.pid)
        return True

    async def replace_all(self, *, only_other_versions: bool) -> int:
        """Exchange every `fs` process for a new one without its readers noticing; returns how many were."""
        count = 0
        for mounted in list(self._mounts.values()):
            async with mounted.changing:
                old = mounted.session
                if only_other_versions and old.options.version == __version__:
                    continue
                try:
                    mounted.session = await self._servers.replace(mounted, old)
                except P2pgzError as error:  # the old one ends, and `_serve` sees to its successor
                    log.error("fs.replace_failed", directory=mounted.options.directory, reason=str(error))
                    continue
                count += 1
        return count

    def segments(self) -> list[Segment]:
        """Those of all mounted images."""
        return [segment for mounted in self._mounts.values() for segment in mounted.image.segments]

    @property
    def settled(self) -> bool:
        """Whether what an earlier node mounted was taken over, as far as it can be."""
        return self._recovered and not self._recovering

    def take(self, token: str) -> tuple[Mount, int]:
        """The descriptor of a new mount, once; the caller closes it after sending. Raises ImageNotFound otherwise."""
        for mounted in self._mounts.values():
            if secrets.compare_digest(mounted.token, token) and not mounted.claimed:
                mounted.claimed = True
                return mounted, mounted.session.take_mount_fd()
        raise ImageNotFound("no mount waits under this token")

    async def wait(self, mount_id: str) -> None:
        """Return when the mount has ended (at once if it has)."""
        mounted = self._mounts.get(mount_id)
        if mounted is not None:
            await mounted.ended.wait()

    def image_at(self, directory: str) -> OpenImage:
        """The image that is mounted at a directory."""
        for mounted in self._mounts.values():
            if mounted.options.directory == directory:
                return mounted.image
        raise ImageNotFound(
            f"{directory}: this node has no image mounted there", hint="`p2pgz status` lists the mounts"
        )

    def has(self, directory: str) -> bool:
        """Whether an image is mounted at a directory, or is being taken over there."""
        return any(mounted.options.directory == directory for mounted in self._mounts.values()) or any(
            record.directory == directory for record in self._recovering.values()
        )

    def status(self) -> list[dict[str, Any]]:
        """One document per mount, for `p2pgz status`."""
        documents = [self._describe(mounted) for mounted in self._mounts.values()]
        for directory, document in list(self._lost.items()):
            left = top_mount(directory)
            if left is None or not is_ours(left) or self.has(directory):
                del self._lost[directory]
            else:
                documents.append(document)
        return documents

    def _describe(self, mounted: Mount) -> dict[str, Any]:
        image = mounted.image
        present, total = image.present_bytes, image.chunk_bytes
        return {
            "id": mounted.id,
            "ref": image.reference,
            "digest": str(image.digest),
            "stale_since": image.stale_since,
            "dir": mounted.options.directory,
            "mode": mounted.mode,
            "mode_reason": mounted.mode_reason,
            "bytes": total,
            "present_bytes": present,
            "sources": self._fetcher.trace.bytes_from(image.segments, present),
            "state": "complete" if present >= total else "lazy",
            "startup": mounted.startup.status() if mounted.startup is not None else None,
            "persist": mounted.options.persist,
            "pid": mounted.session.pid,
            "restarts": mounted.restarts,
        }
