"""Nodes that lose each other, whose identity was copied, or who are named by records that outlived them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, push_converted
from tests.e2e.cli.running import P2pgz
from tests.e2e.peers.namespaces import two_hosts
from tests.e2e.peers.swarm import swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.tools("ip")]


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


@pytest.fixture
def registry() -> Iterator[RegistryThread]:
    with RegistryThread.running() as running:
        yield running


def push(folder: Path, registry: RegistryThread) -> str:
    """An image; its reference by digest."""
    writer = P2pgz(folder / "writer" / "state")
    writer.home.mkdir()
    repository = f"{registry.address}/lab/far"
    push_converted(writer, folder / "plain", f"{repository}:t", FILES)
    return f"{repository}@{registry.fake.store.find_manifest('lab/far', 't')}"


def test_reader_waits_while_the_network_is_cut_and_gets_its_bytes_when_it_is_mended(
    folder: Path, registry: RegistryThread
) -> None:
    reference = push(folder, registry)
    names = list(FILES)
    with two_hosts() as cable:
        near, far = cable.hosts
        holder = near.node(folder / "holder", P2PGZ_PEERS__DHT="false")
        reader = far.node(
            folder / "reader", P2PGZ_PEERS__DHT="false", P2PGZ_FETCH__READ_DEADLINE_SECONDS="40"
        )
        try:
            # where the registry can be reached, which is not its host
            holder.ok("verify", "--plain-http", reference, P2PGZ_PEERS__ENABLED="never")
            holder.stop_node()
            holder.join()
            reader.join(holder)
            wait_until(reader.peer_ids)
            reader.ok("mount", "--plain-http", "--mode", "tree", reference, reader.root)
            assert (reader.root / names[0]).read_bytes() == FILES[names[0]]

            cable.cut()
            waiting = subprocess.Popen(["sha256sum", reader.root / names[1]], stdout=subprocess.PIPE)
            wait_until(lambda: not reader.peer_ids())  # noticed: it makes no progress
            assert waiting.poll() is None
            assert (reader.root / names[0]).read_bytes() == FILES[
                names[0]
            ]  # what is here is served meanwhile
            cable.mend()
            out, _ = waiting.communicate(timeout=30)
            assert waiting.returncode == 0
            assert (
                out.split()[0]
                == subprocess.run(
                    ["sha256sum"], input=FILES[names[1]], capture_output=True, check=True
                ).stdout.split()[0]
            )
            assert reader.sources()["registry"]["bytes"] == 0
            wait_until(lambda: reader.peer_ids() and holder.peer_ids())
        finally:
            reader.close()
            holder.close()


def test_identity_on_two_hosts_is_said_loudly_and_costs_no_reader_anything(
    folder: Path, registry: RegistryThread
) -> None:
    reference = push(folder, registry)
    with swarm(folder, 3, P2PGZ_PEERS__DHT="false") as (first, copy, reader):
        first.start_node()
        first.ok("verify", "--plain-http", reference)
        copy.state.mkdir(parents=True)
        for path in first.state.glob("identity*"):
            shutil.copy2(path, copy.state)
        addresses = [address.partition("/p2p/")[0] for address in first.addresses()]
        copy.start_node(P2PGZ_PEERS__BOOTSTRAP=",".join(addresses))
        identity = first.status()["node"]["peer_id"]
        assert copy.status()["node"]["peer_id"] == identity
        wait_until(lambda: copy.status()["node"]["identity_twins"])
        assert "identity.twice" in copy.log()
        assert copy.peer_ids() == set()

        reader.join(first, copy)
        wait_until(reader.peer_ids)
        reader.ok("mount", "--plain-http", reference, reader.root)
        for name, data in FILES.items():
            assert (reader.root / name).read_bytes() == data
        assert reader.peer_ids() == {identity}
        assert reader.status()["node"]["faults"]["corrupt"] == 0


def test_providers_that_are_gone_hold_up_nobody(folder: Path, registry: RegistryThread) -> None:
    """The DHT names a node that was killed a moment ago."""
    reference = push(folder, registry)
    with swarm(folder, 3) as (middle, gone, reader):
        middle.start_node()
        gone.join(middle)
        gone.ok("verify", "--plain-http", reference)
        identity = gone.status()["node"]["peer_id"]
        manifest = json.loads(registry.fake.store.content[registry.fake.store.find_manifest("lab/far", "t")])  # type: ignore[index]
        toc = manifest["layers"][0]["annotations"]["containerd.io/snapshot/stargz/toc.digest"]
        wait_until(lambda: identity in middle.run("find", toc, "--json", "--timeout", "2").out, 30)
        gone.stop_node(signal.SIGKILL)
        wait_until(lambda: identity not in middle.peer_ids())

        reader.join(middle)
        wait_until(reader.peer_ids)
        wait_until(lambda: identity in reader.run("find", toc, "--json", "--timeout", "2").out, 30)
        reader.ok("mount", "--plain-http", reference, reader.root)
        for name, data in FILES.items():
            before = time.monotonic()
            assert (reader.root / name).read_bytes() == data
            assert time.monotonic() - before < 5
        assert reader.sources()["registry"]["bytes"] > 0
