"""`p2pgz seed` with real nodes: all of an image is fetched, kept, followed, and given to others."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.layouts import Layout, tar_layer
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import run, state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]
# whoever has no peers need not load the DHT's library
ALONE = {"P2PGZ_PEERS__DHT": "false"}
DOWN = Fault(status=503, headers={"Retry-After": "3600"}, times=100_000)


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as running:
        yield running


def files(seed: int, count: int = 4) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"f{seed}-{n}": rng.randbytes(150_000 + n).hex().encode() for n in range(count)}


def push(folder: Path, registry: RegistryThread, *layers: dict[str, bytes], tag: str = "1") -> str:
    """A lazy image of these layers; its reference."""
    layout = Layout(folder).add("t", *(tar_layer(contents) for contents in layers))
    reference = f"{registry.address}/team/app:{tag}"
    run("convert", layout, reference)
    return reference


def seeds(node: SwarmNode) -> dict[str, dict[str, Any]]:
    return {row["ref"]: row for row in node.status()["seeds"]}


def pins(node: SwarmNode) -> list[tuple[str, str]]:
    return [(pin["owner"], pin["digest"]) for pin in node.status()["pool"]["pins"]]


def test_whole_image_is_here_and_serves_others_without_the_registry(
    folder: Path, registry: RegistryThread, tmp_path: Path
) -> None:
    layers = files(1), files(2)
    reference = push(tmp_path / "layout", registry, *layers)
    with swarm(folder, 2) as (seed, other):
        assert "p2pgz node" in seed.fails(1, "seed", reference)
        seed.start_node()
        done = seed.ok("seed", reference, "--json")
        [result] = done.json()["seeds"]
        total = sum(len(data) for contents in layers for data in contents.values())
        assert result["bytes"] == result["present_bytes"] == total
        assert len(result["layers"]) == 2
        assert done.err.count("complete") >= 2, done.err
        assert reference in seed.ok("seed", "--list").out
        assert pins(seed) == [("seed", result["digest"])]

        registry.spoil(DOWN)
        other.join(seed)
        wait_until(other.peer_ids)
        by_digest = f"{reference.rpartition(':')[0]}@{result['digest']}"
        verified = other.ok("verify", "--json", by_digest).json()
        assert (verified["right_bytes"], verified["wrong"]) == (total, [])
        assert other.ok("cat", by_digest, "/f2-3").out.encode() == layers[1]["f2-3"]
        assert other.sources()["registry"]["bytes"] == 0
        assert other.sources()["peer"]["bytes"] == total

        peer = seed.status()["node"]["peer_id"]
        wait_until(lambda: peer in other.run("find", result["digest"]).out)

        # pins of people and of seeds do not undo each other
        seed.ok("pool", "pin", reference)
        assert sorted(owner for owner, _ in pins(seed)) == ["seed", "user"]
        seed.ok("pool", "unpin", reference)
        assert "seed --remove" in seed.fails(10, "pool", "unpin", reference)
        seed.ok("pool", "pin", reference)
        seed.ok("seed", "--remove", reference)
        assert [owner for owner, _ in pins(seed)] == ["user"]
        assert seeds(seed) == {}
        assert "not seeded" in seed.fails(10, "seed", "--remove", reference)


def test_followed_tag_is_replaced_only_once_the_new_image_is_here(
    folder: Path, registry: RegistryThread, tmp_path: Path
) -> None:
    reference = push(tmp_path / "old", registry, files(3))
    with swarm(folder, 1, **ALONE, P2PGZ_SEED__WATCH_SECONDS="0.3") as (node,):
        node.start_node()
        [old] = node.ok("seed", "--watch", "--json", reference).json()["seeds"]
        push(tmp_path / "new", registry, files(3, 1), files(4))
        new = str(registry.fake.store.tags["team/app", "1"])
        assert new != old["digest"]
        wait_until(lambda: pins(node) == [("seed", new)])
        assert seeds(node)[reference]["state"] == "complete"

        # a third one that can be opened, but whose chunks do not come: the second stays
        push(tmp_path / "third", registry, files(5, 12), tag="2")
        third = registry.fake.store.tags["team/app", "2"]
        registry.spoil(
            Fault(
                on="GET /v2/team/app/blobs/",
                skip=2,
                status=503,
                headers={"Retry-After": "3600"},
                times=100_000,
            )
        )
        registry.fake.store.tags["team/app", "1"] = third
        wait_until(lambda: seeds(node)[reference]["state"] == "waiting")
        assert seeds(node)[reference]["digest"] == str(third)
        assert 0 < seeds(node)[reference]["present_bytes"] < seeds(node)[reference]["bytes"]
        assert sorted(pins(node)) == sorted([("seed", new), ("seed", str(third))])
        registry.spoil()
        wait_until(lambda: pins(node) == [("seed", str(third))])
        assert seeds(node)[reference]["state"] == "complete"


def test_configured_seeds_wait_for_the_registry_and_survive_restarts(
    folder: Path, registry: RegistryThread, tmp_path: Path
) -> None:
    reference = push(tmp_path / "layout", registry, files(6))
    registry.spoil(DOWN)
    with swarm(folder, 1, **ALONE) as (node,):
        node.start_node(P2PGZ_SEED__IMAGES=reference)
        wait_until(lambda: seeds(node)[reference]["state"] == "waiting")
        assert "503" in seeds(node)[reference]["error"]
        registry.spoil()
        wait_until(lambda: seeds(node)[reference]["state"] == "complete")
        assert "configuration says so" in node.fails(2, "seed", "--remove", reference)
        node.stop_node()

        registry.spoil(DOWN)
        node.start_node(P2PGZ_SEED__IMAGES=reference)
        wait_until(lambda: seeds(node)[reference]["state"] == "complete")
        assert seeds(node)[reference]["stale_since"] is not None
        assert len(pins(node)) == 1
        node.stop_node()

        config = folder / "config.toml"
        config.write_text(f'[seed]\nimages = ["{reference}"]\n')
        node.start_node(P2PGZ_CONFIG=str(config))
        assert list(seeds(node)) == [reference]
        config.write_text("[seed]\nimages = []\n")
        os.kill(node.node_pid(), signal.SIGHUP)
        wait_until(lambda: seeds(node) == {} and pins(node) == [])


def test_seed_makes_room_and_says_when_there_is_none(
    folder: Path, registry: RegistryThread, tmp_path: Path
) -> None:
    cold, wanted, large = (
        push(tmp_path / str(n), registry, files(n, count), tag=str(n))
        for n, count in ((20, 12), (21, 8), (22, 24))
    )
    with swarm(folder, 1, **ALONE, P2PGZ_POOL__QUOTA_BYTES="5000000") as (node,):
        node.start_node()
        node.ok("verify", cold)  # 3.6 MB that nobody needs
        [row] = node.ok("seed", wanted, "--json").json()["seeds"]
        assert row["present_bytes"] == row["bytes"] > 2_000_000
        assert node.status()["pool"]["evicted_bytes"] > 0
        assert "raise pool.quota_bytes" in node.fails(1, "seed", large)
        assert seeds(node)[large]["state"] == "waiting"
        assert seeds(node)[wanted]["present_bytes"] == row["bytes"]


def test_interrupted_command_leaves_the_seed_to_the_node(
    folder: Path, registry: RegistryThread, tmp_path: Path
) -> None:
    reference = push(tmp_path / "layout", registry, files(8, 16))
    with swarm(folder, 1, **ALONE, P2PGZ_SEED__BYTES_PER_SECOND="1000000") as (node,):
        node.start_node()
        command = node.start("seed", reference)
        wait_until(lambda: seeds(node) and 0 < seeds(node)[reference]["present_bytes"] < 4_000_000)
        command.send_signal(signal.SIGINT)
        command.communicate()
        assert command.returncode == 130
        assert seeds(node)[reference]["state"] == "fetching"
        wait_until(lambda: seeds(node)[reference]["state"] == "complete")


def test_command_line_says_what_is_wrong(folder: Path, registry: RegistryThread, tmp_path: Path) -> None:
    reference = push(tmp_path / "layout", registry, files(7))
    missing = f"{registry.address}/team/app:none"
    with swarm(folder, 1, **ALONE, P2PGZ_NODE__EPHEMERAL_LINGER_SECONDS="20") as (node,):
        node.fails(2, "seed")
        node.fails(2, "seed", "--list", reference)
        node.ok("ls", reference)  # starts a node that ends by itself
        assert "p2pgz node" in node.fails(2, "seed", reference)
        node.stop_node()
        node.start_node()
        node.fails(10, "seed", missing)
        assert seeds(node) == {}
        error = node.fails(3, "seed", reference, missing)
        assert "1 of 2" in error
        assert list(seeds(node)) == [reference]
