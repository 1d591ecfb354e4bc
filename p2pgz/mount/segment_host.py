"""The segment host: one process per node that serves segment files to the kernel's EROFS, and makes the EROFS mounts.

Started by the node (`segment_client`) as `python -P -m p2pgz.mount.segment_host FD`; told of each mount over its own
channel (`hosting`). Its FUSE mount is attached nowhere: only this process can open the files, and only EROFS does. Lives on
without a node while one of its mounts is alive, and is found by the next node through the mounts' sockets (`relink`). The
same rules as for `fs`: never a network client, never a write to the pool, no file opened while a reader waits.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.errors import P2pgzError, StateError
from p2pgz.mount import attach, erofs_mount, fs, hosting, kernel, relink, selftest, setup
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
from p2pgz.pool.presence import Presence

log = logging.getLogger("p2pgz.segments")

PROCESS_NAME: Final = b"p2pgz-segments"
SOURCE_NAME: Final = "p2pgz-segments"
MOUNT_THREADS: Final = 2
INVALIDATIONS_QUEUED: Final = 1024


class _Hosted:
    """One mounted image."""

    def __init__(self, options: SessionOptions, presences: list[Presence], watch: WatchFile) -> None:
        self.options = options
        self.presences = presences
        self.watch = watch
        self.files: list[SegmentFile] = []
        self.bdi_name = ""
        self.listener: socket.socket | None = None
        self.link: HostedLink


class SegmentHost:
    """Everything that the process has."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._mount = attach.make_detached(source=SOURCE_NAME)
        door = kernel.LibfuseDoor(self._mount.fuse_fd, kernel.answer_init(self._mount.fuse_fd))
        self.operations = SegmentOperations(on_init=door.open)
        pyfuse3.init(self.operations, door.path, set())
        self._by_path: dict[str, SegmentFile] = {}
        self._hosted: set[_Hosted] = set()
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
            nursery.start_soon(pyfuse3.main, 1, kernel.MAX_TASKS)
            for _ in range(fs.INVALIDATION_THREADS):
                nursery.start_soon(self._invalidate)
            nursery.start_soon(self._take_channels)

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
        if self._node_gone and not self._channels:
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

    async def _open_channel(self, connection: socket.socket) -> _Hosted | None:
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
        return await self._start(opening, options, connection)

    async def _start(
        self, opening: hosting.ErofsPart, options: SessionOptions, connection: socket.socket
    ) -> _Hosted:
        presences = _attach(options)
        watch = WatchFile(self.operations.next_ino())
        hosted = _Hosted(options, presences, watch)
        hosted.link = HostedLink(
            presences,
            read_deadline_seconds=options.read_deadline_seconds,
            set_read_ahead=lambda kilobytes: self._set_read_ahead(hosted, kilobytes),
            invalidate=lambda segment, first, count: self._note_wrong(hosted, segment, first, count),
        )
        if options.observe:
            counts = [presence.count for presence in presences]
            hosted.link.first_reads = FirstReads(counts, hosted.link.send)
        self.operations.add(watch)
        try:
            devices: list[str] = []
            native = set(opening.native)
            for n, files in enumerate(options.segments):
                if n in native:
                    devices.append(os.fspath(files.data_path))
                    continue
                file = self._file(files)
                file.users.append(User(hosted.link, n))
                hosted.files.append(file)
                devices.append(self.path_of(file.name))
            devices.append(self.path_of(watch.name))
            if options.socket_path:
                hosted.listener = relink.listen(Path(options.socket_path))
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

    def _file(self, files: setup.SegmentFiles) -> SegmentFile:
        """The file of a segment: the one that its pool file had before, or a new one."""
        path = os.fspath(files.data_path)
        table = SegmentTable(map_file(os.fspath(files.table_path))[0])
        if table.chunk_count != files.presence_count:
            raise StateError(
                f"{files.table_path}: not the table of a segment of {files.presence_count} chunks"
            )
        view, identity = map_file(path, table.segment_bytes)
        known = self._by_path.get(path)
        if known is not None and known.identity == identity and known.table.id == table.id:
            return known
        file = SegmentFile(self.operations.next_ino(), table, view, identity, self._note_spoiled)
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

    async def _live(self, hosted: _Hosted, connection: socket.socket) -> None:
        """Until the kernel has closed the mount's devices."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_link, hosted, connection)
            await hosted.watch.gone.wait()
            self._forget(hosted)  # before the channel ends: the node takes that as the end of everything
            nursery.cancel_scope.cancel()

    async def _keep_link(self, hosted: _Hosted, connection: socket.socket) -> None:
        await hosted.link.run(connection)
        while hosted.listener is not None:
            found = await relink.accept(hosted.listener, hosted.options, hosted.presences)
            found.setblocking(False)
            await hosted.link.run(found)

    def _forget(self, hosted: _Hosted) -> None:
        self._hosted.discard(hosted)
        hosted.link.end()
        if hosted.listener is not None:
            trio.lowlevel.notify_closing(hosted.listener)
            hosted.listener.close()
        if hosted.options.socket_path:
            Path(hosted.options.socket_path).unlink(missing_ok=True)
        self.operations.remove(hosted.watch)
        for file in hosted.files:
            file.users = [user for user in file.users if user.link is not hosted.link]
        for presence in hosted.presences:
            presence.close()
        unused = [path for path, file in self._by_path.items() if not file.users]
        for path in unused[: max(0, len(unused) - UNUSED_FILES_KEPT)]:
            self.operations.remove(self._by_path.pop(path))

    def _set_read_ahead(self, hosted: _Hosted, kilobytes: int) -> None:
        erofs_mount.set_read_ahead(hosted.bdi_name, min(kilobytes, hosting.FILES_READ_AHEAD_COMPLETE_KB))

    def _note_wrong(self, hosted: _Hosted, segment: int, first: int, count: int) -> None:
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


def _attach(options: SessionOptions) -> list[Presence]:
    """The presence bitmaps of a mount; none and no descriptor is left when one is wrong."""
    presences: list[Presence] = []
    try:
        for files in options.segments:
            presences.append(Presence.attach(files.presence_fd, files.presence_count))  # noqa: PERF401
    except BaseException:
        setup.close_all([files.presence_fd for files in options.segments[len(presences) :]])
        for presence in presences:
            presence.close()
        raise
    return presences


def main() -> None:
    """Entry point of the process."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    if os.fork():
        os._exit(0)  # nobody's child: it outlives the node while there are mounts, and ends by itself
    os.chdir("/")
    fs.name_process(PROCESS_NAME)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s p2pgz-segments[%(process)d] %(levelname)s %(message)s"
    )
    logging.raiseExceptions = False  # standard error may be a pipe whose reader is gone
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    # a reader killed at the wrong instant leaves our read of the device waiting; a signal ends that (see `fs`)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, fs.UNSTICK_SECONDS, fs.UNSTICK_SECONDS)
    status = 1
    try:
        host = SegmentHost(control)
        gc.collect()
        gc.freeze()
        control.send(setup.encode(Ready(os.getpid(), host.device)))
        trio.run(host.serve)
        status = 0
    except P2pgzError as error:
        log.error("no segment host: %s", error)
        with suppress(OSError):
            control.send(setup.encode_failure(error))
    except BaseException:  # noqa: ASYNC103,BLE001  # outside of any event loop; the process ends in any case
        sys.excepthook(*sys.exc_info())
    finally:
        # no interpreter shutdown: worker threads may still hang in the kernel
        os._exit(status)


if __name__ == "__main__":
    main()
