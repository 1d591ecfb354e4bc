"""Gives each mount an `fs` process, and another one when that dies, hangs or is replaced. Called by `mounts`.

What a reader sees is decided here: as long as the holder has the mount's descriptor, a dead process costs a wait. Only when
the holder lost it too, or the kernel cannot send requests again, readers get an error, and the mount is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import trio

from p2pgz.core.schedule import Priority
from p2pgz.errors import MountUnavailable, P2pgzError, ResendUnavailable, StateError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.mount.attach import move_mount
from p2pgz.mount.erofs_mode import ErofsMode
from p2pgz.mount.held import HolderClient
from p2pgz.mount.kernel import can_resend, no_resend
from p2pgz.mount.records import MountOptions
from p2pgz.mount.session import Ensure, FsHost, FsSession, SegmentFiles, SessionOptions
from p2pgz.mount.startup import ImageStartUp, StartUps
from p2pgz.mount.umount import check_mount_point, clear_dead_mount
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="mount")

TREE: Final = "tree"
EROFS: Final = "erofs"
DRAIN_SECONDS: Final = 5.0
RETRY_START_SECONDS: Final = 0.1
RETRY_MAX_SECONDS: Final = 5.0  # the holder gives the mount up after a minute without success


@dataclass(slots=True, eq=False)
class Served:
    """One mount from the point of view of its processes."""

    id: str
    image: OpenImage
    options: MountOptions
    mode: str = TREE
    mode_reason: str = ""
    """why it is tree mode"""
    startup: ImageStartUp | None = None
    """set when it is first served"""


class Servers:
    """Starts and restarts `fs` processes. `resend` false: never rely on the kernel's sending requests again."""

    def __init__(
        self,
        host: FsHost,
        holder: HolderClient,
        fetcher: ChunkFetcher,
        *,
        read_deadline_seconds: float,
        resend: bool,
        startups: StartUps,
        erofs: ErofsMode | None = None,
    ) -> None:
        self._host = host
        self._holder = holder
        self._fetcher = fetcher
        self._read_deadline_seconds = read_deadline_seconds
        self._resend = resend
        self._startups = startups
        self._erofs = erofs
        self._rosters = [host.roster] if erofs is None else [host.roster, erofs.roster]

    async def prepare(self, mode: str) -> None:
        """Begin what every mount in this mode needs."""
        if self._erofs is not None:
            await self._erofs.prepare(mode)

    async def start(self, served: Served, *, resume: bool = False, resend: bool = True) -> FsSession:
        """A process for a new mount, or with `resume` for one that the holder keeps."""
        startup = self._begin(served, record=not resume)
        if not resume:
            session = await self._start_erofs(served, startup)
            if session is not None:
                return session
        await self._holder.ensure()
        if resume and resend and not self._resend:
            raise no_resend()
        options = SessionOptions(
            tree_path=served.image.tree_path,
            segments=segment_files(served.image),
            source_name=served.image.reference,
            directory=served.options.directory,
            suid=served.options.suid,
            dev=served.options.dev,
            context=served.options.context,
            read_deadline_seconds=self._read_deadline_seconds,
            holder_path=self._holder.path,
            hold_id=served.id,
            observe=startup.records,
            resume=resume,
            resend=resend,
        )
        return await self._host.start_session(options, self._ensure(served.image), startup.observe)

    def _begin(self, served: Served, *, record: bool) -> ImageStartUp:
        """The start of its image, begun once for each mount."""
        if served.startup is None:
            served.startup = self._startups.begin(served.image, record=record)
        return served.startup

    async def _start_erofs(self, served: Served, startup: ImageStartUp) -> FsSession | None:
        """The mount in erofs mode; None when it is to be tree mode."""
        if self._erofs is None:
            return None
        wanted = served.options.mode
        decision = await self._erofs.decide(wanted)
        served.mode_reason = decision.reason
        if not decision.erofs:
            return None
        options = self._hosted_options(served, startup)
        try:
            session = await self._erofs.start(
                served.image, options, self._ensure(served.image), startup.observe
            )
        except P2pgzError as error:
            if wanted == EROFS:
                raise
            log.warning("erofs.not_used", reference=served.image.reference, reason=str(error))
            served.mode_reason = error.what
            return None
        served.mode = EROFS
        return session

    def _hosted_options(self, served: Served, startup: ImageStartUp) -> SessionOptions:
        return SessionOptions(
            tree_path=served.image.tree_path,
            segments=segment_files(served.image),
            source_name=served.image.reference,
            suid=served.options.suid,
            dev=served.options.dev,
            context=served.options.context,
            read_deadline_seconds=self._read_deadline_seconds,
            observe=startup.records,
            hold_id=served.id,
        )

    async def reattach(self, served: Served, socket_path: Path) -> FsSession:
        """Take over a process of an earlier node; raises MountUnavailable when it cannot go on."""
        await self._holder.ensure()
        self._begin(served, record=False)
        files = segment_files(served.image)

        async def adopt(options: SessionOptions) -> Sequence[SegmentFiles]:
            await trio.lowlevel.checkpoint()
            if [str(f.table_path) for f in files] != [str(f.table_path) for f in options.segments]:
                raise StateError("it serves another version of the image's tree")
            return files

        session = await self._host.reattach(socket_path, adopt, self._ensure(served.image))
        # a segment host has one FUSE descriptor for all its mounts: only in tree mode a mount names a holder
        served.mode = TREE if session.options.holder_path else EROFS
        return session

    async def revive(self, served: Served) -> FsSession | None:
        """Another process for a mount whose own is dead or does not answer; None when the mount has ended or is lost."""
        delay = RETRY_START_SECONDS
        while True:
            try:
                await self._holder.ensure()
                if served.id not in await self._ask_held():
                    if self._erofs is not None:
                        self._erofs.forget(served.id)
                    return None
                session = await self._resume(served)
            except ResendUnavailable as error:
                log.error("mount.cannot_resume", directory=served.options.directory, reason=str(error))
                return await self._mount_again(served)
            except P2pgzError as error:  # StateError in erofs mode: then it is not held any more
                log.error("fs.restart_failed", directory=served.options.directory, reason=str(error))
            else:
                return session
            await trio.sleep(delay)
            delay = min(delay * 2, RETRY_MAX_SECONDS)

    async def _resume(self, served: Served) -> FsSession:
        """The next process of a mount that is held."""
        if self._erofs is None or not self._erofs.is_hosted(served.id):
            await self._holder.kill(served.id)
            return await self.start(served, resume=True)
        served.mode = EROFS
        if not self._resend:
            raise no_resend()
        startup = self._begin(served, record=False)
        options = self._hosted_options(served, startup)
        return await self._erofs.resume(served.id, options, self._ensure(served.image), startup.observe)

    async def replace(self, served: Served, old: FsSession) -> FsSession:
        """A new process for a mount whose process is well. Where the kernel cannot send requests again, the old one is left
        to answer what it has read; it is not where the kernel can: what it waits for could outlast the next node."""
        if served.mode == EROFS:
            return await self._replace_host(served, old)
        drained = False
        if not (self._resend and can_resend()):
            with trio.move_on_after(DRAIN_SECONDS):
                await old.drain()
                drained = True
        if not drained:
            await self._holder.kill(served.id)
        session = await self.start(served, resume=True, resend=not drained)
        log.info("fs.replaced", directory=served.options.directory, pid=session.pid)
        return session

    async def _replace_host(self, served: Served, old: FsSession) -> FsSession:
        """The same for a mount in erofs mode; the first one of a host ends it for all of them."""
        if self._erofs is None or not self._erofs.is_hosted(served.id):
            raise MountUnavailable("an older version serves this mount, and cannot be replaced")
        if not (self._resend and can_resend()):
            raise no_resend()
        await self._erofs.retire(served.id, old.pid)
        session = await self._resume(served)
        log.info("fs.replaced", directory=served.options.directory, pid=session.pid)
        return session

    async def _mount_again(self, served: Served) -> FsSession | None:
        """End the mount, so that its readers get an error and not silence, and put a new one in its place."""
        try:
            record = self._erofs.client.record_of(served.id) if self._erofs is not None else None
            await self._holder.abort(record.host if record is not None else served.id)
            return await self.mount_here(served, replaces=True)
        except P2pgzError as error:
            log.error("mount.lost", directory=served.options.directory, reason=str(error))
            return None

    async def mount_here(self, served: Served, *, replaces: bool) -> FsSession:
        """Mount in the node's own mount namespace, in place of what a dead mount left there. `replaces`: one of this node's
        was there and is lost."""
        directory = served.options.directory
        await trio.to_thread.run_sync(_prepare_mount_point, directory, replaces, abandon_on_cancel=True)
        session = await self.start(served)
        if session.mount_fd >= 0:
            descriptor = session.take_mount_fd()
            try:
                await trio.to_thread.run_sync(move_mount, descriptor, directory)
            finally:
                os.close(descriptor)
        return session

    def _ensure(self, image: OpenImage) -> Ensure:
        async def ensure(segment_index: int, first: int, count: int, priority: int) -> dict[int, bytes]:
            return await self._fetcher.supply(image.segments[segment_index], first, count, Priority(priority))

        return ensure

    def is_mapped(self, segment: Segment) -> bool:
        """Whether a process may answer reads from a segment's file, or is about to."""
        return any(roster.is_mapped(segment.path) for roster in self._rosters)

    async def acknowledge(self, segment: Segment) -> None:
        """Return when no reply from bytes whose bits are cleared now is in flight. The caller sets a time limit."""
        for roster in self._rosters:
            await roster.quiesce(segment.path)

    def invalidate(self, segment: Segment, chunks: Sequence[int]) -> None:
        """Have kernels forget what they cached of chunks that were wrong on the disk."""
        for roster in self._rosters:
            roster.invalidate(segment.path, chunks)

    @property
    def reads(self) -> int:
        """Changes, within a second or two, when somebody reads what the page cache does not have."""
        return sum(roster.reads for roster in self._rosters)

    def orphans(self) -> list[Path]:
        """Sockets of processes that an earlier node left."""
        return self._host.orphans()

    async def held(self) -> set[str]:
        """Ids of the mounts that the holder keeps; empty when it does not answer."""
        with suppress(MountUnavailable):
            return await self._ask_held()
        return set()

    async def _ask_held(self) -> set[str]:
        held = set(await self._holder.held())
        return held if self._erofs is None else held | self._erofs.hosted(held)


def _prepare_mount_point(directory: str, replaces: bool) -> None:
    clear_dead_mount(directory, dead_erofs=replaces)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MountUnavailable(f"{directory}: {error.strerror}") from error
    check_mount_point(directory)


def segment_files(image: OpenImage) -> list[SegmentFiles]:
    """What an `fs` needs of the segments of an image, in the order of its tree."""
    return [
        SegmentFiles(
            table_path=segment.table_path,
            data_path=segment.path,
            presence_fd=segment.presence.fd,
            presence_count=segment.presence.count,
        )
        for segment in image.segments
    ]
