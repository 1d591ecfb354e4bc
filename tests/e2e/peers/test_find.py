"""`p2pgz find` and `p2pgz why` on real nodes, of which two know only the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.core.digest import Digest
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from p2pgz.testing.vectors import expected_document
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.peers.swarm import SwarmNode, hashes_below, swarm, wait_until
from tests.e2e.peers.test_plain import LAYERS, VECTORS, put_image
from tests.e2e.restart.lazy_node import push_image, state_folder
from tests.e2e.trees import read_tree

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path / "registry") as running:
        yield running


def peer_id(node: SwarmNode) -> str:
    found: str = node.status()["node"]["peer_id"]
    return found


def events_of(node: SwarmNode, name: str) -> list[dict[str, Any]]:
    """What the node says to `p2pgz find`, without a process for each question."""
    return [each for each in node.ask("POST", "/v1/find", {"digest": name}) if each["event"] == "provider"]


def found_by(node: SwarmNode, name: str) -> dict[str, set[str]]:
    """Each provider's ways; none when there are none."""
    found: dict[str, set[str]] = {}
    for event in events_of(node, name):
        found.setdefault(event["peer_id"], set()).add(event["found"])
    return found


def chunks_of(node: SwarmNode, path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.ok("why", path, "--json").json()["chunks"]
    return found


def test_nodes_that_know_one_other_find_each_other_through_it(
    folder: Path, registry: RunningRegistry, tmp_path: Path
) -> None:
    """A has nothing; B has the image; C, which knows only A, finds B by digest and gets everything from it."""
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=7, files=6)
    some_chunk = Digest.parse(f"sha256:{hashes['f001']}")  # below 1 MiB a file is one chunk
    with swarm(folder, 3) as (a, b, c):
        a.start_node()
        b.join(a)
        digest = b.ok("mount", reference, b.root, "--json").json()["digest"]
        assert hashes_below(b.root) == hashes
        assert found_by(b, str(some_chunk)) == {peer_id(b): {"pool"}}
        c.join(a)
        wait_until(c.peer_ids)
        assert c.peer_ids() == {peer_id(a)}

        for name in (digest, str(some_chunk), str(some_chunk.cid())):
            wait_until(lambda name=name: peer_id(b) in found_by(c, name))
        (provider,) = c.ok("find", str(some_chunk.cid()), "--json").json()["providers"]
        assert provider["peer_id"] == peer_id(b)
        lines = c.ok("find", digest).out.splitlines()
        assert any(peer_id(b) in line and b.addresses()[0].partition("/p2p/")[0] in line for line in lines)
        assert "is no" not in c.fails(10, "find", Digest.of(b"nobody's").hex)
        assert "neither a sha256 digest nor a CID" in c.fails(2, "find", "bafkrei")

        registry.stop()
        c.ok("mount", f"{reference.rpartition(':')[0]}@{digest}", c.root)
        assert peer_id(b) in c.peer_ids()
        first = chunks_of(c, c.root / "f001")
        assert [chunk["state"] for chunk in first] == ["missing"]
        assert [peer["peer_id"] for peer in first[0]["next"]["peers"]] == [peer_id(b)]
        assert found_by(c, str(some_chunk))[peer_id(b)] >= {"bitmap"}

        assert hashes_below(c.root) == hashes
        (chunk,) = chunks_of(c, c.root / "f001")
        assert (chunk["source"], chunk["from"]) == ("peer", peer_id(b))
        assert 0 < chunk["seconds"] < 10
        assert set(found_by(a, str(some_chunk))) == {peer_id(b), peer_id(c)}


