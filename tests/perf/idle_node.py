"""What a node costs that has nothing to do: 10 mounts, 40 peers that have the same images and follow what it has, all in a
cluster of 1000 members of which 1 % sign anew each minute.

    .venv/bin/python -m tests.perf.idle_node [--seconds 60] [--mounts 10] [--peers 40] [--members 1000] [--layers 5]
        [--files 200]

Prints one JSON document: the node's resident memory as each part comes, in MB: its own, pages of libraries, and pages of
pool, trees and index, which the kernel keeps as long as it likes and which do not count; and the share of a core that it
takes while it is idle. The peers are exchanges in this process, over loopback, with bitmaps and no bytes. Bounds: 150 MB,
1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.p2p.exchange import Exchange
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.cli.running import P2pgz
from tests.e2e.peers.swarm import SwarmNode
from tests.e2e.restart.lazy_node import state_folder
from tests.perf.many_members import open_cluster

SETTLE_SECONDS = 5.0
MEMBERS_SECONDS = 95.0  # links that nobody needs are given up when partners are chosen the third time
CHOSEN_BY = 6  # members that have the node among their own six partners, on average
CHURN_PER_MINUTE = 0.01
TICKS = os.sysconf("SC_CLK_TCK")


def memory(pid: int, state: Path) -> dict[str, float]:
    """Resident megabytes of a process, by what is mapped there."""
    found = {"own": 0, "libraries": 0, "state files": 0}
    kind = "own"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            path = rest[4] if len(rest) > 4 else ""
            kind = "state files" if path.startswith(str(state)) else "libraries" if path[:1] == "/" else "own"
        elif head == "Rss:":
            size = int(rest[0])
            found[kind] += size
        elif head == "Anonymous:" and kind == "libraries":  # their data, changed by us
            found["own"] += int(rest[0])
            found["libraries"] -= int(rest[0])
    return {name: round(size / 1024, 1) for name, size in found.items()}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def imports(*modules: str) -> float:
    """Resident megabytes of a Python that has imported these."""
    code = "import " + ", ".join(modules) if modules else "pass"
    report = "print(open('/proc/self/smaps_rollup').read().split('Rss:')[1].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return round(int(done.stdout) / 1024, 1)


def push_images(registry: RegistryThread, folder: Path, mounts: int, layers: int, files: int) -> list[str]:
    converter = P2pgz(folder / "converter" / "state")
    converter.home.mkdir()
    references = []
    for image in range(mounts):
        contents = []
        for layer in range(layers):
            rng = random.Random(image * 1000 + layer)
            contents.append({f"d{n % 20}/l{layer}-{n}": rng.randbytes(2000) for n in range(files)})
        target = f"{registry.address}/lab/idle{image}:t"
        references.append(push_converted(converter, folder / f"layout{image}", target, *contents))
    return references


def swarms_of(registry: RegistryThread) -> dict[bytes, int]:
    """The TOC of each layer, and a number of chunks that is near enough: a peer may say anything."""
    store = registry.fake.store
    found = {}
    for digest in store.tags.values():
        for layer in json.loads(store.content[digest])["layers"]:
            found[Digest.parse(layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"]).raw] = 200
    return found


@asynccontextmanager
async def peers(
    count: int, address: PeerAddress, swarms: dict[bytes, int], members: int
) -> AsyncIterator[list[Exchange]]:
    """Members of a cluster of `members` that are connected to the node, and follow what it has."""
    async with open_cluster(members, swarms) as cluster, trio.open_nursery() as nursery:
        found = []
        for n in range(count):
            exchange = await cluster.play(n)
            for swarm in swarms:
                exchange.follow(swarm)
            connection = await exchange.connect(address.host, address.port)
            if n < CHOSEN_BY:
                cluster.playing[n][1].machine._partners.add(connection.peer.raw)
            if not n:
                await trio.sleep(
                    SETTLE_SECONDS
                )  # this process is all the others: it has a thousand entries to tell
            found.append(exchange)
        nursery.start_soon(cluster.renew, members * CHURN_PER_MINUTE)
        yield found
        nursery.cancel_scope.cancel()


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    parts = {
        "python": imports(),
        "node without libp2p": imports("p2pgz.node"),
        "node with libp2p": imports("p2pgz.node", "p2pgz.p2p.dht"),
    }
    result: dict[str, Any] = {"mounts": options.mounts, "peers": options.peers, "imports_rss_mb": parts}
    steps: dict[str, dict[str, float]] = {}
    with RegistryThread.running() as registry:
        references = push_images(registry, folder, options.mounts, options.layers, options.files)
        node = SwarmNode(folder / "node", P2PGZ_LOG__LEVEL="warning")
        try:
            pid = node.start_node()
            await trio.sleep(SETTLE_SECONDS)
            steps["started"] = memory(pid, node.state)
            for number, reference in enumerate(references):
                directory = node.home / f"m{number}"
                directory.mkdir()
                node.ok("mount", "--plain-http", reference, directory)
                node.ok("verify", "--plain-http", reference)
            await trio.sleep(SETTLE_SECONDS)
            steps["mounted and read"] = memory(pid, node.state)
            address = PeerAddress.parse(node.addresses()[0])
            async with peers(options.peers, address, swarms_of(registry), options.members):
                await trio.sleep(MEMBERS_SECONDS)
                steps["with peers"] = memory(pid, node.state)
                result["connections"] = len(node.peer_ids())
                result["cluster"] = node.status()["cluster"]
                before, began = cpu_seconds(pid), time.monotonic()
                await trio.sleep(options.seconds)
                used = cpu_seconds(pid) - before
                result["core_share_percent"] = round(100 * used / (time.monotonic() - began), 2)
                steps["at the end"] = memory(pid, node.state)
        finally:
            node.close()
    result["node_mb"] = steps
    end = steps["at the end"]
    result["memory_mb"] = round(end["own"] + end["libraries"], 1)
    result["ok"] = result["memory_mb"] <= 150 and result["core_share_percent"] < 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (
        ("seconds", 60),
        ("mounts", 10),
        ("peers", 40),
        ("members", 1000),
        ("layers", 5),
        ("files", 200),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with state_folder() as folder:
        print(json.dumps(trio.run(run, options, folder)))


if __name__ == "__main__":
    main()
