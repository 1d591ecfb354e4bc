"""Rates that keep a node from taking the whole line, from the registry and from peers; test_busy has that of uploads."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

SMALL = ("--chunk-size", str(64 << 10))
CONTENTS = {f"f{n}": random.Random(n).randbytes(2_000_001) for n in range(2)}
BYTES_PER_SECOND = 2_000_000
# 2 s at that rate, less what a pace allows at once (a quarter of a second) and what is under way when the last is counted
AT_LEAST_SECONDS = 1.2


def seconds_to_fill(node: SwarmNode, reference: str) -> float:
    begin = time.monotonic()
    node.ok("mount", "--plain-http", "--fill", reference, node.root)
    wait_until(lambda: [mount["state"] for mount in node.status()["mounts"]] == ["complete"], 30)
    return time.monotonic() - begin


def test_bytes_from_the_registry_and_from_peers_keep_to_their_rates(tmp_path: Path) -> None:
    with (
        state_folder() as folder,
        RegistryThread.running() as registry,
        swarm(folder, 3, P2PGZ_PEERS__DHT="false", P2PGZ_FETCH__FILL_DELAY_SECONDS="0") as (
            free,
            first,
            second,
        ),
    ):
        push_converted(free, folder / "plain", f"{registry.address}/lab/rate:t", CONTENTS, options=SMALL)
        reference = f"{registry.address}/lab/rate@{registry.fake.store.find_manifest('lab/rate', 't')}"
        first.start_node(P2PGZ_REGISTRY__BYTES_PER_SECOND=str(BYTES_PER_SECOND))
        held_back = seconds_to_fill(first, reference)
        assert held_back > AT_LEAST_SECONDS
        assert first.sources()["registry"]["bytes"] > 4_000_000

        second.join(first, P2PGZ_PEERS__DOWNLOAD_BYTES_PER_SECOND=str(BYTES_PER_SECOND))
        wait_until(second.peer_ids)
        assert seconds_to_fill(second, reference) > AT_LEAST_SECONDS
        assert second.sources()["registry"]["chunks"] == 0

        free.join(first)
        wait_until(free.peer_ids)
        assert seconds_to_fill(free, reference) < held_back
