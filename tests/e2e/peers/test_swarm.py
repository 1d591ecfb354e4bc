"""Nodes that give each other what one of them has read: the registry is asked once, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e.peers.swarm import hashes_below, swarm, wait_until
from tests.e2e.restart.lazy_node import push_image, state_folder

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path / "registry") as running:
        yield running


def blob_requests(registry: RunningRegistry) -> list[str]:
    return [line for line in registry.requests() if "/blobs/" in line]


def test_registry_sends_an_image_once_and_then_may_be_stopped(
    folder: Path, registry: RunningRegistry, tmp_path: Path
) -> None:
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=5, files=8)
    with swarm(folder, 3) as (first, second, third):
        first.start_node()
        digest = first.ok("mount", reference, first.root, "--json").json()["digest"]
        assert hashes_below(first.root) == hashes
        by_digest = f"{reference.rpartition(':')[0]}@{digest}"

        second.join(first)
        wait_until(second.peer_ids)
        before = len(blob_requests(registry))
        second.ok("mount", by_digest, second.root)
        assert hashes_below(second.root) == hashes
        assert blob_requests(registry)[before:] == []
        sources = second.sources()
        assert sources["registry"]["bytes"] == 0
        assert sources["peer"]["bytes"] >= sum(path.stat().st_size for path in second.root.iterdir())

        registry.stop()
        third.join(second)
        wait_until(third.peer_ids)
        third.ok("mount", by_digest, third.root)
        assert hashes_below(third.root) == hashes
