"""Nodes that a benchmark starts for itself, and the machine around them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from p2pgz import errors
from p2pgz.errors import NodeUnavailable, P2pgzError

END_SECONDS: Final = 20.0
# a whole image over a slow line
COMMAND_SECONDS: Final = 3600.0


class BenchNode:
    """A node with a state directory of its own, and the commands that ask it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.root.mkdir(parents=True)
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("P2PGZ_PEERS__")},
            "P2PGZ_PEERS__LISTEN": "/ip4/127.0.0.1/tcp/0",
            "P2PGZ_POOL__SCRUB_INTERVAL_SECONDS": "0",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "node.log"

    def command(self, *words: str | Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "p2pgz",
            "--quiet",
            "--state-dir",
            str(self.folder / "state"),
            *map(str, words),
        ]

    def __call__(self, *words: str | Path) -> str:
        """Run a command to its end; raises P2pgzError with what it said."""
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
            env=self._environment,
        )
        if done.returncode:
            what, _, hint = done.stderr.strip().removeprefix("p2pgz: ").partition("\n")
            raise _error_of(done.returncode)(what, hint=hint.strip())
        return done.stdout

    def start(self, *bootstrap: str, peers: bool = True) -> None:
        """Raises NodeUnavailable."""
        ready, write = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command("node", "--ready-fd", str(write)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                env={
                    **self._environment,
                    "P2PGZ_PEERS__BOOTSTRAP": ",".join(bootstrap),
                    "P2PGZ_PEERS__ENABLED": "always" if peers else "never",
                },
            )
        os.close(write)
        with os.fdopen(ready) as said:
            if not said.readline():
                text = self._log.read_text(errors="replace").strip().splitlines()
                raise NodeUnavailable(f"the benchmark's node did not start: {text[-1] if text else ''}")

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self("status", "--json"))
        return document

    def stop(self) -> None:
        """Unmount and end; whatever is in the way."""
        with contextlib.suppress(P2pgzError, subprocess.TimeoutExpired):
            if os.path.ismount(self.root):
                self("umount", self.root)
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _error_of(exit_code: int) -> type[P2pgzError]:
    """The error that a command ended with, so that the benchmark ends with the same."""
    found = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, P2pgzError) and kind.exit_code == exit_code
    ]
    return found[0] if found else P2pgzError


@contextmanager
def running(folder: Path, *bootstrap: str, peers: bool = True, **environment: str) -> Iterator[BenchNode]:
    """A node for the length of the block."""
    node = BenchNode(folder, **environment)
    try:
        node.start(*bootstrap, peers=peers)
        yield node
    finally:
        node.stop()


def drop_caches() -> bool:
    """Make what follows cold; false without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
