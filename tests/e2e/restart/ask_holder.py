"""One question to a holder, without an event loop."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


def ask(path: Path, message: dict[str, Any]) -> dict[str, Any]:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(5)
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            sock.send(json.dumps(message).encode())
            answer: dict[str, Any] = json.loads(sock.recv(65536))
            return answer
    finally:
        os.close(directory)
