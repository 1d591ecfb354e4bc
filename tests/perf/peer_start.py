"""Start-up of an image with one warm peer beside the same with the registry only; alternating runs on one machine.

    python tests/perf/peer_start.py --image oci:DIR:TAG [--image ...] --command '/lab/run' --until LAB-READY
        [--runs 7] [--registry-mbit 100] [--registry-rtt-ms 20] [--peer-mbit 1000] [--directory DIR]

Debian's docker-registry behind a link of that rate and round-trip time; a peer that has the whole image; and, for each
run, a fresh node with an empty pool, page cache dropped. The clock runs from the start of `p2pgz mount` until the command,
run in a chroot of the mount (an overlay on it), prints the marker. As root. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.peers.swarm import SwarmNode, wait_until

MARKER_WITHIN_SECONDS = 120


class Link:
    """A process of `p2pgz.testing.slow_link`."""

    def __init__(self, target: str, mbit: float, rtt_ms: float) -> None:
        command = [sys.executable, "-m", "p2pgz.testing.slow_link", target, str(mbit), str(rtt_ms)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = f"127.0.0.1:{self._process.stdout.readline().strip()}"

    def down_bytes(self) -> int:
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["down_bytes"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


def start_up(node: SwarmNode, reference: str, command: str, marker: str) -> float:
    """Seconds from `p2pgz mount` to the marker."""
    over = node.home / "over"
    for name in ("upper", "work", "root"):
        (over / name).mkdir(parents=True)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    script = (
        f"mount -t overlay overlay -o lowerdir={node.root},upperdir={over}/upper,workdir={over}/work {over}/root "
        f"&& mount -t proc proc {over}/root/proc && mount --bind /dev {over}/root/dev "
        f"&& exec chroot {over}/root {command}"
    )
    start = time.monotonic()
    node.ok("mount", "--no-fill", "--plain-http", reference, node.root)
    run = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for line in run.stdout:
            if marker.encode() in line:
                return time.monotonic() - start
            if time.monotonic() - start > MARKER_WITHIN_SECONDS:
                break
    finally:
        run.kill()
        run.wait()
    raise SystemExit(f"{command} did not print {marker}")


def measure(options: argparse.Namespace, image: str, folder: Path) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {"registry": [], "peer": []}
    with ExitStack() as stack:
        registry = stack.enter_context(running_registry(folder / "registry"))
        link = Link(registry.address, options.registry_mbit, options.registry_rtt_ms)
        stack.callback(link.close)
        name = "bench/image:lazy"
        warm = SwarmNode(
            folder / "warm",
            P2PGZ_PEERS__UPLOAD_BYTES_PER_SECOND=str(int(options.peer_mbit * 1e6 / 8)),
        )
        stack.callback(warm.close)
        warm.ok("convert", "--plain-http", image, f"{registry.address}/{name}", timeout=900)
        warm.start_node()
        warm.ok("verify", "--plain-http", f"{registry.address}/{name}", timeout=600)
        for run in range(options.runs):
            for system in rows if run % 2 else reversed(rows):
                node = SwarmNode(folder / f"{system}{run}")
                with ExitStack() as ending:
                    ending.callback(shutil.rmtree, node.home, ignore_errors=True)
                    ending.callback(node.close)
                    if system == "peer":
                        node.join(warm)
                        wait_until(node.peer_ids)
                    else:
                        node.start_node(P2PGZ_PEERS__ENABLED="never")
                    before, asked = link.down_bytes(), len(registry.requests())
                    seconds = start_up(node, f"{link.address}/{name}", options.command, options.until)
                    blobs = [
                        line for line in registry.requests()[asked:] if "/blobs/" in line and "GET" in line
                    ]
                    rows[system].append(
                        {
                            "seconds": round(seconds, 3),
                            "registry_bytes": link.down_bytes() - before,
                            "blob_requests": len(blobs),
                        }
                    )
                    node.run("umount", node.root)
                print(image, system, rows[system][-1], file=sys.stderr, flush=True)
    medians = {system: statistics.median(row["seconds"] for row in found) for system, found in rows.items()}
    return {
        "image": image.rpartition(":")[2],
        "median_s": medians,
        "range_s": {
            system: [min(row["seconds"] for row in found), max(row["seconds"] for row in found)]
            for system, found in rows.items()
        },
        "ratio": round(medians["peer"] / medians["registry"], 3),
        "peer_blob_requests": max(row["blob_requests"] for row in rows["peer"]),
        "peer_registry_bytes": max(row["registry_bytes"] for row in rows["peer"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image", action="append", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--until", required=True)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--registry-mbit", type=float, default=100)
    parser.add_argument("--registry-rtt-ms", type=float, default=20)
    parser.add_argument("--peer-mbit", type=float, default=1000)
    parser.add_argument("--directory", default="/var/tmp")
    options = parser.parse_args()
    found = []
    for image in options.image:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            found.append(measure(options, image, Path(folder)))
    print(json.dumps({"runs": options.runs, "bar": 0.5, "images": found}))


if __name__ == "__main__":
    main()
