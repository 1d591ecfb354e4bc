"""DHT clients of other makes in a network of real nodes: they find who has a chunk by nothing but its CID."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.testing.docker_registry import running_registry
from tests.e2e.peers.swarm import SwarmNode, hashes_below, swarm, wait_until
from tests.e2e.restart.lazy_node import push_image, state_folder
from tests.interop.foreign import built_go_peer, library_dht

pytestmark = [pytest.mark.root, pytest.mark.registry]


@dataclass
class Network:
    """`first` has nothing, `holder` has the image, `other` knows only the first; the client asks `first` or `other`."""

    first: SwarmNode
    holder: SwarmNode
    other: SwarmNode
    chunk: Digest
    manifest: Digest


def address_of(node: SwarmNode) -> PeerAddress:
    return PeerAddress.parse(node.addresses()[0])


@contextmanager
def network(tmp_path: Path) -> Iterator[Network]:
    with (
        state_folder() as folder,
        running_registry(tmp_path / "registry") as registry,
        swarm(folder, 3) as (first, holder, other),
    ):
        reference, hashes = push_image(tmp_path / "plain", registry.address, seed=9, files=4)
        first.start_node()
        holder.join(first)
        other.join(first)
        digest = holder.ok("mount", reference, holder.root, "--json").json()["digest"]
        assert hashes_below(holder.root) == hashes
        # a file below 1 MiB is one chunk, so that its digest is the chunk's
        made = Network(first, holder, other, Digest.parse(f"sha256:{hashes['f002']}"), Digest.parse(digest))
        for node in (first, other):
            wait_until(lambda node=node: node.run("find", digest).code == 0)
        yield made


@pytest.mark.go
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("go") is None, reason="needs a Go toolchain")
def test_go_client_finds_who_has_a_chunk_a_manifest_and_nobody_s(tmp_path: Path) -> None:
    program = built_go_peer()
    with network(tmp_path) as n:
        expected = address_of(n.holder)
        line = f"{expected.peer} [{expected.without_peer()}]\n"

        def found(via: SwarmNode, name: Digest) -> str:
            command = [program, "find", via.addresses()[0], str(name.cid())]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert found(n.first, n.chunk) == line
        assert found(n.other, n.chunk) == line
        assert found(n.other, n.manifest) == line
        assert found(n.first, Digest.of(b"nobody's")) == ""


@pytest.mark.trio
async def test_library_s_own_dht_finds_who_has_a_chunk_and_is_found(tmp_path: Path) -> None:
    stack = network(tmp_path)
    n = await trio.to_thread.run_sync(stack.__enter__)
    try:
        via, expected = address_of(n.first), address_of(n.holder)
        assert via.peer is not None
        assert expected.peer is not None
        bootstrap = Contact(via.peer.raw, (via.without_peer().to_bytes(),))
        async with library_dht(bootstrap) as (host, theirs):
            found = await theirs.find_providers("1220" + n.chunk.hex)
            assert {expected.peer.raw} == {info.peer_id.to_bytes() for info in found}
            assert {expected.without_peer().to_bytes()} == {
                address.to_bytes() for info in found for address in info.addrs
            }
            theirs_only = Digest.of(b"theirs")
            assert await theirs.provide("1220" + theirs_only.hex)

            def known() -> bool:
                return str(host.get_id()) in n.other.run("find", str(theirs_only)).out

            with trio.fail_after(20):
                while not await trio.to_thread.run_sync(known):
                    await trio.sleep(0.1)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stack.__exit__, None, None, None)
