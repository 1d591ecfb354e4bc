"""The process that `fs` processes and segment hosts are forked from: everything imported once, shared copy-on-write.

Started by `session.FsHost` as `python -P -m p2pgz.mount.zygote FD`. A mount then costs a fork (milliseconds, its own pages
only) in place of an interpreter start. Runs no event loop and no thread, for both would not survive the fork. Ends when the
node closes its socket; its children go on as long as their mounts do.

On the socket (SOCK_SEQPACKET): node → zygote one byte with the descriptor of a new child's channel; zygote → node one EXIT
record for each child that ended.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from p2pgz.mount import fs, relink, segment_host
from p2pgz.mount.spawner import EXIT, FORK, FORK_SEGMENT_HOST

PROCESS_NAME: Final = b"p2pgz-fs-zygote"
_KINDS: Final[dict[bytes, Callable[[socket.socket], int]]] = {
    FORK: fs.run,
    FORK_SEGMENT_HOST: segment_host.run,
}


def serve(control: socket.socket) -> None:
    """Fork and reap until the node is gone."""
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if wake_read in ready:
            os.read(wake_read, 512)
        _reap(control)
        if control.fileno() not in ready:
            continue
        try:
            message, ancillary, _, _ = control.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # the node is gone, and had not read which children ended
            return
        fds = relink.descriptors(ancillary)
        if not message:
            return
        become = _KINDS.get(message)
        if become is None or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            continue
        try:
            pid = os.fork()
        except OSError as error:  # no memory or no process left: the node sees its channel end
            with suppress(OSError, ValueError):  # the log's disk is full
                print(f"p2pgz-fs-zygote: fork: {error.strerror}", file=sys.stderr)
            os.close(fds[0])
            continue
        if not pid:
            _become(become, control, wake_read, wake_write, fds[0])
        os.close(fds[0])


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with suppress(
            OSError
        ):  # the node is gone, or does not listen; its channel to that child ended anyway
            control.send(EXIT.pack(pid, status), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _become(
    run: Callable[[socket.socket], int],
    control: socket.socket,
    wake_read: int,
    wake_write: int,
    channel_fd: int,
) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        os.close(wake_read)
        os.close(wake_write)
        status = run(socket.socket(fileno=channel_fd))
    # outside of any event loop; whatever it is: this copy must never return into the zygote's
    except BaseException:  # noqa: ASYNC103,BLE001
        sys.excepthook(*sys.exc_info())
    finally:
        # no interpreter shutdown: worker threads may still hang in the kernel
        os._exit(status)


def main() -> None:
    """Entry point of the process."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    os.chdir("/")
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    fs.name_process(PROCESS_NAME)
    gc.disable()
    gc.collect()
    gc.freeze()
    serve(control)


if __name__ == "__main__":
    main()
