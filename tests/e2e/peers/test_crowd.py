"""Several nodes that start the same image in the same moment ask the registry for it once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import noise, push_converted
from tests.e2e.cli.running import P2pgz, wait_gone
from tests.e2e.peers.swarm import SwarmNode, hashes_below, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

NODES = 4
# manifests; and a chunk may be asked for twice where a machine is so slow that nodes take each other for gone
COPIES_MAX = 1.1
WITHIN_SECONDS = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def image(seed: int) -> list[dict[str, bytes]]:
    return [
        {f"l{layer}-{n}": noise(seed + layer * 100 + n, 60_000 + 1500 * n) for n in range(40)}
        for layer in range(2)
    ]


def size_of(layers: list[dict[str, bytes]]) -> int:
    return sum(len(data) for files in layers for data in files.values())


def registry(node: SwarmNode) -> dict[str, Any]:
    found: dict[str, Any] = node.sources()["registry"]
    return found


def pool_bytes(node: SwarmNode) -> int:
    return int(node.status()["pool"]["bytes"])


def test_the_registry_sends_one_copy_and_is_not_needed_after_it(folder: Path) -> None:
    with RegistryThread.running() as source, swarm(folder, NODES, P2PGZ_PEERS__DHT="false") as nodes:
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        first, second = image(1000), image(2000)
        one = push_converted(converter, folder / "one", f"{source.address}/lab/one:t", *first)
        two = push_converted(converter, folder / "two", f"{source.address}/lab/two:t", *second)
        source.spoil(Fault(on="/blobs/", times=1_000_000, piece_bytes=64 << 10, pause_seconds=0.01))
        nodes[0].start_node()
        for node in nodes[1:]:
            node.join(nodes[0])
        wait_until(lambda: [node.status()["cluster"]["members"] for node in nodes] == [NODES] * NODES)

        # all mount and read in the same moment
        mounting = [node.start("mount", "--plain-http", one, node.root) for node in nodes]
        assert [command.wait(WITHIN_SECONDS) for command in mounting] == [0] * NODES
        with ThreadPoolExecutor(NODES) as readers:
            trees = list(readers.map(hashes_below, [node.root for node in nodes]))
        assert len(trees[0]) == sum(map(len, first))
        assert all(tree == trees[0] for tree in trees)
        assert sum(registry(node)["wire_bytes"] for node in nodes) <= COPIES_MAX * size_of(first)
        assert sum(node.status()["leases"]["fetched_chunks"] for node in nodes) <= COPIES_MAX * len(trees[0])

        # the one that fetches dies, and then the registry, once there is one copy
        wait_until(lambda: all(pool_bytes(node) >= size_of(first) for node in nodes))  # read is not yet kept
        before = {node: (pool_bytes(node), registry(node)["bytes"]) for node in nodes}
        commands = {node: node.start("verify", "--plain-http", two) for node in nodes}
        fetched = dict.fromkeys(nodes, 0)

        def some_have_come() -> bool:
            for node in nodes:
                fetched[node] = registry(node)["bytes"] - before[node][1]
            return max(fetched.values()) > size_of(second) / 5

        wait_until(some_have_come, WITHIN_SECONDS)
        victim = max(nodes, key=lambda node: fetched[node])
        pid = victim.node_pid()
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        del commands[victim]
        wait_until(
            lambda: any(pool_bytes(node) - before[node][0] >= size_of(second) for node in commands),
            WITHIN_SECONDS,
        )
        source.spoil(Fault(status=503, times=1_000_000))
        assert [command.wait(WITHIN_SECONDS) for command in commands.values()] == [0] * len(commands)
        assert not [node for node in commands if "leases.bug" in node.log() or "peer.bug" in node.log()]
