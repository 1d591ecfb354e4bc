"""What a start-up list brings: seconds, requests and bytes from mount to READY, over a link of a given rate and delay.

    python -m tests.perf.startup_bench [--mbit 100] [--rtt-ms 20] [--repeat 5] [--image redis] [--cache .cache]

Root; wants docker-registry and the tools of `tests/e2e/lab_images.py`. Each trial is a new state directory with an empty
pool; `list` trials have the list file of one earlier start in it, `marked` ones mount what `p2pgz optimize` made of that
list, `peer` ones have a warm peer beside the registry and no list of their own. The order is random; medians and ranges are
printed, then a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2pgz.testing.docker_registry import running_registry
from tests.e2e import lab_images
from tests.e2e.cli.running import umount
from tests.e2e.peers.swarm import SwarmNode, wait_until

READY_SECONDS = 120.0
KINDS = ("none", "list", "marked", "peer")


@contextmanager
def slow_link(address: str, mbit: float, rtt_ms: float) -> Iterator[str]:
    """The registry as it looks from far away: host:port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pgz.testing.slow_link", address, str(mbit), str(rtt_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield f"127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait(10)


def start(node: SwarmNode, reference: str) -> dict[str, Any]:
    """Mount, run the image until it says READY, unmount."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    before = time.monotonic()
    node.ok("mount", "--plain-http", reference, node.root, timeout=READY_SECONDS)
    command = (
        'mount -t tmpfs none "$0/tmp" && mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" '
        '&& exec timeout -s KILL 60 chroot "$0" /app/run'
    )
    program = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", command, str(node.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert program.stdout is not None
    said = []
    for line in program.stdout:
        said.append(line.strip())
        if said[-1] == lab_images.READY:
            break
    seconds = time.monotonic() - before
    assert lab_images.READY in said, said
    status = node.status()
    program.stdout.read()
    program.wait(READY_SECONDS)
    registry = status["sources"]["registry"]
    umount(node.root)
    wait_until(lambda: not node.mounts())
    return {
        "seconds": seconds,
        "requests": registry["requests"],
        "wire_bytes": registry["wire_bytes"],
        "peer_bytes": status["sources"]["peer"]["bytes"],
        **status["mounts"][0]["startup"],
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    layout = lab_images.image_layout(options.cache)
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with running_registry(folder / "registry") as registry:
        near = f"{registry.address}/lab/{options.image}:es"
        marked = near.replace(":es", ":eo")
        first = SwarmNode(folder / "first")
        with slow_link(registry.address, options.mbit, options.rtt_ms) as far_address:
            far = near.replace(registry.address, far_address)
            try:
                first.ok("convert", "--plain-http", f"oci:{layout}:{options.image}", near, timeout=600)
                first.start_node()
                start(first, near)
                first.ok("optimize", "--plain-http", near, marked, timeout=600)
                lists = first.state / "startup"
                trials = [kind for kind in options.kinds for _ in range(options.repeat)]
                random.Random(options.seed).shuffle(trials)
                for number, kind in enumerate(trials):
                    node = SwarmNode(folder / f"trial{number}")
                    try:
                        if kind == "list":
                            shutil.copytree(lists, node.state / "startup")
                        if kind == "peer":
                            node.join(first)
                            wait_until(node.peer_ids)
                        else:
                            node.start_node(P2PGZ_PEERS__ENABLED="never")
                        reference = far.replace(":es", ":eo") if kind == "marked" else far
                        results[kind].append(start(node, reference))
                        print(kind, results[kind][-1], file=sys.stderr)
                    finally:
                        node.close()
            finally:
                first.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--rtt-ms", type=float, default=20)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--image", default=lab_images.REDIS)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pgz-startup-", dir="/var/tmp") as folder:
        results = measure(Path(folder), options)
    print(f"{options.image}, {options.mbit:g} Mbit/s, {options.rtt_ms:g} ms, n={options.repeat}")
    print(
        "| kind | seconds min / median / max | requests | MB from the registry | hit rate |\n| --- | --- | --- | --- | --- |"
    )
    for kind in options.kinds:
        found = results[kind]
        seconds = sorted(trial["seconds"] for trial in found)
        hits = statistics.median(trial["hit_chunks"] / max(1, trial["read_chunks"]) for trial in found)
        requests, wire = (
            statistics.median(trial[key] for trial in found) for key in ("requests", "wire_bytes")
        )
        row = f"{seconds[0]:.2f} / {statistics.median(seconds):.2f} / {seconds[-1]:.2f}"
        print(f"| {kind} | {row} | {requests:.0f} | {wire / 1e6:.1f} | {hits:.2f} |")
    print(
        json.dumps(
            {"image": options.image, "mbit": options.mbit, "rtt_ms": options.rtt_ms, "trials": results}
        )
    )


if __name__ == "__main__":
    main()
