"""The mounts of a node: starts a file system for each, hands its descriptor to the command, and notices its end.

A mount's life ends with its FUSE session, never with our bookkeeping: whoever unmounts it, however, ends the `fs` process,
and that is all we look at.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from p2pgz.config import FetchConfig
from p2pgz.core.schedule import Priority
from p2pgz.errors import ImageNotFound
from p2pgz.fetch.background import fill, prefetch
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.open import OpenImage
from p2pgz.mount.session import FsHost, FsSession, SegmentFiles, SessionOptions

log = structlog.get_logger(component="mount")

# A command that has asked for a mount fetches its descriptor within milliseconds; one that died never does
CLAIM_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """What the user chose for one mount."""

    directory: str
    suid: bool = False
    dev: bool = False
    context: str = ""
    fill: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class Mount:
    """One mounted image."""

    id: str
    token: str
    image: OpenImage
    options: MountOptions
    session: FsSession
    ended: trio.Event = field(default_factory=trio.Event)
    claimed: bool = False


class Mounts:
    """All mounts of this node, by id."""

    def __init__(
        self, host: FsHost, fetcher: ChunkFetcher, nursery: trio.Nursery, config: FetchConfig
    ) -> None:
        self._host = host
        self._fetcher = fetcher
        self._nursery = nursery
        self._config = config
        self._mounts: dict[str, Mount] = {}

    @property
    def count(self) -> int:
        """How many are alive."""
        return len(self._mounts)

    async def mount(self, image: OpenImage, options: MountOptions) -> Mount:
        """Start a file system for the image; the command fetches its descriptor with `take`."""
        segments = [
            SegmentFiles(
                table_path=segment.table_path,
                data_path=segment.path,
                presence_fd=segment.presence.fd,
                presence_count=segment.presence.count,
            )
            for segment in image.segments
        ]

        async def ensure(segment_index: int, first: int, count: int, priority: int) -> None:
            await self._fetcher.ensure(image.segments[segment_index], first, count, Priority(priority))

        session = await self._host.start_session(
            SessionOptions(
                tree_path=image.tree_path,
                segments=segments,
                source_name=image.reference,
                directory=options.directory,
                suid=options.suid,
                dev=options.dev,
                context=options.context,
                read_deadline_seconds=self._config.read_deadline_seconds,
            ),
            ensure,
        )
        attached = session.mount_fd < 0  # not root: fusermount3 has put it at the directory already
        mounted = Mount(
            id=secrets.token_hex(8),
            token="" if attached else secrets.token_urlsafe(16),
            image=image,
            options=options,
            session=session,
            claimed=attached,
        )
        self._mounts[mounted.id] = mounted
        self._nursery.start_soon(self._live, mounted)
        return mounted

    async def _live(self, mounted: Mount) -> None:
        """Owns everything that runs for one mount, until its session ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expect_claim, mounted)
            for segment, end in mounted.image.prefetch:
                nursery.start_soon(prefetch, self._fetcher, segment, end)
            if mounted.options.fill:
                delay = self._config.fill_delay_seconds

                async def fill_all() -> None:
                    await fill(self._fetcher, mounted.image.segments, delay_seconds=delay)

                nursery.start_soon(fill_all)
            await mounted.session.wait_closed()
            nursery.cancel_scope.cancel()
        del self._mounts[mounted.id]
        mounted.ended.set()
        log.info("mount.ended", reference=mounted.image.reference, directory=mounted.options.directory)

    async def _expect_claim(self, mounted: Mount) -> None:
        await trio.sleep(CLAIM_SECONDS)
        if not mounted.claimed:
            log.warning("mount.unclaimed", reference=mounted.image.reference)
            mounted.session.drop_mount_fd()

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

    def status(self) -> list[dict[str, Any]]:
        """One document per mount, for `p2pgz status`."""
        documents = []
        for mounted in self._mounts.values():
            image = mounted.image
            present, total = image.present_bytes, image.chunk_bytes
            documents.append(
                {
                    "id": mounted.id,
                    "ref": image.reference,
                    "digest": str(image.digest),
                    "dir": mounted.options.directory,
                    "mode": "tree",
                    "bytes": total,
                    "present_bytes": present,
                    "state": "complete" if present >= total else "lazy",
                }
            )
        return documents
