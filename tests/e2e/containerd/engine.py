"""A real containerd with directories of its own, p2pgz as its snapshotter, and the node behind it: three processes.

`Engine` starts, stops and kills each by its process id. All that they make is below one folder and gone with the engine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2pgz.mount.umount import MNT_DETACH, _libc, _mountinfo

BINARIES = ("containerd", "containerd-shim-runc-v2", "ctr")
START_SECONDS = 60.0
LIST = ("snapshots", "--snapshotter", "p2pgz", "ls")

CONFIG = """\
version = 3
root = "{root}"
state = "{state}"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
    "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
]
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[proxy_plugins.p2pgz]
type = "snapshot"
address = "{snapshotter}"
[proxy_plugins.p2pgz.exports]
root = "{exports}"
enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "p2pgz"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux"
snapshotter = "overlayfs"
"""


def find_binaries(cache: Path) -> Path | None:
    """The folder that has containerd's binaries: `make containerd` puts them into the cache, else they are on the path."""
    for folder in (cache / "containerd", *map(Path, os.get_exec_path())):
        if all((folder / name).is_file() for name in BINARIES):
            return folder
    return None


class Engine:
    """containerd, `p2pgz snapshotter` and `p2pgz node` on `folder`, whose path must be short: it has sockets."""

    def __init__(
        self, binaries: Path, folder: Path, *, namespace: str = "test", options: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "p2pgz"
        self.namespace = namespace
        self.address = folder / "c.sock"
        self._binaries = binaries
        self._options = options
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "P2PGZ_STATE_DIR": str(self.state_dir),
            "CONTAINERD_ADDRESS": str(self.address),
        }
        config = CONFIG.format(
            root=folder / "root",
            state=folder / "state",
            socket=self.address,
            snapshotter=self.state_dir / "p2pgz.sock",
            exports=self.state_dir / "snapshotter",
        )
        (folder / "containerd.toml").write_text(config)

    # --- the processes

    def start(self) -> None:
        self.start_node()
        self.start_snapshotter()
        self.start_containerd()

    def start_node(self) -> None:
        self._start("node", [sys.executable, "-m", "p2pgz", "node", "--no-peers"])
        self._until("node", lambda: self.p2pgz("status", "--json", check=False).returncode == 0)

    def start_snapshotter(self) -> None:
        self._start("snapshotter", [sys.executable, "-m", "p2pgz", "snapshotter", *self._options])
        self._until("snapshotter", lambda: "snapshotter.ready" in self._fresh_log("snapshotter"))
        if "containerd" in self._processes:  # which tries again after seconds, once a connection was refused
            self._until("containerd", lambda: self.ctr(*LIST, check=False).returncode == 0)

    def start_containerd(self) -> None:
        self._start(
            "containerd", [str(self._binaries / "containerd"), "-c", str(self.folder / "containerd.toml")]
        )
        self._until("containerd", lambda: self.ctr("version", check=False).returncode == 0)

    def _start(self, name: str, command: list[str]) -> None:
        path = self.folder / f"{name}.log"
        self._log_start = path.stat().st_size if path.exists() else 0
        with path.open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )

    def _fresh_log(self, name: str) -> str:
        return self.log(name)[self._log_start :]

    def _until(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._processes[name].poll() is not None:
                break
            if ready():
                return
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not start:\n{self.log(name)[-4000:]}")

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End one process and wait for it."""
        process = self._processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        self.end(name, signal.SIGKILL)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # --- asking them

    def ctr(
        self, *words: str, check: bool = True, within_seconds: float = 90
    ) -> subprocess.CompletedProcess[str]:
        command = [str(self._binaries / "ctr"), "--namespace", self.namespace, *words]
        return self._run(command, check=check, within_seconds=within_seconds)

    def ctr_bytes(self, *words: str) -> bytes:
        """What it prints, of a command that succeeds."""
        command = [str(self._binaries / "ctr"), "--namespace", self.namespace, *words]
        return subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, check=True, timeout=60
        ).stdout

    def p2pgz(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "p2pgz", *words], check=check, within_seconds=60)

    def _run(
        self, command: list[str], *, check: bool, within_seconds: float
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=within_seconds,
        )
        if check and done.returncode:
            logs = "\n".join(f"--- {name}\n{self.log(name)[-2500:]}" for name in self._processes)
            raise RuntimeError(
                f"{command}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}\n{logs}"
            )
        return done

    def pull(self, reference: str, snapshotter: str = "p2pgz") -> None:
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference)

    def run(self, reference: str, name: str, *words: str, snapshotter: str = "p2pgz") -> str:
        """A container to its end; what it printed."""
        flags = (
            ["--snapshotter", snapshotter, "--rm", "--null-io"]
            if not words
            else ["--snapshotter", snapshotter, "--rm"]
        )
        return self.ctr(
            "run", *[flag for flag in flags if flag != "--null-io"], reference, name, *words
        ).stdout

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.p2pgz("status", "--json").stdout)
        return document

    def snapshots(self) -> list[list[str]]:
        """Rows of key, parent, kind."""
        lines = self.ctr(*LIST).stdout.splitlines()[1:]
        return [line.split() for line in lines]

    # --- the end

    def close(self) -> None:
        """End everything, also shims and containers, and unmount what they left."""
        if "containerd" in self._processes:
            for task in self.ctr("tasks", "ls", "-q", check=False).stdout.split():
                self.ctr("tasks", "delete", "--force", task, check=False)
        for name in ("containerd", "snapshotter"):
            if name in self._processes:
                self.end(name)
        self._kill_shims()
        for mount in reversed(_mountinfo()):
            if mount.directory.startswith(f"{self.folder}/"):
                _libc.umount2(os.fsencode(mount.directory), MNT_DETACH)
        if "node" in self._processes:
            self.end("node")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_shims(self) -> None:
        """Those that serve this containerd: its address is on their command line."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"containerd-shim-runc-v2") and os.fsencode(self.address) in words:
                os.kill(int(entry.name), signal.SIGKILL)
