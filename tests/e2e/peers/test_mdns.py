"""Nodes that were told of nobody find each other by multicast DNS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]


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
        wait_until(lambda: ids[1] in first.peer_ids() and ids[0] in second.peer_ids())
        assert silent.peer_ids() == set()
        assert first.peer_ids() == {ids[1]}
