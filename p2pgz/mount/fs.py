"""One `fs` process: serves one mounted image until its last unmount, with or without a node.

Forked by `zygote`; told what to serve over the socket it is born with (`setup`), then speaks `channel` on it. Must never
import a network client, write the pool, or open a file while a reader waits: a permission listener on our own mount
(antivirus, fapolicyd) would close the circle. Memory is counted: what is large stays in maps of files.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import pyfuse3
import trio

from p2pgz.core.layout import SegmentTable
from p2pgz.errors import MountUnavailable, P2pgzError, StateError
from p2pgz.image.treefile import TreeFile
from p2pgz.mount import attach, kernel, relink, setup
from p2pgz.mount.channel import Kind, Record
from p2pgz.mount.drain import before_poll
from p2pgz.mount.hold import Hold, resume_mount
from p2pgz.mount.link import NodeLink
from p2pgz.mount.observed import FirstReads
from p2pgz.mount.setup import Ready, SessionOptions
from p2pgz.mount.stale import ChunkRun, ranges_of
from p2pgz.mount.tree import Segment, TreeOperations
from p2pgz.mount.umount import unmount
from p2pgz.pool.presence import Presence

log = logging.getLogger("p2pgz.fs")

PROCESS_NAME: Final = b"p2pgz-fs"  # at most 15 bytes (prctl)
PR_SET_NAME: Final = 15
# The kernel counts mapped pool pages as ours; killing this process frees nothing and breaks a mount
OOM_SCORE_ADJ: Final = -1000
SETUP_SECONDS: Final = 20.0
START_SECONDS: Final = 40
# A reader that is killed between our epoll and our read of the device leaves that read waiting for the next request, and
# with it replies and deadlines. A signal ends it (EINTR). pyfuse3 cannot use a non-blocking device.
UNSTICK_SECONDS: Final = 2.0
ENDED_TICK_SECONDS: Final = 1.0
INVALIDATIONS_QUEUED: Final = 256
INVALIDATION_THREADS: Final = 2


class _Image(NamedTuple):
    """What a session serves."""

    tree: TreeFile
    segments: list[Segment]
    presences: list[Presence]


def name_process(name: bytes) -> None:
    """Set what `ps` and `top` show, and keep the out-of-memory killer away, as far as we may."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ), "ascii")


def become(name: bytes) -> None:
    """What a process that serves mounts begins with: a session and a name of its own, a log, and no death by a terminal."""
    os.setsid()
    os.chdir("/")
    name_process(name)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {name.decode()}[%(process)d] %(levelname)s %(message)s"
    )
    logging.raiseExceptions = False  # standard error may be a pipe whose reader is gone
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)


def run(connection: socket.socket) -> int:
    """Be an `fs` process; returns the exit status."""
    become(PROCESS_NAME)
    signal.alarm(START_SECONDS)  # whatever hangs in there, the process must not; `serve` takes the timer over
    try:
        options = _receive_session(connection)
    except (P2pgzError, OSError) as error:
        log.error("no session: %s", error)
        return 1
    mount = None
    try:
        image = _open_image(options)
        hold = Hold(Path(options.holder_path), options.hold_id) if options.holder_path else None
        mount = resume_mount(hold, resend=options.resend) if options.resume else _make_mount(options)
        served = _Served(image, options, mount, hold)
    except Exception as error:
        if not isinstance(error, P2pgzError):
            log.exception("the session could not start")
            error = MountUnavailable(f"the file system process failed: {type(error).__name__}: {error}")
        if mount is not None and mount.mount_fd < 0 and not options.resume:
            os.close(mount.fuse_fd)
            with suppress(P2pgzError):
                unmount(options.directory)
        with suppress(OSError):
            connection.send(setup.encode_failure(error))
        return 1
    served.announce(connection)
    gc.collect()
    gc.freeze()
    gc.enable()
    trio.run(served.serve, connection)
    served.close()
    return 0


