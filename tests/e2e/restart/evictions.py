"""Eviction under readers: `make evict`, or `python -m tests.e2e.restart.evictions --seconds 60 --seed 1`.

A pool of a tenth of an image, and readers over all of it, in tree and in erofs mode: nearly every read is of something that
was evicted, or is just being. Now and then `gc --all` takes everything at once, and processes are killed in the midst of it.
Prints one line of JSON; the status is 1 when a byte was wrong, a read failed or waited too long, or the quota did not hold.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from p2pgz.cli.client import connect
from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.lazy_node import LazyNode, Readers, push_image, state_folder

READERS = 4
QUOTA_SHARE = 0.1
# A read waits for its chunk alone, also when a removal is under way; after a kill of the node, besides, until the next one
# is there: half a second of work, which took 6 s at a load of 20 on two cores (`make kills` is strict about that)
WAIT_SECONDS = 5.0
KILL_EVERY_SECONDS = 6.0
GC_EVERY_SECONDS = 2.0
LOOK_SECONDS = 0.1
# Between two measurements the node counts the sizes of chunks; the disk counts pages, of which a file's last is not full
SLACK = 1.02
PAGE_BYTES = 4096
CHUNK_BYTES = 64 << 10
MODES = ("tree", "erofs")
Image = tuple[str, dict[str, str], int]
"""reference, the sha256 of each file, bytes"""
POOL_FIGURES = ("evicted_bytes", "evicted_chunks", "eviction_failures", "unkept_chunks")


class Campaign:
    """One node that has to make do with little room, one image in one mode."""

    def __init__(self, folder: Path, mode: str, image: Image, seed: int) -> None:
        self.mode = mode
        self.reference, self.hashes, self.image_bytes = image
        self.rng = random.Random(f"{seed} {mode}")
        self.quota_bytes = int(self.image_bytes * QUOTA_SHARE)
        settings = {"P2PGZ_POOL__QUOTA_BYTES": str(self.quota_bytes), "P2PGZ_PEERS__ENABLED": "never"}
        self.node = LazyNode(folder / mode / "state", environment=settings)
        self.root = folder / mode / "root"
        self.root.mkdir(parents=True)
        self.totals: dict[str, int] = {}
        self.most_bytes = 0
        self.kills: dict[str, int] = {}
        self.longest_restart_seconds = 0.0
        self._last: dict[str, int] = {}

    def run(self, seconds: float, *, kills: bool) -> tuple[dict[str, Any], list[str]]:
        """The figures and the faults."""
        try:
            self.node.start()
            self.node.call("mount", "--mode", self.mode, "--no-fill", self.reference, self.root)
            with Readers(self.root, self.hashes, self.rng.randrange(1 << 32), READERS) as readers:
                self._disturb(seconds, readers, kills=kills)
        finally:
            self.node.close()
        faults = [f"{self.mode}: {fault}" for fault in readers.faults]
        if readers.longest_seconds > (allowed := WAIT_SECONDS + self.longest_restart_seconds):
            faults.append(f"{self.mode}: waited {readers.longest_seconds:.2f} s, allowed {allowed:.2f}")
        if self.most_bytes > self.quota_bytes * SLACK + len(self.hashes) * PAGE_BYTES:
            faults.append(f"{self.mode}: {self.most_bytes} bytes in the pool, allowed {self.quota_bytes}")
        figures = {
            **self.totals,
            "image_bytes": self.image_bytes,
            "quota_bytes": self.quota_bytes,
            "most_bytes": self.most_bytes,
            "refetched_bytes": max(0, self.totals["fetched_bytes"] - self.image_bytes),
            "reads": readers.reads,
            "longest_wait_seconds": round(readers.longest_seconds, 3),
            "longest_restart_seconds": round(self.longest_restart_seconds, 3),
            "wrong": sum("wrong bytes" in fault for fault in readers.faults),
            "kills": self.kills,
        }
        return figures, faults

    def _disturb(self, seconds: float, readers: Readers, *, kills: bool) -> None:
        begin = time.monotonic()
        kill_at = begin + (self.rng.uniform(0.3, 1.0) * KILL_EVERY_SECONDS if kills else 1e9)
        gc_at = begin + self.rng.uniform(0.2, 1.0) * GC_EVERY_SECONDS
        while (now := time.monotonic()) < begin + seconds and not readers.faults:
            self._look()
            if (
                self.mode == "erofs"
            ):  # the kernel keeps the pages of segment files as well, or nobody would ask us
                Path("/proc/sys/vm/drop_caches").write_text("1")
            if now > gc_at:
                self.node.call("pool", "gc", "--all")
                gc_at = time.monotonic() + self.rng.uniform(0.5, 1.5) * GC_EVERY_SECONDS
            if now > kill_at:
                self._kill()
                kill_at = time.monotonic() + self.rng.uniform(0.5, 1.5) * KILL_EVERY_SECONDS
            time.sleep(self.rng.uniform(0.5, 1.5) * LOOK_SECONDS)
        self._look()

    def _look(self) -> None:
        """Add up what the node counts, whose counters begin again when it is killed."""
        status = ask_status(self.node)
        pool, sources = status["pool"], status["sources"]
        now = {name: pool[name] for name in POOL_FIGURES} | {"fetched_bytes": sources["registry"]["bytes"]}
        for name, value in now.items():
            self.totals[name] = self.totals.get(name, 0) + value - self._last.get(name, 0)
        self._last = now
        self.most_bytes = max(self.most_bytes, blocks_bytes(self.node.state / "pool"))

    def _kill(self) -> None:
        """The node, or in tree mode `fs`; with a removal under way as likely as not."""
        what = self.rng.choice(["node", "fs"] if self.mode == "tree" else ["node"])
        self.kills[what] = self.kills.get(what, 0) + 1
        if what == "fs":
            for pid in self.node.fs_pids():
                with suppress(ProcessLookupError):
                    if pid:
                        os.kill(pid, signal.SIGKILL)
            return
        self._look()
        self._last = {}
        begin = time.monotonic()
        self.node.kill()
        self.node.start()
        self.longest_restart_seconds = max(self.longest_restart_seconds, time.monotonic() - begin)


def blocks_bytes(directory: Path) -> int:
    """What the segment files take on the disk, whatever the node says."""
    total = 0
    for path in directory.glob("*.seg"):
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def ask_status(node: LazyNode) -> dict[str, Any]:
    """`p2pgz status --json`, without a process for it."""
    with closing(http.client.HTTPConnection("localhost")) as connection:
        connection.sock = connect(node.state / "api.sock")
        connection.request("GET", "/v1/status", headers={"Connection": "close"})
        document: dict[str, Any] = json.loads(connection.getresponse().read())
        return document


def push(folder: Path, registry: str, seed: int, files: int) -> Image:
    """An image of small chunks, and how large it is."""
    reference, hashes = push_image(folder, registry, seed, files, "--chunk-size", str(CHUNK_BYTES))
    return reference, hashes, sum(path.stat().st_size for path in (folder / "blobs").rglob("*"))


def run(seconds: float, seed: int, *, files: int, modes: tuple[str, ...] = MODES) -> dict[str, Any]:
    """The campaign; the figures and faults."""
    figures: dict[str, Any] = {"campaign": "evict", "seed": seed}
    faults: list[str] = []
    begin = time.monotonic()
    with state_folder() as folder, running_registry(folder / "registry") as registry:
        image = push(folder / "plain", registry.address, seed, files)
        for mode in modes:
            figures[mode], found = Campaign(folder, mode, image, seed).run(seconds, kills=True)
            faults += found
    return figures | {"faults": faults, "seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="in each mode")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--files", type=int, default=192)
    parser.add_argument("--mode", choices=MODES)
    arguments = parser.parse_args()
    modes = (arguments.mode,) if arguments.mode else MODES
    figures = run(arguments.seconds, arguments.seed, files=arguments.files, modes=modes)
    print(json.dumps(figures))
    return bool(figures["faults"])


if __name__ == "__main__":
    sys.exit(main())
