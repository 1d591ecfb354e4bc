"""Nodes of a cluster know each other: who came, who left, who died, and nobody else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cli.running import wait_gone
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

# The promise is 10 s; a machine that is short of processors gets more
DEATH_SECONDS = 25.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def cluster(node: SwarmNode) -> dict[str, Any]:
    found: dict[str, Any] = node.status()["cluster"]
    return found


def members(node: SwarmNode) -> int:
    return int(cluster(node)["members"])


def test_members_come_leave_and_die_and_a_stranger_is_none_of_them(folder: Path) -> None:
    key, other_key = folder / "key", folder / "other-key"
    key.write_text("k" * 64)
    other_key.write_text("o" * 64)
    with swarm(folder, 5, P2PGZ_PEERS__DHT="false") as nodes:
        first, second, third, fourth, stranger = nodes
        zones = {"P2PGZ_PEERS__CLUSTER_KEY_FILE": str(key), "P2PGZ_PEERS__ZONE": "east"}
        first.start_node(**zones)
        for node in (second, third, fourth):
            node.join(first, **zones)
        stranger.join(first, P2PGZ_PEERS__CLUSTER_KEY_FILE=str(other_key))
        known = (first, second, third, fourth)
        wait_until(lambda: [members(node) for node in known] == [4] * 4)
        wait_until(lambda: len({cluster(node)["view"] for node in known}) == 1)
        assert cluster(second)["zones"] == {"east": 4}
        assert "cluster: 4 members, this one in zone east" in second.ok("status").out

        killed = third.node_pid()
        os.kill(killed, signal.SIGKILL)
        wait_gone(killed)
        wait_until(lambda: [members(node) for node in (first, second, fourth)] == [3] * 3, DEATH_SECONDS)
        assert cluster(first)["deaths"] == 1

        second.stop_node()  # says that it leaves, so that nobody has to find it dead
        wait_until(lambda: [members(node) for node in (first, fourth)] == [2] * 2)
        assert [cluster(node)["deaths"] for node in (first, fourth)] == [1] * 2

        assert members(stranger) == 1
        third.join(first, **zones)  # the same identity again
        wait_until(lambda: [members(node) for node in (first, third, fourth)] == [3] * 3)


def test_a_zone_that_cannot_be_one_is_refused(folder: Path) -> None:
    with swarm(folder, 1) as (node,):
        refused = node.fails(15, "config", "check", P2PGZ_PEERS__ZONE="z" * 65)
        assert "peers.zone" in refused
