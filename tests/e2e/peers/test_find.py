"""`p2pgz find` and `p2pgz why` on real nodes, of which two know only the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.core.digest import Digest
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e.peers.swarm import SwarmNode, hashes_below, swarm, wait_until
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


def peer_id(node: SwarmNode) -> str:
    found: str = node.status()["node"]["peer_id"]
    return found


def found_by(node: SwarmNode, name: str) -> dict[str, set[str]]:
    """Each provider's ways, as one command prints them; none when there are none."""
    done = node.run("find", name, "--json")
    assert done.code in (0, 10), done.err
    providers = done.json()["providers"] if done.code == 0 else []
    return {each["peer_id"]: {way["how"] for way in each["found"]} for each in providers}


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
