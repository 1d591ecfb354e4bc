"""Debian's docker-registry (the distribution project's) on a free port of the loopback interface, for tests.

`docker_registry(folder)` is all that most tests need; `RunningRegistry` also stops and starts it again on the
same port, for tests of outages, and reads its access log. It is stopped by its process id, never by name;
nothing outside `folder` is written. Blocking: start it in a fixture, outside the event loop.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_WITHIN_SECONDS = 20.0  # 0.1 s on an idle machine
STOP_WITHIN_SECONDS = 5.0
PORT_ATTEMPTS = 5  # the port is free when we look, and may be taken when the registry binds it

_CONFIG = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: false}}}}
storage:
  filesystem: {{rootdirectory: "{root}"}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}", secret: "for tests only"}}
"""


class RunningRegistry:
    """A registry process over `folder`; what was pushed survives `stop()` and `start()`."""

    def __init__(self, folder: Path, *, binary: str = "docker-registry") -> None:
        self.folder = folder
        self.binary = binary
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "registry.log"

    @property
    def address(self) -> str:
        """host:port, as it stands in a reference."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        if shutil.which(self.binary) is None:
            raise FileNotFoundError(f"{self.binary} is not installed (apt-get install docker-registry)")
        for _ in range(PORT_ATTEMPTS if not self.port else 1):
            port = self.port or _free_port()
            if self._try_start(port):
                self.port = port
                return
        raise RuntimeError(f"{self.binary} did not start:\n{self._log.read_text(errors='replace')[-2000:]}")

    def _try_start(self, port: int) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "registry.yml"
        config.write_text(_CONFIG.format(root=self.folder / "storage", port=port))
        environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.binary, "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        deadline = time.monotonic() + START_WITHIN_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if _answers(port) and self._process.poll() is None:  # and not somebody else on that port
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def requests(self) -> list[str]:
        """The access log so far: one line per request. It is written after the answer, so the last may be
        missing."""
        return [line for line in self._log.read_text(errors="replace").splitlines() if " HTTP/1." in line]


@contextlib.contextmanager
def running_registry(folder: Path) -> Iterator[RunningRegistry]:
    registry = RunningRegistry(folder)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


@contextlib.contextmanager
def docker_registry(folder: Path) -> Iterator[str]:
    """host:port of an empty registry that speaks plain HTTP and lives as long as the block."""
    with running_registry(folder) as registry:
        yield registry.address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
