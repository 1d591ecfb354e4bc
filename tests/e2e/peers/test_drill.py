"""What would be lost without the registry, and that it can be kept from being lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import noise, push_converted
from tests.e2e.cli.running import P2pgz
from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

FILES = {f"f{number}": noise(number, 100_000) for number in range(12)}


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def test_what_only_the_registry_has_is_counted_and_fetched(folder: Path) -> None:
    with RegistryThread.running() as registry, swarm(folder, 2, P2PGZ_PEERS__DHT="false") as (one, other):
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        reference = push_converted(converter, folder / "layout", f"{registry.address}/lab/app:t", FILES)
        one.start_node()
        other.join(one)
        wait_until(other.peer_ids)
        for number in range(3):
            one.ok("cat", "--plain-http", reference, f"f{number}")
        before = one.run("drill", "--plain-http", "--json", reference)
        assert before.code == 13
        counted = before.json()
        assert counted["lost_chunks"] + counted["here_chunks"] == counted["chunks"]
        assert 0 < counted["lost_chunks"] < counted["chunks"]
        fixed = json.loads(other.ok("drill", "--plain-http", "--fix", "--json", reference).out)
        assert fixed["fixed_chunks"] == fixed["lost_chunks"] > 0
        assert fixed["peers"] == 1

        registry.spoil(Fault(status=503, times=1_000_000))
        after = one.ok("drill", "--plain-http", reference).out  # no exit code 13
        assert " 0 of " in after
        other.ok("verify", "--plain-http", reference)
