"""How long a read through the mount takes when a connected peer has the chunk and this host has not.

    python tests/perf/peer_read.py [--files 400] [--bytes 65536] [--directory DIR]

Two real nodes on loopback and an image of small files, one chunk each; the cold node's mount reads them one by one, open to
last byte. The whole of it (FUSE, decision, request, transfer, verification, pool, answer) is an upper bound of the decision,
whose bar is 5 ms. Beside it the same read when the chunk is in the pool (page cache of the mount dropped). As root. Ends
with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.peers.swarm import SwarmNode, wait_until
from tests.e2e.restart.lazy_node import run, write_plain_layout


def read_all(root: Path, names: list[str]) -> list[float]:
    """Milliseconds of each read."""
    took = []
    for name in names:
        start = time.perf_counter()
        (root / name).read_bytes()
        took.append((time.perf_counter() - start) * 1000)
    return took


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(milliseconds), 2),
        "p99_ms": round(statistics.quantiles(milliseconds, n=100)[98], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--bytes", type=int, default=65536)
    parser.add_argument("--directory", default="/var/tmp")
    options = parser.parse_args()
    rng = random.Random(1)
    contents = {f"f{n:04}": rng.randbytes(options.bytes) for n in range(options.files)}
    names = sorted(contents)
    rng.shuffle(names)  # no read-ahead across files
    with tempfile.TemporaryDirectory(dir=options.directory) as text:
        folder = Path(text)
        with running_registry(folder / "registry") as registry:
            write_plain_layout(folder / "layout", contents)
            reference = f"{registry.address}/bench/read:t"
            run("convert", f"oci:{folder}/layout:t", reference)
            warm, cold = SwarmNode(folder / "warm"), SwarmNode(folder / "cold")
            try:
                warm.start_node()
                warm.ok("verify", reference)
                cold.join(warm)
                wait_until(cold.peer_ids)
                cold.ok("mount", "--no-fill", reference, cold.root)
                from_peer = read_all(cold.root, names)
                Path("/proc/sys/vm/drop_caches").write_text("3\n")
                from_pool = read_all(cold.root, names)
                supplied = cold.sources()
                cold.run("umount", cold.root)
            finally:
                cold.close()
                warm.close()
    assert supplied["registry"]["bytes"] == 0, supplied
    print(
        json.dumps(
            {"files": options.files, "peer": quantiles(from_peer), "pool": quantiles(from_pool), "bar_ms": 5}
        )
    )


if __name__ == "__main__":
    main()
