"""An image that nobody converted, on nodes in processes of their own: the registry sends its layers once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_GZIP, OCI_LAYER_TAR, OCI_LAYER_ZSTD
from p2pgz.testing.registry_faults import Fault
from p2pgz.testing.registry_store import described
from p2pgz.testing.vectors import expected_document
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder
from tests.e2e.trees import read_tree

VECTORS = Path(__file__).parents[2] / "vectors"
LAYERS = {
    "basic.gz": OCI_LAYER_GZIP,
    "sparse-pax10.tar": OCI_LAYER_TAR,
    "links.zst": OCI_LAYER_ZSTD,
    "meta.gz": OCI_LAYER_GZIP,
}

pytestmark = pytest.mark.root


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as running:
        yield running


def put_image(registry: RegistryThread) -> str:
    """An image of plain layers of each kind; its reference by digest."""
    store = registry.fake.store
    documents = [expected_document(VECTORS / "expected" / f"{name}.json") for name in LAYERS]
    layers = [
        store.add_blob("lab/plain", (VECTORS / document["blob"]).read_bytes(), media_type)
        for document, media_type in zip(documents, LAYERS.values(), strict=True)
    ]
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    diff_ids = [document["diff_id"] for document in documents]
    config = {"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "config": described(store.add_blob("lab/plain", json.dumps(config).encode(), OCI_CONFIG)),
        "layers": [described(layer) for layer in layers],
    }
    digest = store.add_manifest("lab/plain", json.dumps(manifest).encode(), tag="t").digest
    return f"{registry.address}/lab/plain@{digest}"


def mount(node: SwarmNode, reference: str) -> dict[bytes, dict[str, object]]:
    node.ok("mount", "--plain-http", reference, node.root)
    return read_tree(node.root)


def test_second_node_needs_no_registry_and_neither_does_the_third(
    folder: Path, registry: RegistryThread
) -> None:
    reference = put_image(registry)
    with swarm(folder, 3) as (first, second, third):
        first.start_node()
        tree = mount(first, reference)
        assert len(tree) > 20

        second.join(first)
        wait_until(second.peer_ids)
        before = registry.blob_requests()
        assert mount(second, reference) == tree
        assert registry.blob_requests() == before

        registry.spoil(Fault(status=503, times=1_000_000))
        third.join(second)
        wait_until(third.peer_ids)
        assert mount(third, reference) == tree


def test_index_signed_by_a_trusted_node_makes_the_image_lazy(folder: Path, registry: RegistryThread) -> None:
    reference = put_image(registry)
    with swarm(folder, 2) as (first, second):
        first.start_node()
        tree = mount(first, reference)
        second.join(first, P2PGZ_PEERS__TRUSTED_INDEXERS=first.status()["node"]["peer_id"])
        wait_until(second.peer_ids)
        before = registry.blob_requests()
        second.ok("mount", "--plain-http", reference, second.root)
        assert second.status()["pool"]["chunks"] == 0
        assert read_tree(second.root) == tree
        second.ok("verify", "--plain-http", reference)  # what upper layers hide is fetched as well
        assert registry.blob_requests() == before
        wait_until(lambda: second.log().count("plain.checked") == len(LAYERS))
