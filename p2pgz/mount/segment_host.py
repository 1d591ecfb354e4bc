"""The segment host: one process per node that serves segment files to the kernel's EROFS, and makes the EROFS mounts.

Forked by `zygote`; told of each mount over its own channel (`hosting`). Its FUSE mount is attached nowhere: only this
process can open the files, and only EROFS does. Lives on without a node while one of its mounts is alive, and is found by
the next node through the mounts' sockets (`relink`). When it is killed the holder has its /dev/fuse, and another process
goes on for its mounts (`HostPart.resume`); it makes no new ones, for nobody can reach the detached mount any more. The same
rules as for `fs`: never a network client, never a write to the pool, no file opened while a reader waits.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.mount import attach, erofs_mount, fs, hosting, kernel, relink, selftest, setup
from p2pgz.mount.hold import Hold, resume_mount
from p2pgz.mount.hosted import HostedMount, attach_presences
from p2pgz.mount.observed import FirstReads
from p2pgz.mount.segments import (
    UNUSED_FILES_KEPT,
    HostedLink,
    SegmentFile,
    SegmentOperations,
    User,
    WatchFile,
    map_file,
)
from p2pgz.mount.setup import Ready, SessionOptions

log = logging.getLogger("p2pgz.segments")

PROCESS_NAME: Final = b"p2pgz-segments"
MOUNT_THREADS: Final = 2
INVALIDATIONS_QUEUED: Final = 1024


class SegmentHost:
    """Everything that the process has."""

    def __init__(self, control: socket.socket, part: hosting.HostPart) -> None:
        self._control = control
        self._part = part
        self._hold = Hold(Path(os.fsdecode(part.holder_path)), part.name) if part.holder_path else None
        if part.resume:
            self._mount, greeting = resume_mount(self._hold), kernel.greeting()
        else:
            self._mount = attach.make_detached(source=PROCESS_NAME.decode())
            greeting = kernel.answer_init(self._mount.fuse_fd)
        door = kernel.LibfuseDoor(self._mount.fuse_fd, greeting)
        self.operations = SegmentOperations(on_init=door.open, resumes=part.resume)
        pyfuse3.init(self.operations, door.path, set())
        if self._hold is not None and not part.resume:
            self._hold.give(self._mount.fuse_fd, self._mount.device)
        self._by_path: dict[str, SegmentFile] = {}
        self._hosted: set[HostedMount] = set()
        self._channels = 0
        self._node_gone = False
        self._mounting = trio.Lock()
        self._threads = trio.CapacityLimiter(MOUNT_THREADS)
        self._spoiled, self._to_invalidate = trio.open_memory_channel[tuple[int, int, int]](
            INVALIDATIONS_QUEUED
        )
        self._nursery: trio.Nursery

    @property
    def device(self) -> int:
        """st_dev of the segment files."""
        return self._mount.device

    async def serve(self) -> None:
        """Until the node and all mounts are gone."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._answer_kernel)
            if self._hold is not None:
                nursery.start_soon(self._hold.keep)
            for _ in range(fs.INVALIDATION_THREADS):
                nursery.start_soon(self._invalidate)
            nursery.start_soon(self._take_channels)
        if self._hold is not None:
            self._hold.release()

    async def _answer_kernel(self) -> None:
        """Until the connection ends: the last mount of a host that resumed one, or the holder gave it up."""
        await pyfuse3.main(1, kernel.MAX_TASKS)
        for hosted in self._hosted:
            hosted.watch.released()  # the end of the connection may overtake the kernel's word about that
        self._nursery.cancel_scope.cancel()

    async def _take_channels(self) -> None:
        self._control.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(self._control)
            try:
                message, ancillary, _, _ = self._control.recvmsg(
                    16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                continue
            except OSError:
                break
            if not message:
                break
            for fd in relink.descriptors(ancillary):
                self._channels += 1
                self._nursery.start_soon(self._serve_channel, socket.socket(fileno=fd))
        self._node_gone = True
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        # one that resumed ends with its connection: the next node may tell it of mounts that it has not heard of yet
        if self._node_gone and not self._channels and not self._part.resume:
            self._nursery.cancel_scope.cancel()

    async def _serve_channel(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            hosted = None
            try:
                with trio.fail_after(fs.SETUP_SECONDS):
                    hosted = await self._open_channel(connection)
            except Exception as error:
                failure = error
                if not isinstance(error, P2pgzError):
                    log.exception("a mount could not be made")
                    failure = StateError(f"the segment host failed: {type(error).__name__}: {error}")
                assert isinstance(failure, P2pgzError)
                with suppress(OSError):
                    connection.send(setup.encode_failure(failure))
            if hosted is None:
                connection.close()
            else:
                await self._live(hosted, connection)
        finally:
            self._channels -= 1
            self._end_when_idle()

    async def _open_channel(self, connection: socket.socket) -> HostedMount | None:
        """Do what the channel asks for; None when there is nothing to keep."""
        with trio.socket.from_stdlib_socket(connection.dup()) as channel:
            datagram, _ = await relink.receive_raw(channel)
            opening = hosting.decode_opening(datagram)
            if isinstance(opening, hosting.SelfTestPart):
                tested = await selftest.run(self, os.fsdecode(opening.folder))
                await channel.send(hosting.encode(tested))
                return None
            assembler = setup.Assembler(with_fds=True)
            options = None
            while options is None:
                options = assembler.feed(*await relink.receive_raw(channel))
        if isinstance(opening, hosting.ResumePart):
            return self._resume(opening.hosted, options, connection)
        return await self._start(opening, options, connection)

    async def _start(
        self, opening: hosting.ErofsPart, options: SessionOptions, connection: socket.socket
    ) -> HostedMount:
        hosted = self._host(options, self.operations.next_ino())
        self.operations.add(hosted.watch)
        try:
            devices = []
            native = set(opening.native)
            for n, files in enumerate(options.segments):
                if n in native:
                    devices.append(os.fspath(files.data_path))
                    continue
                devices.append(self.path_of(self._use(hosted, n, self._file(files)).name))
            devices.append(self.path_of(hosted.watch.name))
            device_kb = (
                hosting.DEVICE_READ_AHEAD_COMPLETE_KB
                if opening.complete
                else hosting.DEVICE_READ_AHEAD_COLD_KB
            )
            mount = await self.make_mount(
                os.fsdecode(opening.metadata_path),
                devices,
                suid=options.suid,
                dev=options.dev,
                context=options.context,
                device_read_ahead_kb=device_kb,
            )
        except BaseException:
            self._forget(hosted)
            raise
        hosted.bdi_name = mount.bdi_name
        self._write_down(hosted, mount)
        self._set_read_ahead(
            hosted,
            hosting.FILES_READ_AHEAD_COMPLETE_KB if opening.complete else hosting.FILES_READ_AHEAD_COLD_KB,
        )
        message = setup.encode(Ready(os.getpid(), mount.device))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", mount.mount_fd))]
        with suppress(OSError):  # a node that is gone: the mount ends with its only descriptor
            connection.sendmsg([message], rights)
        os.close(mount.mount_fd)
        self._hosted.add(hosted)
        return hosted

    def _host(self, options: SessionOptions, watch_ino: int) -> HostedMount:
        """What there is to a mount before it has files."""
        presences = attach_presences(options)
        hosted = HostedMount(options, presences, WatchFile(watch_ino))
        hosted.watch.on_gone = hosted.strike_out
        hosted.link = HostedLink(
            presences,
            read_deadline_seconds=options.read_deadline_seconds,
            set_read_ahead=lambda kilobytes: self._set_read_ahead(hosted, kilobytes),
            invalidate=lambda segment, first, count: self._note_wrong(hosted, segment, first, count),
        )
        if options.observe:
            counts = [presence.count for presence in presences]
            hosted.link.first_reads = FirstReads(counts, hosted.link.send)
        try:
            if options.socket_path:
                hosted.listener = relink.listen(Path(options.socket_path))
        except BaseException:
            self._forget(hosted, ended=False)
            raise
        return hosted

    def _write_down(self, hosted: HostedMount, mount: erofs_mount.ErofsMount) -> None:
        if self._hold is None:
            return
        inos = [0] * len(hosted.options.segments)
        for file in hosted.files:
            for user in file.users:
                if user.link is hosted.link:
                    inos[user.segment] = file.ino
        name, watch = self._part.name, hosted.watch.ino
        hosted.write_down(hosting.Hosted(name, mount.device, watch, inos, mount.bdi_name))

    def _use(self, hosted: HostedMount, segment: int, file: SegmentFile) -> SegmentFile:
        file.users.append(User(hosted.link, segment))
        hosted.files.append(file)
        return file

    def _resume(
        self, record: hosting.Hosted, options: SessionOptions, connection: socket.socket
    ) -> HostedMount:
        """Go on with a mount of the host that had this connection before."""
        if record.host != self._part.name or len(record.files) != len(options.segments):
            raise StateError("this is not how the mount's segments were served")
        hosted = self._host(options, record.watch)
        hosted.bdi_name = record.bdi_name
        try:
            for n, (files, ino) in enumerate(zip(options.segments, record.files, strict=True)):
                if ino:
                    self._use(hosted, n, self._file(files, ino))
        except BaseException:
            self._forget(hosted, ended=False)
            raise
        with suppress(OSError):  # a node that is gone, again
            connection.send(setup.encode(Ready(os.getpid(), record.device)))
        self._hosted.add(hosted)
        self.operations.add(hosted.watch)  # last: it may have been released already
        return hosted

    def _file(self, files: setup.SegmentFiles, ino: int = 0) -> SegmentFile:
        """The file of a segment: the one that its pool file had before, or a new one. `ino`: what the kernel knows it by."""
        path = os.fspath(files.data_path)
        table = SegmentTable(map_file(os.fspath(files.table_path))[0])
        if table.chunk_count != files.presence_count:
            raise StateError(
                f"{files.table_path}: not the table of a segment of {files.presence_count} chunks"
            )
        view, identity = map_file(path, table.segment_bytes)
        known = self._by_path.get(path)
        same = known is not None and known.identity == identity and known.table.id == table.id
        if known is not None and same and ino in {0, known.ino}:
            return known
        there = self.operations.get(ino)
        if isinstance(there, SegmentFile):
            return there
        file = SegmentFile(ino or self.operations.next_ino(), table, view, identity, self._note_spoiled)
        self._by_path[path] = file
        self.operations.add(file)
        return file

    def path_of(self, name: bytes) -> str:
        """Where this process, and nobody else, can open a file."""
        return f"/proc/self/fd/{self._mount.mount_fd}/{name.decode()}"

    async def make_mount(
        self,
        metadata_path: str,
        devices: list[str],
        *,
        suid: bool = False,
        dev: bool = False,
        context: str = "",
        device_read_ahead_kb: int = hosting.DEVICE_READ_AHEAD_COLD_KB,
    ) -> erofs_mount.ErofsMount:
        """Mount EROFS in a thread: the kernel opens the devices, which this loop answers."""
        async with self._mounting:
            kernel.set_read_ahead(self._mount.device, device_read_ahead_kb)
            return await trio.to_thread.run_sync(
                lambda: erofs_mount.make_detached_erofs(
                    metadata_path, devices, suid=suid, dev=dev, context=context
                ),
                limiter=self._threads,
            )

    async def _live(self, hosted: HostedMount, connection: socket.socket) -> None:
        """Until the kernel has closed the mount's devices."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_link, hosted, connection)
            await hosted.watch.gone.wait()
            self._forget(hosted)  # before the channel ends: the node takes that as the end of everything
            nursery.cancel_scope.cancel()

    async def _keep_link(self, hosted: HostedMount, connection: socket.socket) -> None:
        await hosted.link.run(connection)
        while hosted.listener is not None:
            found = await relink.accept(hosted.listener, hosted.options, hosted.presences)
            found.setblocking(False)
            await hosted.link.run(found)

    def _forget(self, hosted: HostedMount, *, ended: bool = True) -> None:
        self._hosted.discard(hosted)
        hosted.link.end()
        if hosted.listener is not None:
            trio.lowlevel.notify_closing(hosted.listener)
            hosted.listener.close()
        if ended:
            hosted.strike_out()
        self.operations.remove(hosted.watch)
        for file in hosted.files:
            file.users = [user for user in file.users if user.link is not hosted.link]
        for presence in hosted.presences:
            presence.close()
        unused = [path for path, file in self._by_path.items() if not file.users]
        for path in unused[: max(0, len(unused) - UNUSED_FILES_KEPT)]:
            self.operations.remove(self._by_path.pop(path))

    def _set_read_ahead(self, hosted: HostedMount, kilobytes: int) -> None:
        erofs_mount.set_read_ahead(hosted.bdi_name, min(kilobytes, hosting.FILES_READ_AHEAD_COMPLETE_KB))

    def _note_wrong(self, hosted: HostedMount, segment: int, first: int, count: int) -> None:
        """What the kernel has cached of a segment file; what EROFS made of it, it keeps until it needs the memory."""
        for file in hosted.files:
            offset, size = file.table.segment_offset, file.table.size
            if User(hosted.link, segment) not in file.users:
                continue
            for n in range(first, min(first + count, file.table.chunk_count)):
                self._note_spoiled(file.ino, offset[n], size[n])

    def _note_spoiled(self, ino: int, offset: int, size_bytes: int) -> None:
        with suppress(trio.WouldBlock):  # a full queue only costs speed
            self._spoiled.send_nowait((ino, offset, size_bytes))

    async def _invalidate(self) -> None:
        """Once a failed read was answered, make the kernel forget that it failed; else it reads that range page by page."""
        async for ino, offset, size_bytes in self._to_invalidate:
            with suppress(OSError):
                await trio.to_thread.run_sync(
                    kernel.invalidate, self._mount.fuse_fd, ino, offset, size_bytes, abandon_on_cancel=True
                )


def run(control: socket.socket) -> int:
    """Be a segment host; returns the exit status."""
    fs.become(PROCESS_NAME)
    # a reader killed at the wrong instant leaves our read of the device waiting; a signal ends that (see `fs`)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, fs.UNSTICK_SECONDS, fs.UNSTICK_SECONDS)
    try:
        control.settimeout(fs.SETUP_SECONDS)
        host = SegmentHost(control, hosting.decode_host(control.recv(setup.MESSAGE_BYTES)))
    except Exception as error:
        if not isinstance(error, P2pgzError):
            log.exception("the segment host could not start")
            error = MountUnavailable(f"the segment host failed: {type(error).__name__}: {error}")
        with suppress(OSError):
            control.send(setup.encode_failure(error))
        return 1
    gc.collect()
    gc.freeze()
    gc.enable()
    with suppress(OSError):  # a node that is gone: that ends it, as it has no mounts yet
        control.send(setup.encode(Ready(os.getpid(), host.device)))
    trio.run(host.serve)
    return 0