def _receive_session(connection: socket.socket) -> SessionOptions:
    connection.settimeout(SETUP_SECONDS)
    assembler = setup.Assembler(with_fds=True)
    space = socket.CMSG_SPACE(4 * setup.FDS_PER_DATAGRAM)
    while True:
        datagram, ancillary, _, _ = connection.recvmsg(setup.MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        options = assembler.feed(datagram, relink.descriptors(ancillary))
        if options is not None:
            return options


def _open_image(options: SessionOptions) -> _Image:
    """Map everything; raises StateError that names the file that is wrong."""
    tree = TreeFile(_map(options.tree_path))
    if len(tree.segments) != len(options.segments):
        raise StateError(
            f"{options.tree_path}: refers to {len(tree.segments)} segments, {len(options.segments)} were given"
        )
    segments, presences = [], []
    for digest, files in zip(tree.segments, options.segments, strict=True):
        table = SegmentTable(_map(files.table_path))
        if table.id != digest or table.chunk_count != files.presence_count:
            raise StateError(f"{files.table_path}: not the table of segment {digest}")
        segments.append(Segment(table, _map(files.data_path, table.segment_bytes)))
        presences.append(Presence.attach(files.presence_fd, files.presence_count))
    return _Image(tree, segments, presences)


def _map(path: str | Path, need_bytes: int | None = None) -> memoryview:
    """Map a file for reading; of a segment the whole address range, which must be there (else SIGBUS later)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    try:
        size = os.fstat(fd).st_size
        if need_bytes is not None and size < need_bytes:
            raise StateError(f"{path}: {size} bytes instead of {need_bytes}", hint="the pool was damaged")
        length = size if need_bytes is None else need_bytes
        if not length:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ))
    finally:
        os.close(fd)


def _make_mount(options: SessionOptions) -> attach.FuseMount:
    if os.geteuid() == 0:
        return attach.make_detached(
            source=options.source_name,
            suid=options.suid,
            dev=options.dev,
            context=options.context,
            allow_other=options.allow_other,
        )
    if not options.directory:
        raise MountUnavailable("only root can make a mount that is attached later", hint="name the directory")
    return attach.make_through_fusermount(
        options.directory,
        source=options.source_name,
        suid=options.suid,
        dev=options.dev,
        context=options.context,
    )


class _Served:
    """A mounted image and what serves it."""

    def __init__(
        self, image: _Image, options: SessionOptions, mount: attach.FuseMount, hold: Hold | None
    ) -> None:
        self._options = options
        self._mount = mount
        self._hold = hold
        self._draining = trio.Event()
        self._presences = image.presences
        self._listener = relink.listen(Path(options.socket_path)) if options.socket_path else None
        self._link = NodeLink(
            image.presences,
            read_deadline_seconds=options.read_deadline_seconds,
            set_read_ahead=self._set_read_ahead,
            drain=self._draining.set,
            invalidate=self._note_wrong,
        )
        self._image = image
        self._wrong: list[ChunkRun] = []
        self._some_wrong = trio.Event()
        self._spoiled, self._to_invalidate = trio.open_memory_channel[tuple[int, int, int]](
            INVALIDATIONS_QUEUED
        )
        if options.observe:
            counts = [presence.count for presence in image.presences]
            self._link.first_reads = FirstReads(counts, self._link.send)
        greeting = kernel.greeting() if options.resume else kernel.answer_init(mount.fuse_fd)
        door = kernel.LibfuseDoor(mount.fuse_fd, greeting)
        self._set_read_ahead(options.read_ahead_kb)
        operations = TreeOperations(
            image.tree,
            image.segments,
            self._link,
            on_init=door.open,
            on_failed_read=self._note_spoiled,
        )
        pyfuse3.init(operations, door.path, set())
        if hold is not None and not options.resume:
            hold.give(mount.fuse_fd, mount.device)

    def announce(self, connection: socket.socket) -> None:
        """Tell the node that the mount can be used, and let go of it: a descriptor kept here would keep it busy."""
        message = setup.encode(Ready(os.getpid(), self._mount.device))
        fds = [self._mount.mount_fd] if self._mount.mount_fd >= 0 else []
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", *fds))] if fds else []
        with suppress(
            OSError
        ):  # a node that is gone: the mount ends with its only descriptor, and so does `serve`
            connection.sendmsg([message], rights)
        setup.close_all(fds)

    async def serve(self, connection: socket.socket) -> None:
        """Until the last unmount."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, UNSTICK_SECONDS, UNSTICK_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_link, connection)
            nursery.start_soon(self._drain)
            if self._hold is not None:
                nursery.start_soon(self._hold.keep)
            for _ in range(INVALIDATION_THREADS):
                nursery.start_soon(self._invalidate)
            nursery.start_soon(self._find_wrong)
            nursery.start_soon(self._end_waits)
            await pyfuse3.main(1, kernel.MAX_TASKS)
            # before the channel ends: the node takes that as the end of everything
            self._unlink_socket()
            if self._hold is not None and not self._draining.is_set():
                self._hold.release()
            nursery.cancel_scope.cancel()

    async def _end_waits(self) -> None:
        """Once unmounted. Nobody can be waiting any more (who was has been killed), but libfuse waits for its handlers."""
        while not kernel.has_ended(self._mount.fuse_fd):  # noqa: ASYNC110  # every request would wake a waiter
            await trio.sleep(ENDED_TICK_SECONDS)
        self._link.abandon()

    async def _keep_link(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        await self._link.run(connection)
        if self._listener is None:
            return  # nobody can come back: what is present is served, the rest fails at its deadline
        while True:
            found = await relink.accept(self._listener, self._options, self._presences)
            found.setblocking(False)
            await self._link.run(found)

    async def _drain(self) -> None:
        """When told to, leave the kernel's requests to a successor; what was read is still answered."""
        await self._draining.wait()
        self._unlink_socket()
        await before_poll(pyfuse3.terminate)
        self._link.send([Record(Kind.DRAINING)])

    def _unlink_socket(self) -> None:
        if self._options.socket_path:
            Path(self._options.socket_path).unlink(missing_ok=True)

    def _set_read_ahead(self, kilobytes: int) -> None:
        if self._mount.device:
            kernel.set_read_ahead(self._mount.device, kilobytes)

    def _note_spoiled(self, ino: int, offset: int, size_bytes: int) -> None:
        with suppress(trio.WouldBlock):  # a full queue only costs speed
            self._spoiled.send_nowait((ino, offset, size_bytes))

    def _note_wrong(self, segment: int, first: int, count: int) -> None:
        self._wrong.append(ChunkRun(segment, first, count))
        self._some_wrong.set()

    async def _find_wrong(self) -> None:
        """Make the kernel forget what it cached of chunks that were wrong on the disk."""
        tables = [segment.table for segment in self._image.segments]
        while True:
            await self._some_wrong.wait()
            self._some_wrong = trio.Event()
            runs, self._wrong = self._wrong, []
            for found in await trio.to_thread.run_sync(ranges_of, self._image.tree, tables, runs):
                await self._spoiled.send(found)

    async def _invalidate(self) -> None:
        """Once a failed read was answered, make the kernel forget that it failed."""
        async for ino, offset, size_bytes in self._to_invalidate:
            with suppress(OSError):
                await trio.to_thread.run_sync(
                    kernel.invalidate, self._mount.fuse_fd, ino, offset, size_bytes, abandon_on_cancel=True
                )

    def close(self) -> None:
        """After the last unmount."""
        pyfuse3.close(unmount=False)
