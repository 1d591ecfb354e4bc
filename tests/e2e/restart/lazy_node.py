"""A real node in processes of its own, an eStargz image in a registry of this process, and files whose hashes are known."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME_ANNOTATION
from p2pgz.mount.umount import find_mounts, unmount
from tests.e2e.restart.ask_holder import ask

P2PGZ = [sys.executable, "-m", "p2pgz"]
COMMAND_SECONDS = 60
READY_FD = 200
FRESH_SHARE = 0.1
FILES = 48
FILE_BYTES = 512 << 10
ENDS_WITHIN_SECONDS = 8.0
HANGS_SECONDS = 70.0  # a read ends with an error after 60


def write_plain_layout(folder: Path, contents: dict[str, bytes]) -> None:
    """An OCI layout with one plain layer of these files, tagged `t`."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def store(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    layer = store(buffer.getvalue(), OCI_LAYER_TAR)
    config = {
        "os": "linux",
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        "config": {},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": store(json.dumps(config).encode(), OCI_CONFIG),
        "layers": [layer],
    }
    described = {
        **store(json.dumps(manifest).encode(), OCI_MANIFEST),
        "annotations": {REF_NAME_ANNOTATION: "t"},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def file_bytes(n: int) -> int:
    """Size of file `n`: no two have the same."""
    return FILE_BYTES + n * 1000


def push_image(
    folder: Path, registry: str, seed: int, files: int = FILES, *options: str
) -> tuple[str, dict[str, str]]:
    """A lazy image of random files in a registry: its reference, and the sha256 of each file. `options` of `convert`."""
    rng = random.Random(seed)
    contents = {f"f{n:03}": rng.randbytes(file_bytes(n)) for n in range(files)}
    write_plain_layout(folder, contents)
    reference = f"{registry}/lab/restart:t{seed}"
    run("convert", *options, f"oci:{folder}:t", reference)
    return reference, {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def run(
    *words: str | Path, check: bool = True, seconds: float = COMMAND_SECONDS
) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    done = subprocess.run(
        [*P2PGZ, *map(str, words)], capture_output=True, text=True, check=False, timeout=seconds, cwd="/"
    )
    if check and done.returncode:
        raise AssertionError(f"p2pgz {' '.join(map(str, words))}: {done.returncode}\n{done.stderr}")
    return done


class LazyNode:
    """A node on a state directory of its own. What the tests kill is found by its socket, never by name."""

    def __init__(self, state: Path, *, environment: dict[str, str] | None = None) -> None:
        self.state = state
        self.environment = {**os.environ, "P2PGZ_POOL__CHECK_FILESYSTEM": "false", **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.log = state.with_suffix(".log")

    def start(self, *, launcher: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> None:
        """Start the node and wait until it is ready. `launcher` is run in its place, and is to become it."""
        ready_read, low = os.pipe()
        # above those that a launcher numbers
        ready_write = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, READY_FD)
        os.close(low)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, *P2PGZ, "--state-dir", str(self.state), "node", "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                pass_fds=[ready_write, *pass_fds],
                cwd="/",
            )
        os.close(ready_write)
        with os.fdopen(ready_read) as ready:
            line = ready.readline()
        assert json.loads(line or "{}").get("event") == "ready", line + self.log.read_text()[-3000:]

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(ENDS_WITHIN_SECONDS)

    def call(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run("--state-dir", self.state, *words, check=check)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.call("status", "--json").stdout)
        return document

    def mount_of(self, directory: Path) -> dict[str, Any]:
        [found] = [mount for mount in self.status()["mounts"] if mount["dir"] == str(directory)]
        return found

    def holder_pid(self) -> int:
        pid: int = ask(self.state / "holder.sock", {"op": "list"})["pid"]
        return pid

    def fs_pids(self) -> list[int]:
        """The `fs` processes; none of a mount whose process is just being replaced, or whose holder is."""
        try:
            entries = ask(self.state / "holder.sock", {"op": "list"})["mounts"]
            return [
                entry["pid"] for entry in entries if entry["pid"]
            ]  # a signal to 0 would be one to ourselves
        except OSError:
            return []

    def fs_pid(self) -> int:
        """The one `fs` process, or segment host, once it is there."""
        wait_until(lambda: len(self.fs_pids()) == 1)
        return self.fs_pids()[0]

    def close(self) -> None:
        """Unmount everything below the state directory's parent, and end what is left."""
        for mount in find_mounts():
            if mount.directory.startswith(f"{self.state.parent}/"):
                with suppress(Exception):
                    unmount(mount.directory, lazy=True)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(ENDS_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        print(self.log.read_text()[-4000:], file=sys.stderr)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Look again and again until something holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


@contextmanager
def state_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="p2pgz-restart-") as folder:
        yield Path(folder)


class Readers:
    """Threads that hash files through the mount again and again, caches dropped; they note wrong bytes, errors and the
    longest wait. A file that nobody has read comes first, so that missing chunks are always among what is read."""

    def __init__(self, root: Path, hashes: dict[str, str], seed: int, count: int = 3, *more: Path) -> None:
        """`more` are other mounts of the same image; each reader has one of them all."""
        self.hashes = hashes
        roots = [root, *more]
        self.faults: list[str] = []
        self.longest_seconds = 0.0
        self._fresh = list(hashes)
        random.Random(seed).shuffle(self._fresh)
        self._stop = threading.Event()
        self._under_way = [0] * count
        self.files = [0] * count
        """how many each reader has read"""
        self._threads = [
            threading.Thread(
                target=self._read, args=(n, roots[n % len(roots)], random.Random(seed + n)), daemon=True
            )
            for n in range(count)
        ]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        hangs_at = time.monotonic() + HANGS_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, hangs_at - time.monotonic()))
            if thread.is_alive():
                self.faults.append("a reader hangs")

    @property
    def reads(self) -> int:
        """Files read so far."""
        return sum(self.files)

    def forget(self) -> float:
        """Start a new measurement; returns the longest wait of the old one."""
        longest, self.longest_seconds = self.longest_seconds, 0.0
        return longest

    def under_way(self) -> set[tuple[int, int]]:
        """The reads that have begun and not ended: number of the reader, number of the read."""
        return {(n, number) for n, number in enumerate(self._under_way) if number > 0}

    def _read(self, reader: int, root: Path, rng: random.Random) -> None:
        number = 0
        while not self._stop.is_set():
            name = (
                self._fresh.pop()
                if self._fresh and rng.random() < FRESH_SHARE
                else rng.choice(list(self.hashes))
            )
            try:
                digest = hashlib.sha256()
                begin = time.monotonic()
                fd = os.open(root / name, os.O_RDONLY)
                try:
                    os.posix_fadvise(
                        fd, 0, 0, os.POSIX_FADV_DONTNEED
                    )  # the page cache would hide what is tested
                    while True:
                        number += 1
                        self._under_way[reader] = number
                        piece = os.read(fd, 128 << 10)
                        self._under_way[reader] = 0
                        if not piece:
                            break
                        digest.update(piece)
                        self.longest_seconds = max(self.longest_seconds, time.monotonic() - begin)
                        begin = time.monotonic()
                finally:
                    self._under_way[reader] = 0
                    os.close(fd)
                if digest.hexdigest() != self.hashes[name]:
                    self.faults.append(f"{name}: wrong bytes")
            except OSError as error:
                self.faults.append(f"{name}: {error}")
            self.files[reader] += 1
