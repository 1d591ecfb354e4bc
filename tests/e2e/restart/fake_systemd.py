"""What systemd does for a service with a file descriptor store: keeps what it is sent, and starts the service with it."""

from __future__ import annotations

import array
import os
import socket
import sys
import threading
from pathlib import Path

from tests.e2e.restart.lazy_node import LazyNode

# Numbers the descriptors from 3 on, and says whose they are: sd_listen_fds(3). Run with the descriptors' numbers, `--`, and
# the command.
_LAUNCH = """
import os, sys
split = sys.argv.index("--")
given = [int(word) for word in sys.argv[1:split]]
first = 100
for at, fd in enumerate(given):
    os.dup2(fd, first + at)
for at in range(len(given)):
    os.dup2(first + at, 3 + at, inheritable=True)
    os.close(first + at)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)))
os.execvp(sys.argv[split + 1], sys.argv[split + 1:])
"""


class FakeSystemd:
    """A socket that descriptors are sent to. Made for one service at a time."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "notify.sock"
        self.stored: dict[str, int] = {}
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.address))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(16))
            if data == b"END":
                return
            fds = array.array("i")
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            self.messages.append(fields)
            name = fields.get("FDNAME", "")
            if fields.get("FDSTORE") == "1" and len(fds) == 1 and name not in self.stored:
                self.stored[name] = fds.pop()
            elif fields.get("FDSTOREREMOVE") == "1" and name in self.stored:
                os.close(self.stored.pop(name))
            for fd in fds:
                os.close(fd)

    def start(self, node: LazyNode) -> None:
        """Start the service with what is stored."""
        names = list(self.stored)
        fds = [os.dup(self.stored[name]) for name in names]
        node.environment |= {"NOTIFY_SOCKET": str(self.address), "LISTEN_FDNAMES": ":".join(names)}
        launcher = [sys.executable, "-c", _LAUNCH, *map(str, fds), "--"]
        try:
            node.start(launcher=launcher, pass_fds=fds)
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(str(self.address))
            sock.send(b"END")
        self._thread.join()
        self._socket.close()
        for fd in self.stored.values():
            os.close(fd)
