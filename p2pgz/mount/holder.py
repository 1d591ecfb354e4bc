"""The holder: keeps the /dev/fuse descriptor of every mount, so that an `fs` process may die and its readers only wait.

Started by `held.Holder` as a plain script with a listening socket; outlives the node and every `fs`, ends with the last
mount. Imports the standard library only and does nothing else: the less it does, the less can kill it. A mount whose `fs`
has been silent too long is aborted: an error beats a hang (`df`, kubelet, shutdown).

SOCK_SEQPACKET, one JSON object per datagram, each but `beat` and `release` answered by one object (`ok` or `error`):

    {"op": "hold", "id", "device"} + descriptor   from an `fs`: keep this; the connection is that mount's `fs` from here on
    {"op": "take", "id"}     from a new `fs`: answered with `device` and the descriptor
    {"op": "beat"}           from an `fs`: I answer readers
    {"op": "release"}        from an `fs`: the mount is gone
    {"op": "restore", "id", "device"} + descriptor   from a node that got it back from systemd
    {"op": "list", "after"}  the mounts held, by id, at most LIST_AT_MOST of them
    {"op": "kill", "id"}     SIGKILL its `fs`; answers with `pid`, 0 when there is none
    {"op": "abort", "id"}    end this mount: readers get an error
    {"op": "shutdown"}       the same for all, then end
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

VERSION = 1
MESSAGE_BYTES = 64 << 10
LIST_AT_MOST = 200  # an entry has some 100 bytes
TICK_SECONDS = 1.0
MAX_CONNECTIONS = 10_000
PROCESS_NAME = "p2pgz-holder"
UCRED = struct.Struct("=iII")


class Held:
    """One mount."""

    def __init__(self, mount_id: str, fd: int, device: int) -> None:
        self.id = mount_id
        self.fd = fd
        self.device = device
        self.silent_ticks = 0
        self.fs: Connection | None = None


class Connection:
    """A node, or an `fs` and then the mount it serves."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.mount: Held | None = None
        self.pidfd = -1
        self.pid, self.uid, _ = UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        )

    def kill(self) -> None:
        """SIGKILL the process, and no other one that got its number."""
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class Holder:
    """All mounts, one thread, no waiting for anybody."""

    def __init__(self, listener: socket.socket, abandon_ticks: int) -> None:
        self._listener = listener
        self._abandon_ticks = abandon_ticks
        self._mounts: dict[str, Held] = {}
        self._connections: dict[int, Connection] = {}
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._ending = False
        self._was_used = False
        self._ticked_at = time.monotonic()

    def serve(self) -> None:
        """Until nothing is held and nobody is connected."""
        ticks_left = self._abandon_ticks  # also how long a holder that nobody calls waits
        while not self._ending:
            ready = self._poll.poll(TICK_SECONDS * 1000)
            # a tick is one of this process: while it was stopped or the machine slept none passed, and
            # all that was sent while this process could not run is heard before anybody is called silent
            for fd, _ in ready:
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._connections:
                    self._hear(self._connections[fd])
            if time.monotonic() - self._ticked_at >= TICK_SECONDS:
                self._ticked_at = time.monotonic()
                self._tick()
                ticks_left -= 1
            idle = not self._mounts and not self._connections
            if idle and (self._was_used or ticks_left <= 0):
                return

    def abort_all(self) -> None:
        """Shutdown: nobody may hang."""
        for mount in list(self._mounts.values()):
            self._abort(mount)
        self._ending = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            connection = Connection(sock)
            if connection.uid not in (0, os.geteuid()) or len(self._connections) >= MAX_CONNECTIONS:
                sock.close()
                return
            sock.setblocking(False)
            self._was_used = True
            self._connections[sock.fileno()] = connection
            self._poll.register(sock, select.POLLIN)

    def _hear(self, connection: Connection) -> None:
        space = socket.CMSG_SPACE(4)
        try:
            data, ancillary, _, _ = connection.sock.recvmsg(MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if not data:
            self._drop(connection)
            return
        kept = -1
        try:
            message = json.loads(data)
            answer, give = self._do(connection, message, fds[0] if len(fds) == 1 else -1)
            kept = fds[0] if len(fds) == 1 and message["op"] in {"hold", "restore"} and "ok" in answer else -1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            answer, give = {"error": f"not understood: {error}"}, -1
        for fd in fds:
            if fd != kept:
                os.close(fd)
        if answer:
            self._send(connection, answer, give)

    def _send(self, connection: Connection, answer: dict[str, Any], give: int) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            if give >= 0:
                socket.send_fds(connection.sock, [json.dumps(answer).encode()], [give], flags)
            else:
                connection.sock.send(json.dumps(answer).encode(), flags)
        except OSError:
            self._drop(connection)

    def _do(self, connection: Connection, message: dict[str, Any], fd: int) -> tuple[dict[str, Any], int]:
        """Carry out one message: the answer (empty: none) and a descriptor to give along, or -1."""
        match message["op"]:
            case "beat":
                if connection.mount is not None:
                    connection.mount.silent_ticks = 0
                return {}, -1
            case "hold" | "restore" as op if fd >= 0:
                mount = self._keep(str(message["id"]), fd, int(message["device"]))
                if op == "hold":
                    mount.silent_ticks = 0
                    self._bind(connection, mount)
                return {"ok": True, "version": VERSION}, -1
            case "take":
                self._forget_ended()
                taken = self._mounts.get(str(message["id"]))
                if taken is None:
                    return {"error": "this mount is not held"}, -1
                self._bind(connection, taken)
                return {"ok": True, "device": taken.device}, taken.fd
            case "release":
                if connection.mount is not None and connection.mount.fs is connection:
                    self._forget(connection.mount)
                return {}, -1
            case "list":
                self._forget_ended()
                after = str(message.get("after", ""))
                ids = sorted(mount_id for mount_id in self._mounts if mount_id > after)[:LIST_AT_MOST]
                mounts = [
                    {
                        "id": mount.id,
                        "device": mount.device,
                        "pid": mount.fs.pid if mount.fs is not None else 0,
                        "silent_seconds": mount.silent_ticks * TICK_SECONDS,
                    }
                    for mount in map(self._mounts.__getitem__, ids)
                ]
                return {"ok": True, "version": VERSION, "pid": os.getpid(), "mounts": mounts}, -1
            case "kill":
                mount_of = self._mounts.get(str(message["id"]))
                victim = mount_of.fs if mount_of is not None else None
                if victim is not None:
                    victim.kill()
                return {"ok": True, "pid": victim.pid if victim is not None else 0}, -1
            case "abort":
                ended = self._mounts.get(str(message["id"]))
                if ended is not None:
                    self._abort(ended)
                return {"ok": True}, -1
            case "shutdown":
                self.abort_all()
                return {"ok": True}, -1
        return {"error": "no such operation"}, -1

    def _keep(self, mount_id: str, fd: int, device: int) -> Held:
        mount = self._mounts.get(mount_id)
        if mount is None:
            mount = self._mounts[mount_id] = Held(mount_id, fd, device)
        else:
            os.close(mount.fd)
            mount.fd, mount.device = fd, device
        _store(f"FDSTORE=1\nFDPOLL=0\nFDNAME={_store_name(mount)}", fd)
        return mount

    def _bind(self, connection: Connection, mount: Held) -> None:
        connection.mount = mount
        mount.fs = connection
        if connection.pidfd < 0:
            with contextlib.suppress(OSError):
                connection.pidfd = os.pidfd_open(connection.pid)

    def _drop(self, connection: Connection) -> None:
        self._poll.unregister(connection.sock)
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        if connection.pidfd >= 0:
            os.close(connection.pidfd)
        if connection.mount is not None and connection.mount.fs is connection:
            connection.mount.fs = None
            self._forget_ended()

    def _tick(self) -> None:
        self._forget_ended()
        for mount in list(self._mounts.values()):
            mount.silent_ticks += 1
            if mount.silent_ticks > self._abandon_ticks:
                self._abort(mount)
                # a log that cannot be written, on a full disk say, must not end the process that holds all mounts
                with contextlib.suppress(OSError, ValueError):
                    print(
                        f"{PROCESS_NAME}: mount {mount.id}: nobody answers its readers, given up",
                        file=sys.stderr,
                    )

    def _forget_ended(self) -> None:
        """Let go of mounts that were unmounted: the kernel reports an error on their descriptors. Asked, not waited for:
        a waiter on a FUSE descriptor is woken by every request."""
        for mount in list(self._mounts.values()):
            probe = select.poll()
            probe.register(mount.fd, 0)
            if probe.poll(0):
                self._forget(mount)

    def _forget(self, mount: Held) -> None:
        if self._mounts.pop(mount.id, None) is not None:
            os.close(mount.fd)
            _store(f"FDSTOREREMOVE=1\nFDNAME={_store_name(mount)}", -1)

    def _abort(self, mount: Held) -> None:
        """The last descriptor ends the connection; should somebody else hold one, the control file system does."""
        if mount.fs is not None:
            mount.fs.kill()
        self._forget(mount)
        with contextlib.suppress(OSError), open(_abort_file(mount.device), "w") as knob:  # noqa: PTH123  # pathlib costs memory
            knob.write("1")


def _abort_file(device: int) -> str:
    return f"/sys/fs/fuse/connections/{os.minor(device)}/abort"


def _store_name(mount: Held) -> str:
    return f"p2pgz-{mount.id}-{mount.device}"


def _store(text: str, fd: int) -> None:
    """Tell systemd, if it runs us, to keep a descriptor beyond our life, or to forget it. Best effort."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        if fd >= 0:
            socket.send_fds(sock, [text.encode()], [fd])
        else:
            sock.send(text.encode())


def main(arguments: list[str]) -> int:
    """holder.py LISTENING_FD ABANDON_SECONDS: goes to the background, serves."""
    if os.fork():
        os._exit(0)  # the node reaps this half; the other half belongs to init
    os.setsid()
    os.chdir("/")
    for path, text in (("/proc/self/comm", PROCESS_NAME), ("/proc/self/oom_score_adj", "-1000")):
        with contextlib.suppress(OSError), open(path, "w") as file:  # noqa: PTH123
            file.write(text)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = socket.socket(fileno=int(arguments[0]))
    listener.setblocking(False)
    holder = Holder(listener, max(1, round(float(arguments[1]) / TICK_SECONDS)))

    def end(*_: object) -> None:
        holder.abort_all()
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    holder.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
