"""Random kills under readers: `make kills`, or `python -m tests.e2e.restart.kills --count 500 --seed 1`.

Readers hash files of a mounted image all the time; the pool holds half of it, so that bytes are always being evicted and
fetched. Each step waits until a read is under way, then kills or stops something, and is over when every reader has got on.
Prints one line of JSON; the status is 1 when a byte was wrong, a read failed, or a wait was too long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from p2pgz.mount.umount import unmount
from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.lazy_node import P2PGZ, LazyNode, Readers, file_bytes, push_image, state_folder

READERS = 3
PROGRESS_SECONDS = 90.0
FS_WAIT_SECONDS = 2.0
NODE_WAIT_SECONDS = 5.0
STOPPED_WAIT_SECONDS = 16.0  # a stopped process is noticed after ten pings, a second apart
PAUSE_SECONDS = 1.0
OTHER_MOUNT_SECONDS = 20.0
UPGRADE_SECONDS = 70.0
UNDER_WAY_SECONDS = 5.0
POOL_SHARE = 0.5
# step -> weight, longest wait allowed
STEPS = {
    "fs": (6, FS_WAIT_SECONDS),
    "fs twice": (2, FS_WAIT_SECONDS * 2),
    "fs paused": (2, FS_WAIT_SECONDS),
    "node": (4, NODE_WAIT_SECONDS),
    "node paused": (2, NODE_WAIT_SECONDS),
    "both": (3, NODE_WAIT_SECONDS),
    "both paused": (2, NODE_WAIT_SECONDS),
    "holder": (1, FS_WAIT_SECONDS),
    "attach, fs": (1, FS_WAIT_SECONDS),
    "attach, node": (1, NODE_WAIT_SECONDS),
    "eviction, fs": (2, FS_WAIT_SECONDS),
    "eviction, node": (2, NODE_WAIT_SECONDS),
    "eviction, both": (1, NODE_WAIT_SECONDS),
    "upgrade": (1, NODE_WAIT_SECONDS),
    "upgrade, fs": (1, NODE_WAIT_SECONDS),
    "upgrade, node": (1, NODE_WAIT_SECONDS * 2),
    "upgrade, both": (1, NODE_WAIT_SECONDS * 2),
    "fs stopped": (0, STOPPED_WAIT_SECONDS),
}


class Campaign:
    """One node, one image, one seed."""

    def __init__(self, node: LazyNode, reference: str, readers: Readers, rng: random.Random) -> None:
        self.node = node
        self.reference = reference
        self.readers = readers
        self.rng = rng
        self.other = node.state.parent / "other"
        self.strikes = 0
        self.caught = 0
        """strikes that hit a read under way"""
        self.evicted_bytes = 0

    def step(self, name: str) -> None:
        """One of STEPS: what is going on, and who is killed meanwhile."""
        during, _, victim = name.rpartition(", ")
        if victim in {"attach", "eviction", "upgrade"}:
            during, victim = victim, ""
        if victim in {"node", "both"}:
            self.note_evicted()
        with self.going_on(during, killed=victim):
            match victim:
                case "fs":
                    self.strike_fs(signal.SIGKILL)
                case "fs twice":
                    self.strike_fs(signal.SIGKILL)
                    time.sleep(self.rng.uniform(0, 0.1))
                    self.strike_fs(signal.SIGKILL)
                case "fs paused" | "node paused" | "both paused":
                    self.pause(victim)
                case "fs stopped":
                    stopped = set(self.node.fs_pids())
                    self.strike_fs(signal.SIGSTOP)
                    self.wait_replaced(stopped)
                case "node":
                    self.strike(self.node.kill)
                    time.sleep(self.rng.uniform(0, 0.3))
                    self.node.start()
                case "both":
                    pids = self.node.fs_pids()
                    self.strike(lambda: (self.node.kill(), send(pids, signal.SIGKILL)))
                    self.node.start()
                case "holder":
                    self.kill_holder()

    def note_evicted(self) -> None:
        """A node counts from its start."""
        self.evicted_bytes += self.node.status()["pool"]["evicted_bytes"]

    def all_get_on(self) -> bool:
        """Wait until every reader has ended the file it reads and another one; whether they did."""
        goals = [count + 2 for count in self.readers.files]
        deadline = time.monotonic() + PROGRESS_SECONDS
        while any(count < goal for count, goal in zip(self.readers.files, goals, strict=True)):
            if self.readers.faults:
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def strike(self, blow: Callable[[], object]) -> None:
        """Do it while a read is under way, and see whether that read was still waiting afterwards."""
        deadline = time.monotonic() + UNDER_WAY_SECONDS
        while not (before := self.readers.under_way()) and time.monotonic() < deadline:
            time.sleep(0)
        blow()
        self.strikes += 1
        self.caught += bool(before & self.readers.under_way())

    def strike_fs(self, number: int) -> None:
        pids = self.node.fs_pids()
        self.strike(lambda: send(pids, number))

    def wait_replaced(self, pids: set[int]) -> None:
        """Readers in erofs mode may get on by what the kernel has; the next step is not to meet a stopped process."""
        deadline = time.monotonic() + 2 * STOPPED_WAIT_SECONDS
        while pids & set(self.node.fs_pids()):
            assert time.monotonic() < deadline, "a stopped process is not replaced"
            time.sleep(0.05)

    def pause(self, victim: str) -> None:
        assert self.node.process is not None
        pids = [] if victim == "fs paused" else [self.node.process.pid]
        if victim != "node paused":
            pids += self.node.fs_pids()
        self.strike(lambda: send(pids, signal.SIGSTOP))
        time.sleep(self.rng.uniform(0.1, PAUSE_SECONDS))
        send(pids, signal.SIGCONT)

    def kill_holder(self) -> None:
        self.strike(lambda: os.kill(self.node.holder_pid(), signal.SIGKILL))
        # until it has the descriptors again: killing both at once ends a mount, by design
        deadline = time.monotonic() + 10
        while not all(self.node.fs_pids() or [0]):
            assert time.monotonic() < deadline, "no new holder"
            time.sleep(0.02)

    @contextmanager
    def going_on(self, what: str, *, killed: str) -> Iterator[None]:
        """Attach another mount, evict, or upgrade, and be somewhere in the middle of it."""
        if what == "attach":
            self.other.mkdir(exist_ok=True)
            command = self.start("mount", "--no-fill", self.reference, self.other)
            time.sleep(self.rng.uniform(0.1, 0.8))
        elif what == "eviction":
            command = self.start("pool", "gc", "--all")
            time.sleep(self.rng.uniform(0.2, 0.6))
        elif what == "upgrade":
            command = self.start("upgrade")
            if killed:
                time.sleep(self.rng.uniform(0.1, 1.5))
        else:
            yield
            return
        if killed in {"node", "both"}:
            command.kill()  # it would start a node of its own while ours is away
        yield
        if what == "upgrade" and killed not in {"node", "both"}:
            assert command.wait(UPGRADE_SECONDS) == 0, "upgrade failed"
        command.wait(OTHER_MOUNT_SECONDS)
        if what == "attach":
            with suppress(Exception):  # whether it is mounted depends on the moment of the kill
                unmount(self.other, lazy=True)

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*P2PGZ, "--state-dir", str(self.node.state), *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            if pid:
                os.kill(pid, number)


def run(
    count: int,
    seed: int,
    *,
    stop_fs: bool,
    files: int,
    slack: float = 1.0,
    modes: Sequence[str] = ("erofs", "tree"),
) -> dict[str, object]:
    """The campaign; the figures and faults. `slack`: what the longest waits allowed are multiplied by. The image is mounted
    once in each of the modes, and what is killed is killed for all."""
    rng = random.Random(seed)
    weights = {name: weight for name, (weight, _) in STEPS.items()} | ({"fs stopped": 1} if stop_fs else {})
    done: dict[str, int] = {}
    longest: dict[str, float] = {}
    faults: list[str] = []
    begin = time.monotonic()
    with state_folder() as folder, running_registry(folder / "registry") as registry:
        reference, hashes = push_image(folder / "plain", registry.address, seed, files)
        quota = int(POOL_SHARE * sum(map(file_bytes, range(files))))
        node = LazyNode(folder / "state", environment={"P2PGZ_POOL__QUOTA_BYTES": str(quota)})
        roots = [folder / mode for mode in modes]
        try:
            node.start()
            for mode, root in zip(modes, roots, strict=True):
                root.mkdir()
                node.call("mount", "--mode", mode, "--no-fill", reference, root)
            with Readers(roots[0], hashes, seed, READERS, *roots[1:]) as readers:
                campaign = Campaign(node, reference, readers, rng)
                for number in range(count):
                    name = rng.choices(list(weights), list(weights.values()))[0]
                    time.sleep(rng.uniform(0.02, 0.2))
                    readers.forget()
                    campaign.step(name)
                    hangs = not campaign.all_get_on()
                    waited = readers.forget()
                    done[name] = done.get(name, 0) + 1
                    longest[name] = max(longest.get(name, 0.0), waited)
                    if hangs:
                        faults.append(f"step {number} ({name}): readers hang")
                    if waited > (allowed := STEPS[name][1] * slack):
                        faults.append(f"step {number} ({name}): waited {waited:.2f} s, allowed {allowed:.0f}")
                    faults += [f"step {number} ({name}): {fault}" for fault in readers.faults]
                    if faults and ("hang" in faults[-1] or readers.faults):
                        break
            campaign.note_evicted()
            if faults:
                print(node.log.read_text(errors="replace")[-6000:], file=sys.stderr)
        finally:
            node.close()
    return {
        "campaign": "kills",
        "modes": list(modes),
        "seed": seed,
        "kills": sum(done.values()),
        "blows": campaign.strikes,
        "blows_that_hit_a_read": campaign.caught,
        "by_kind": done,
        "longest_wait_seconds": {name: round(value, 3) for name, value in longest.items()},
        "files_read": readers.reads,
        "evicted_bytes": campaign.evicted_bytes,
        "faults": faults,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--files", type=int, default=192)
    parser.add_argument("--mode", choices=("erofs", "tree"), action="append", help="default: both at once")
    arguments = parser.parse_args()
    modes = arguments.mode or ("erofs", "tree")
    figures = run(arguments.count, arguments.seed, stop_fs=True, files=arguments.files, modes=modes)
    print(json.dumps(figures))
    return bool(figures["faults"])


if __name__ == "__main__":
    sys.exit(main())
