"""Nodes that were told of nobody find each other by multicast DNS."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

# packets that are lost are asked for again after a second, two, four
MDNS_SECONDS = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def test_two_nodes_find_each_other_and_a_third_that_is_not_asked_to_look_finds_nobody(folder: Path) -> None:
    (folder / "key").write_text("a-key-so-that-nodes-of-other-tests-stay-strangers")
    key = str(folder / "key")
    with swarm(folder, 3, P2PGZ_PEERS__CLUSTER_KEY_FILE=key) as (first, second, silent):
        first.start_node(P2PGZ_PEERS__MDNS="true")
        silent.start_node()
        second.start_node(P2PGZ_PEERS__MDNS="true")
        ids = [node.status()["node"]["peer_id"] for node in (first, second)]
        wait_until(lambda: ids[1] in first.peer_ids() and ids[0] in second.peer_ids(), MDNS_SECONDS)
        assert silent.peer_ids() == set()
        assert first.peer_ids() == {ids[1]}


def test_a_copied_identity_is_said_loudly_by_both(folder: Path) -> None:
    (folder / "key").write_text("a-key-so-that-nodes-of-other-tests-stay-strangers")
    with swarm(folder, 2, P2PGZ_PEERS__CLUSTER_KEY_FILE=str(folder / "key"), P2PGZ_PEERS__MDNS="true") as (
        first,
        copy,
    ):
        first.start_node()
        copy.state.mkdir(mode=0o700)
        for name in ("identity.key", "identity.machine"):  # of a cloned disk whose machine id was cloned, too
            shutil.copy(first.state / name, copy.state / name)
        copy.start_node()
        for node in (first, copy):
            wait_until(lambda node=node: node.status()["node"]["identity_twins"], MDNS_SECONDS)
            assert "identity.twice" in node.log()
            assert node.peer_ids() == set()
