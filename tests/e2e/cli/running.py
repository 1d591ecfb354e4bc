"""Real `p2pgz` processes for the tests: the installed command, a state directory of its own, nothing of the user's.

`P2pgz` is one state directory. `run` starts the command and waits; a node is either the one that a command starts for
itself or the one of `node()`. `close` ends everything that was started here, by process id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from p2pgz.cli.client import connect
from p2pgz.mount.umount import find_mounts

COMMAND_SECONDS = 30.0  # what a command may take on a busy machine; most take a tenth
END_SECONDS = 15.0
LINGER_SECONDS = 0.3  # of nodes that a command starts for itself

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)

    def error_json(self) -> dict[str, Any]:
        """The last line of standard error under --json."""
        document: dict[str, Any] = json.loads(self.err.splitlines()[-1])
        return document


class P2pgz:
    """One state directory and its commands."""

    def __init__(self, state: Path, **environment: str) -> None:
        self.state = state
        self.home = state.parent
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("P2PGZ_", "DOCKER_"))
        }
        self.environment = {
            **inherited,
            "HOME": str(self.home),
            "P2PGZ_NODE__EPHEMERAL_LINGER_SECONDS": str(LINGER_SECONDS),
            **environment,
        }
        self._started: list[subprocess.Popen[str]] = []

    def command(self, *words: str | Path) -> list[str]:
        """The command line of one command."""
        return [sys.executable, "-m", "p2pgz", "--state-dir", str(self.state), *map(str, words)]

    def run(self, *words: str | Path, timeout: float = COMMAND_SECONDS, **environment: str) -> Done:
        """Run a command to its end, whatever it is."""
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            env={**self.environment, **environment},
            cwd=self.home,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str | Path, **options: Any) -> Done:
        """Run a command that must succeed."""
        done = self.run(*words, **options)
        assert done.code == 0, f"{words}: exit code {done.code}\n{done.err}\n{self.log()[-3000:]}"
        return done

    def fails(self, code: int, *words: str | Path, **options: Any) -> str:
        """Run a command that must fail with this code and a message for people; returns the message."""
        done = self.run(*words, **options)
        assert done.code == code, (
            f"{words}: exit code {done.code}, not {code}\n{done.err}\n{self.log()[-3000:]}"
        )
        assert "Traceback" not in done.err
        assert "internal error" not in done.err
        return done.err

    def start(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command and go on."""
        process = subprocess.Popen(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
            cwd=self.home,
        )
        self._started.append(process)
        return process

    def start_node(self, **environment: str) -> int:
        """Run `p2pgz node` until it answers; its process id."""
        with self.state.with_name("node-stderr.log").open("ab") as log:
            ready, write = os.pipe()
            process = subprocess.Popen(
                self.command("node", "--ready-fd", str(write)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                text=True,
                env={**self.environment, **environment},
                cwd=self.home,
            )
            os.close(write)
        self._started.append(process)
        with os.fdopen(ready) as said:
            line = said.readline()
        assert json.loads(line or "{}").get("event") == "ready", (
            f"the node did not start: {line}\n{self.log()}"
        )
        return process.pid

    def ask(self, method: str, path: str, request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """A request to the control socket, without starting a process; the lines of the answer."""
        connection = http.client.HTTPConnection("localhost")
        with contextlib.closing(connection):
            connection.sock = connect(self.state / "api.sock")
            body = None if request is None else json.dumps(request)
            connection.request(method, path, body, {"Connection": "close"})
            return [json.loads(line) for line in connection.getresponse()]

    def status(self) -> dict[str, Any]:
        """What `p2pgz status --json` prints."""
        return self.ask("GET", "/v1/status")[0]

    def mounts(self) -> list[str]:
        """The directories that the node has mounts at."""
        return [mount["dir"] for mount in self.status()["mounts"]]

    def node_pid(self) -> int:
        """The process of the running node; 0 when none answers."""
        try:
            return int(self.status()["node"]["pid"])
        except (OSError, http.client.HTTPException):
            return 0

    def log(self) -> str:
        """What this state directory's nodes wrote."""
        paths = (self.state / "node.log", self.state.with_name("node-stderr.log"))
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def stop_node(self, number: int = signal.SIGTERM) -> None:
        """End the node, however it was started, and wait for it."""
        if pid := self.node_pid():
            os.kill(pid, number)
            wait_gone(pid)

    def close(self) -> None:
        """End every process and mount of this state directory."""
        for mount in find_mounts():
            if mount.directory.startswith(f"{self.home}/"):
                subprocess.run(["umount", "-l", mount.directory], check=False)
        self.stop_node()
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()


def mounted_at(directory: Path) -> bool:
    """Whether the kernel has an image of ours mounted there."""
    return str(directory) in {mount.directory for mount in find_mounts()}


def below(directory: Path) -> list[str]:
    """Our mounts below a directory."""
    return [mount.directory for mount in find_mounts() if mount.directory.startswith(f"{directory}/")]


def umount(*directories: Path) -> None:
    """Plain umount(8): the mount's end, seen by the kernel alone."""
    subprocess.run(["umount", *map(str, directories)], check=True, capture_output=True)


def gone(pid: int) -> bool:
    """Whether a process has ended; it may still be a zombie of ours."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_gone(pid: int) -> None:
    """Wait for the end of a process that need not be our child."""
    until(lambda: gone(pid), f"the end of process {pid}", END_SECONDS)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def until(condition: Callable[[], T], what: str, seconds: float = END_SECONDS) -> T:
    """Wait for something to become true; returns what it became."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


def peak_memory_mib(pid: int) -> int:
    """The highest resident size since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:"))


def forget_peak(pid: int) -> None:
    """Count the peak from now on (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def mounted(p2pgz: P2pgz, reference: str, directory: Path, *options: str) -> Iterator[Done]:
    """An image mounted as long as the block."""
    directory.mkdir(exist_ok=True)
    done = p2pgz.ok("mount", *options, reference, directory)
    assert mounted_at(directory)
    try:
        yield done
    finally:
        if mounted_at(directory):
            umount(directory)
