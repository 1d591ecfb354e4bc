"""Mixed load with random faults: `make soak`, or `python -m tests.e2e.restart.soak --minutes 30 --seed 1`.

Two nodes and a registry. The first node is watched: readers hash the files of its mount, of which its pool holds half, while
other mounts come and go. The second has a mount of its own and gives chunks to the first. Meanwhile the second one is killed
and comes back, the registry fails in turn in several ways, both are cut off, and file system processes are killed or
stopped. Prints one line of JSON; the status is 1 when a byte was wrong, a read failed or hung, or the watched node grew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from p2pgz.telemetry.process import anonymous_bytes
from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.restart.kills import send
from tests.e2e.restart.lazy_node import LazyNode, Readers, file_bytes, push_image, state_folder

FILES = 96
SMALL_FILES = 6
POOL_SHARE = 0.5
READERS = 2
SAMPLE_SECONDS = 5.0
FAULT_EVERY_SECONDS = (3.0, 9.0)
FAULT_LASTS_SECONDS = (0.5, 4.0)
WARM_UP_SHARE = 0.05
GROWTH_ALLOWED = 0.05
# Connections and requests in progress come and go: of a few dozen descriptors and tasks, so many more are no leak
MORE_ALLOWED = 10
LONGEST_WAIT_SECONDS = 30.0
EVER = 1 << 30


@dataclass(slots=True)
class Sample:
    """The watched node at one moment."""

    memory_bytes: int
    open_files: int
    tasks: int
    fs_bytes: int


@dataclass(slots=True)
class Soak:
    """All that runs, and what was seen."""

    watched: LazyNode
    other: LazyNode
    registry: RegistryThread
    rng: random.Random
    only: str = ""
    """faults with this in their names"""
    samples: list[Sample] = field(default_factory=list)
    faults_made: dict[str, int] = field(default_factory=dict)
    mounts_made: int = 0
    failures: list[str] = field(default_factory=list)

    def trouble(self) -> None:
        """One fault, for a while."""
        kinds: dict[str, Callable[[], Any]] = {
            "peer dies": self.peer_dies,
            "registry answers 500": lambda: self.registry_fails(Fault(on="/v2/", status=500, times=EVER)),
            "registry answers 429": lambda: self.registry_fails(
                Fault(on="/blobs/", status=429, headers={"retry-after": "1"}, times=EVER)
            ),
            "registry is silent": lambda: self.registry_fails(Fault(silent=True, times=EVER)),
            "registry cuts connections": lambda: self.registry_fails(
                Fault(on="/blobs/", drop_after=10_000, times=EVER)
            ),
            "cut off": self.cut_off,
            "fs killed": lambda: send(self.watched.fs_pids(), signal.SIGKILL),
            "fs paused": lambda: self.pause(self.watched.fs_pids()),
            "node paused": lambda: self.pause([pid_of(self.watched)]),
        }
        name = self.rng.choice([name for name in kinds if self.only in name])
        kinds[name]()
        self.faults_made[name] = self.faults_made.get(name, 0) + 1

    def lasting(self) -> None:
        time.sleep(self.rng.uniform(*FAULT_LASTS_SECONDS))

    def peer_dies(self) -> None:
        self.other.kill()
        self.lasting()
        self.other.start()

    def registry_fails(self, fault: Fault) -> None:
        self.registry.spoil(fault)
        self.lasting()
        self.registry.spoil()

    def cut_off(self) -> None:
        send([pid_of(self.other)], signal.SIGSTOP)
        self.registry_fails(Fault(silent=True, times=EVER))
        send([pid_of(self.other)], signal.SIGCONT)

    def pause(self, pids: list[int]) -> None:
        send(pids, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.1, 1.0))
        send(pids, signal.SIGCONT)

    def mount_and_unmount(self, reference: str, hashes: dict[str, str], directory: Path) -> None:
        """A second mount that comes and goes."""
        self.watched.call("mount", "--mode", "tree", "--no-fill", reference, directory)
        name = self.rng.choice(list(hashes))
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != hashes[name]:
            self.failures.append(f"second mount: {name}: wrong bytes")
        self.watched.call("umount", directory)
        self.mounts_made += 1

    def sample(self) -> None:
        node = self.watched.status()["node"]
        fs_bytes = 0
        for pid in self.watched.fs_pids():
            with suppress(OSError):
                fs_bytes += anonymous_bytes(Path(f"/proc/{pid}/status").read_text())
        self.samples.append(Sample(node["memory_bytes"], node["open_files"], node["tasks"], fs_bytes))
        self.registry.fake.requests.clear()


def pid_of(node: LazyNode) -> int:
    assert node.process is not None
    return node.process.pid


@contextmanager
def joined(folder: Path, quota_bytes: int) -> Iterator[tuple[LazyNode, LazyNode]]:
    """Both nodes; the one to be watched first."""
    common = {
        "P2PGZ_PEERS__LISTEN": "/ip4/127.0.0.1/tcp/0",
        "P2PGZ_LOG__LEVEL": "warning",
        "P2PGZ_POOL__SCRUB_INTERVAL_SECONDS": "3600",
    }
    for name in ("watched", "other"):
        (folder / name).mkdir()
    watched = LazyNode(
        folder / "watched" / "state", environment={**common, "P2PGZ_POOL__QUOTA_BYTES": str(quota_bytes)}
    )
    other = LazyNode(folder / "other" / "state", environment=dict(common))
    try:
        watched.start()
        address = watched.status()["node"]["addrs"][0]
        other.environment["P2PGZ_PEERS__BOOTSTRAP"] = address
        other.start()
        yield watched, other
    finally:
        for node in (watched, other):
            node.close()


def run(minutes: float, seed: int, *, only: str = "", density: float = 1.0) -> dict[str, Any]:
    """The figures, and what was wrong. `only`: see `Soak`; `density`: how much more often than usual there are faults."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        folder = stack.enter_context(state_folder())
        registry = stack.enter_context(RegistryThread.running())
        reference, hashes = push_image(folder / "plain", registry.address, seed, FILES)
        small, small_hashes = push_image(folder / "small", registry.address, seed + 1, SMALL_FILES)
        quota = int(POOL_SHARE * sum(map(file_bytes, range(FILES))))
        watched, other = stack.enter_context(joined(folder, quota))
        soak = Soak(watched, other, registry, rng, only)
        roots = {node: folder / name / "root" for name, node in (("watched", watched), ("other", other))}
        for node, root in roots.items():
            root.mkdir()
            node.call("mount", "--mode", "tree", "--no-fill", reference, root)
        second = folder / "second"
        second.mkdir()
        readers = stack.enter_context(Readers(roots[watched], hashes, seed, READERS))
        others_readers = stack.enter_context(Readers(roots[other], hashes, seed + 7, 1))
        begin = time.monotonic()
        ends_at, sample_at = begin + 60 * minutes, begin
        trouble_at = begin + FAULT_EVERY_SECONDS[1]
        longest = 0.0
        while (now := time.monotonic()) < ends_at and not (readers.faults or others_readers.faults):
            if now >= trouble_at:
                soak.trouble()
                trouble_at = time.monotonic() + rng.uniform(*FAULT_EVERY_SECONDS) / density
            elif now >= sample_at:
                soak.mount_and_unmount(small, small_hashes, second)
                soak.sample()
                longest = max(longest, readers.forget())
                sample_at = now + SAMPLE_SECONDS
            time.sleep(0.1)
        sources = watched.status()["sources"]
    soak.failures += [f"watched: {fault}" for fault in readers.faults]
    soak.failures += [f"other: {fault}" for fault in others_readers.faults]
    if longest > LONGEST_WAIT_SECONDS:
        soak.failures.append(f"a read took {longest:.1f} s")
    return {
        "campaign": "soak",
        "seed": seed,
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "files_read": readers.reads + others_readers.reads,
        "longest_wait_seconds": round(longest, 2),
        "mounts_made": soak.mounts_made,
        "faults_made": dict(sorted(soak.faults_made.items())),
        "chunks": {name: counts["chunks"] for name, counts in sources.items()},
        **judged(soak),
        "failures": soak.failures,
    }


def judged(soak: Soak) -> dict[str, Any]:
    """First against last third; what grew too much is a failure."""
    samples = soak.samples[int(WARM_UP_SHARE * len(soak.samples)) :]
    third = len(samples) // 3
    document: dict[str, Any] = {}
    for name in ("memory_bytes", "open_files", "tasks", "fs_bytes"):
        first = mean(getattr(sample, name) for sample in samples[:third])
        last = mean(getattr(sample, name) for sample in samples[-third:])
        growth = last / first - 1
        document[name] = {"first_third": round(first), "last_third": round(last), "growth": round(growth, 4)}
        few = name in {"open_files", "tasks"} and last - first <= MORE_ALLOWED
        if growth > GROWTH_ALLOWED and not few and name != "fs_bytes":  # killed ones begin anew
            soak.failures.append(f"{name} grew by {growth:.1%}")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--only", default="", help="only faults with this in their names")
    parser.add_argument("--density", type=float, default=1.0, help="so many times as many faults")
    arguments = parser.parse_args()
    figures = run(arguments.minutes, arguments.seed, only=arguments.only, density=arguments.density)
    print(json.dumps(figures))
    return bool(figures["failures"])


if __name__ == "__main__":
    sys.exit(main())