def test_why_tells_who_gave_what_and_who_would_be_asked(
    folder: Path, registry: RunningRegistry, tmp_path: Path
) -> None:
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=8, files=3)
    with swarm(folder, 1) as (node,):
        node.start_node()
        node.ok("mount", reference, node.root)
        (before,) = chunks_of(node, node.root / "f002")
        assert before["state"] == "missing"
        assert before["next"] == {"peers": [], "registry": reference.rpartition(":")[0]}
        assert "asked would be" in node.ok("why", node.root / "f002").out
        (node.root / "f001").read_bytes()
        (chunk,) = chunks_of(node, node.root / "f001")
        assert (chunk["state"], chunk["source"], chunk["hedges"]) == ("here", "registry", 0)
        assert chunk["from"] == reference.rpartition(":")[0]
        told = node.ok("why", node.root / "f001").out
        assert f"from {chunk['from']} in " in told
        summary = node.ok("why", node.root, "--json").json()
        assert summary["summary"]["here"]["registry"]["chunks"] >= 1
        assert sum(count["chunks"] for count in summary["summary"].get("missing", {}).values()) <= 2
        assert "chunks" not in summary

        link = folder / "link"
        link.symlink_to(node.root)
        assert chunks_of(node, link / "f001") == [chunk]
        assert "is in no image" in node.fails(10, "why", folder)
        assert "no such file" in node.fails(10, "why", node.root / "nothing")

        assert hashes_below(node.root) == hashes
        node.stop_node()
        node.start_node()
        wait_until(node.mounts)
        assert {chunk["source"] for chunk in chunks_of(node, node.root / "f000")} == {"before"}
        assert "before this node started" in node.ok("why", node.root / "f000").out
        assert json.loads(node.ok("why", node.root, "--json").out)["complete"]


@pytest.mark.slow
def test_a_node_that_comes_back_elsewhere_is_found_there(
    folder: Path, registry: RunningRegistry, tmp_path: Path
) -> None:
    """Records name where it was; it tells of its new port as soon as it runs, and needs no mount or read for that."""
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=10, files=3)
    with swarm(folder, 3) as (a, b, c):
        a.start_node()
        c.join(a)
        b.join(a)
        b.ok("verify", reference)
        chunk = f"sha256:{hashes['f001']}"
        wait_until(lambda: peer_id(b) in found_by(c, chunk))
        before = b.addresses()
        b.stop_node()
        b.join(a)
        assert b.addresses() != before

        def address_found() -> bool:
            here = {address for event in events_of(c, chunk) for address in event["addrs"]}
            return b.addresses()[0].partition("/p2p/")[0] in here

        wait_until(address_found)
        c.ok("mount", reference, c.root)
        assert (c.root / "f001").read_bytes()
        (came,) = chunks_of(c, c.root / "f001")
        wait_until(lambda: peer_id(b) in c.peer_ids())
        assert came["state"] == "here"


@pytest.mark.slow
def test_private_image_is_as_unknown_as_one_that_is_nowhere(
    folder: Path, registry: RunningRegistry, tmp_path: Path
) -> None:
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=11, files=2)
    rules = folder / "config.toml"
    rules.write_text('[[sharing]]\nrepository = "*/lab/*"\nmode = "proof"\n')
    nobodys = Digest.of(b"nobody's")
    with swarm(folder, 2, P2PGZ_CONFIG=str(rules)) as (a, b):
        a.start_node()
        b.join(a)
        wait_until(b.peer_ids)
        digest = b.ok("mount", reference, b.root, "--json").json()["digest"]
        assert hashes_below(b.root) == hashes
        for node in (a, b):
            nowhere = node.fails(10, "find", str(nobodys))
            for name in (digest, f"sha256:{hashes['f001']}"):
                assert node.fails(10, "find", name).replace(name, str(nobodys)) == nowhere


@pytest.mark.slow
def test_plain_layers_are_found_by_diff_id_and_blob_digest(folder: Path) -> None:
    """C knows only A, and asks the registry for the manifest; the layers come from B."""
    with RegistryThread.running() as plain, swarm(folder, 3) as (a, b, c):
        reference = put_image(plain)
        a.start_node()
        b.join(a)
        b.ok("mount", "--plain-http", reference, b.root)
        c.join(a)
        wait_until(c.peer_ids)
        for name in LAYERS:
            document = expected_document(VECTORS / "expected" / f"{name}.json")
            blob = Digest.of((VECTORS / document["blob"]).read_bytes())
            for digest in (document["diff_id"], str(blob)):
                wait_until(lambda digest=digest: peer_id(b) in found_by(c, digest))
        before = plain.blob_requests()
        c.ok("mount", "--plain-http", reference, c.root)
        assert plain.blob_requests() <= before + 1  # the config
        assert read_tree(c.root) == read_tree(b.root)
        layers = c.ok("why", c.root, "--json").json()["summary"]["here"]
        assert set(layers) <= {"peer", "pool"}
