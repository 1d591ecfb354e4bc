"""What the demo starts: a registry and nodes, each ended with its block. Called by `cli.demo`."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from p2pgz.bench.processes import BenchNode
from p2pgz.cli.client import NodeClient
from p2pgz.errors import MountUnavailable, P2pgzError, SourceUnavailable
from p2pgz.testing.docker_registry import RunningRegistry
from p2pgz.testing.fake_registry import FakeRegistry

START_SECONDS: Final = 10.0
JOIN_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 0.05
READ_PATH: Final = "/bin/ls"


class DemoRegistry(Protocol):
    """A registry on the loopback interface."""

    address: str
    kind: str

    def stop(self) -> None:
        """Nobody answers there any more. May be repeated."""
        ...


class _BuiltIn:
    """The tests' registry, in a thread with an event loop of its own."""

    kind = "the built-in registry"

    def __init__(self) -> None:
        made: queue.SimpleQueue[tuple[str, trio.lowlevel.TrioToken, trio.CancelScope]] = queue.SimpleQueue()

        async def serve() -> None:
            async with FakeRegistry.open() as registry:
                with trio.CancelScope() as scope:
                    made.put((registry.address, trio.lowlevel.current_trio_token(), scope))
                    await trio.sleep_forever()

        self._thread = threading.Thread(target=trio.run, args=[serve], name="registry", daemon=True)
        self._thread.start()
        self.address, self._token, self._scope = made.get(timeout=START_SECONDS)

    def stop(self) -> None:
        """See DemoRegistry."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join()


class _Debians:
    """docker-registry, in a process."""

    kind = "docker-registry"

    def __init__(self, folder: Path) -> None:
        self._running = RunningRegistry(folder)
        self._running.start()
        self.address = self._running.address

    def stop(self) -> None:
        """See DemoRegistry."""
        self._running.stop()


@contextmanager
def running_registry(folder: Path) -> Iterator[DemoRegistry]:
    """An empty registry: Debian's where it is installed."""
    registry: DemoRegistry = _Debians(folder) if shutil.which("docker-registry") else _BuiltIn()
    try:
        yield registry
    finally:
        registry.stop()


class DemoNode(BenchNode):
    """A node with a state directory of its own and nothing of the user's, and what its reader saw."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.name = name
        self.mount_seconds = 0.0
        self.first_output_seconds = 0.0
        config = folder / "config.toml"
        config.write_text("version = 1\n")
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("P2PGZ_")},
            "P2PGZ_CONFIG": str(config),
            "P2PGZ_PEERS__LISTEN": "/ip4/127.0.0.1/tcp/0",
            "P2PGZ_FETCH__FILL": "false",
            # this pool is thrown away: it may be where a kept one must not, such as a container's own file system
            "P2PGZ_POOL__CHECK_FILESYSTEM": "false",
        }

    def status(self) -> dict[str, Any]:
        """The status document, without a process for it."""
        return NodeClient(self.folder / "state").status()

    @property
    def address(self) -> str:
        """Where others reach it."""
        found: str = self.status()["node"]["addrs"][0]
        return found

    @property
    def page(self) -> str:
        """Its status page."""
        found: str = self.status()["node"]["http"][0]
        return found

    def join(self, *others: DemoNode) -> None:
        """Start, and wait until it knows one of the others."""
        self.start(*(other.address for other in others))
        deadline = time.monotonic() + JOIN_SECONDS
        while others and not self.status()["peers"]:
            if time.monotonic() > deadline:
                raise SourceUnavailable(f"{self.name} reached none of the others within {JOIN_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)

    def run_program(self, reference: str, command: str) -> str:
        """Mount the image, run a program of it in a chroot, unmount; what the program said."""
        began = time.monotonic()
        self("mount", "--plain-http", "--no-fill", reference, self.root)
        self.mount_seconds = time.monotonic() - began
        try:
            with subprocess.Popen(
                ["chroot", str(self.root), "/bin/sh", "-c", command],
                stdout=subprocess.PIPE,
                text=True,
                stdin=subprocess.DEVNULL,
            ) as program:
                assert program.stdout is not None
                first = program.stdout.readline()
                self.first_output_seconds = time.monotonic() - began
                said = first + program.stdout.read()
            if program.returncode:
                raise MountUnavailable(f"the program in the image ended with {program.returncode}")
            return said
        finally:
            self("umount", self.root)

    def read_file(self, reference: str) -> str:
        """The same without a mount: a program's bytes, counted."""
        began = time.monotonic()
        with subprocess.Popen(
            self.command("cat", "--plain-http", reference, READ_PATH),
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=self._environment,
        ) as cat:
            assert cat.stdout is not None
            count = len(cat.stdout.read(1))
            self.first_output_seconds = time.monotonic() - began
            count += len(cat.stdout.read())
        if cat.returncode:
            raise P2pgzError(f"p2pgz cat {reference} {READ_PATH} ended with {cat.returncode}")
        return f"{READ_PATH} has {count} bytes"

    def supplied(self) -> dict[str, Any]:
        """A row of the table: who gave this node what."""
        sources = self.status()["sources"]
        return {
            "name": self.name,
            "registry_bytes": sources["registry"]["wire_bytes"],
            "registry_requests": sources["registry"]["requests"],
            "peer_bytes": sources["peer"]["bytes"],
            "mount_seconds": self.mount_seconds,
            "first_output_seconds": self.first_output_seconds,
        }


@contextmanager
def demo_node(folder: Path, name: str) -> Iterator[DemoNode]:
    """A node that is not started yet, and ended with the block."""
    node = DemoNode(folder / name.replace(" ", "-"), name)
    try:
        yield node
    finally:
        node.stop()
