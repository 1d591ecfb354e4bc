"""Random kills under readers: `make kills`, or `python -m tests.e2e.restart.kills --count 500 --seed 1`.

Readers hash files of a mounted image all the time, some never read before. Each step kills something; it is over when every
reader has got on. Prints one line of JSON; the status is 1 when a byte was wrong, a read failed, or a wait was too long.
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
from collections.abc import Callable
from contextlib import suppress

from p2pgz.mount.umount import unmount
from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.lazy_node import P2PGZ, LazyNode, Readers, push_image, state_folder

READERS = 3
PROGRESS_SECONDS = 90.0
FS_WAIT_SECONDS = 2.0
NODE_WAIT_SECONDS = 5.0
STOPPED_WAIT_SECONDS = 16.0  # a stopped process is noticed after ten pings, a second apart
OTHER_MOUNT_SECONDS = 20.0
# step -> weight, longest wait allowed
STEPS = {
    "fs": (6, FS_WAIT_SECONDS),
    "fs twice": (2, FS_WAIT_SECONDS * 2),
    "node": (4, NODE_WAIT_SECONDS),
    "both": (3, NODE_WAIT_SECONDS),
    "node stopped": (2, NODE_WAIT_SECONDS),
    "holder": (1, FS_WAIT_SECONDS),
    "attach": (2, NODE_WAIT_SECONDS),
    "upgrade": (1, NODE_WAIT_SECONDS),
    "upgrade killed": (1, NODE_WAIT_SECONDS * 2),
    "fs stopped": (0, STOPPED_WAIT_SECONDS),
}


class Campaign:
    """One node, one image, one seed."""

    def __init__(self, node: LazyNode, reference: str, rng: random.Random) -> None:
        self.node = node
        self.reference = reference
        self.rng = rng
        self.root = node.state.parent / "root"
        self.other = node.state.parent / "other"
        self.steps: dict[str, Callable[[], None]] = {
            "fs": self.kill_fs,
            "fs twice": self.kill_fs_twice,
            "node": self.kill_node,
            "both": self.kill_both,
            "node stopped": self.stop_node,
            "holder": self.kill_holder,
            "attach": self.kill_while_attaching,
            "upgrade": lambda: self.upgrade(kill=False),
            "upgrade killed": lambda: self.upgrade(kill=True),
            "fs stopped": self.stop_fs,
        }

    def kill_fs(self) -> None:
        for pid in self.node.fs_pids():
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)

    def kill_fs_twice(self) -> None:
        self.kill_fs()
        time.sleep(self.rng.uniform(0, 0.1))
        self.kill_fs()

    def kill_node(self) -> None:
        self.node.kill()
        time.sleep(self.rng.uniform(0, 0.3))
        self.node.start()

    def kill_both(self) -> None:
        pids = self.node.fs_pids()
        self.node.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)
        self.node.start()

    def stop_node(self) -> None:
        assert self.node.process is not None
        self.node.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.1, 1.0))
        self.node.process.send_signal(signal.SIGCONT)

    def stop_fs(self) -> None:
        for pid in self.node.fs_pids():
            os.kill(pid, signal.SIGSTOP)

    def kill_holder(self) -> None:
        os.kill(self.node.holder_pid(), signal.SIGKILL)
        # until it has the descriptors again: killing both at once ends a mount, by design
        deadline = time.monotonic() + 10
        while not all(self.node.fs_pids() or [0]):
            assert time.monotonic() < deadline, "no new holder"
            time.sleep(0.02)

    def kill_while_attaching(self) -> None:
        self.other.mkdir(exist_ok=True)
        command = [
            *P2PGZ,
            "--state-dir",
            str(self.node.state),
            "mount",
            "--mode",
            "tree",
            "--no-fill",
            self.reference,
            str(self.other),
        ]
        mounting = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        time.sleep(self.rng.uniform(0.1, 0.8))
        if self.rng.random() < 0.5:
            self.kill_fs()
        else:
            mounting.kill()  # it would start a node of its own while ours is away
            self.kill_node()
        mounting.wait(OTHER_MOUNT_SECONDS)
        with suppress(Exception):  # whether it is mounted depends on the moment of the kill
            unmount(self.other, lazy=True)

    def upgrade(self, *, kill: bool) -> None:
        upgrading = subprocess.Popen(
            [*P2PGZ, "--state-dir", str(self.node.state), "upgrade"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        if kill:
            time.sleep(self.rng.uniform(0.1, 1.5))
            upgrading.kill()
            upgrading.wait()
            self.kill_node()
        else:
            assert upgrading.wait(70) == 0, "upgrade failed"


def run(count: int, seed: int, *, stop_fs: bool, files: int) -> dict[str, object]:
    """The campaign; the figures and faults."""
    rng = random.Random(seed)
    weights = {name: weight for name, (weight, _) in STEPS.items()} | ({"fs stopped": 1} if stop_fs else {})
    done: dict[str, int] = {}
    longest: dict[str, float] = {}
    faults: list[str] = []
    begin = time.monotonic()
    with state_folder() as folder, running_registry(folder / "registry") as registry:
        reference, hashes = push_image(folder / "plain", registry.address, seed, files)
        node = LazyNode(folder / "state")
        try:
            node.start()
            campaign = Campaign(node, reference, rng)
            campaign.root.mkdir()
            node.call("mount", "--mode", "tree", "--no-fill", reference, campaign.root)
            with Readers(campaign.root, hashes, seed, READERS) as readers:
                for number in range(count):
                    name = rng.choices(list(weights), list(weights.values()))[0]
                    time.sleep(rng.uniform(0.02, 0.2))
                    readers.forget()
                    goal = readers.reads + 2 * READERS
                    campaign.steps[name]()
                    deadline = time.monotonic() + PROGRESS_SECONDS
                    while readers.reads < goal and time.monotonic() < deadline and not readers.faults:
                        time.sleep(0.01)
                    waited = readers.forget()
                    done[name] = done.get(name, 0) + 1
                    longest[name] = max(longest.get(name, 0.0), waited)
                    if readers.reads < goal and not readers.faults:
                        faults.append(f"step {number} ({name}): readers hang")
                    if waited > STEPS[name][1]:
                        faults.append(
                            f"step {number} ({name}): waited {waited:.2f} s, allowed {STEPS[name][1]:.0f}"
                        )
                    faults += [f"step {number} ({name}): {fault}" for fault in readers.faults]
                    if faults and ("hang" in faults[-1] or readers.faults):
                        break
            reads = readers.reads
            if faults:
                print(node.log.read_text(errors="replace")[-6000:], file=sys.stderr)
        finally:
            node.close()
    return {
        "campaign": "kills",
        "seed": seed,
        "kills": sum(done.values()),
        "by_kind": done,
        "longest_wait_seconds": {name: round(value, 3) for name, value in longest.items()},
        "reads": reads,
        "faults": faults,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--files", type=int, default=192)
    arguments = parser.parse_args()
    figures = run(arguments.count, arguments.seed, stop_fs=True, files=arguments.files)
    print(json.dumps(figures))
    return bool(figures["faults"])


if __name__ == "__main__":
    sys.exit(main())
