"""SIGHUP: a node takes a changed configuration, keeps the old one when the new one is no use, and says what waits."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.frames import encode
from p2pgz.core.messages import Bitmap, Join
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.p2p.handshake import Credentials, dial
from p2pgz.p2p.identity import Identity
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.cli.running import P2pgz
from tests.e2e.peers.swarm import SwarmNode, swarm, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

OLD, NEW = "the-old-key-of-this-test-0123456789", "the-new-key-of-this-test-0123456789"


@pytest.fixture
def folder() -> Iterator[Path]:
    with state_folder() as path:
        yield path


def reload(node: SwarmNode, event: str = "config.reloaded") -> dict[str, Any]:
    """Tell it, and return what its log says then."""
    before = len(events(node, event))
    os.kill(node.node_pid(), signal.SIGHUP)
    wait_until(lambda: len(events(node, event)) > before)
    return events(node, event)[-1]


def events(node: SwarmNode, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in node.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def test_changes_take_effect_or_are_said_to_wait_and_a_broken_file_changes_nothing(folder: Path) -> None:
    file = folder / "config.toml"
    file.write_text("[fetch]\nfill_bytes_per_second = 5\n")
    with swarm(folder, 1, P2PGZ_CONFIG=str(file)) as (node,):
        node.start_node()
        assert node.status()["config"] == {"refused": None, "waiting_for_restart": []}
        file.write_text('[log]\nlevel = "warning"\n[peers]\nmdns = true\nupload_slots = 3\n')
        os.kill(node.node_pid(), signal.SIGHUP)  # its "reloaded" is below the new level
        wait_until(lambda: node.status()["config"]["waiting_for_restart"] == ["peers.mdns"])
        assert events(node, "config.reloaded") == []
        file.write_text('[pool]\nquota_bytes = "7GB"\n[peers]\nmdns = false\nupload_slots = 4\n')
        said = reload(node)
        assert said["changed"] == ["log.level", "peers.upload_slots", "pool.quota_bytes"]
        assert node.status()["pool"]["quota_bytes"] == 7_000_000_000
        assert said["waiting_for_restart"] == []

        for text, reason in (
            ("[peers]\nupload_slots = 0\n", "upload_slots"),
            ("[peers\n", "not TOML"),
            ('[peers]\ncluster_key_file = "/nowhere"\n', "/nowhere"),
            ('[peers]\nbootstrap = ["nonsense"]\n', "nonsense"),
            ('[peers]\ntrusted_indexers = ["nobody"]\n', "nobody"),
        ):
            file.write_text(text)
            said = reload(node, "config.refused")
            assert reason in said["reason"]
            assert reason in node.status()["config"]["refused"]
        file.unlink()  # not the same as an empty one: the defaults admit everybody
        assert "no such configuration file" in reload(node, "config.refused")["reason"]
        file.write_text("")
        assert reload(node)["changed"] == ["peers.upload_slots", "pool.quota_bytes"]
        assert node.status()["config"]["refused"] is None


def test_a_key_is_rotated_without_a_restart(folder: Path) -> None:
    keys = [folder / f"key{number}" for number in range(2)]
    for key in keys:
        key.write_text(OLD)
    with swarm(folder, 2) as (one, other):
        one.start_node(P2PGZ_PEERS__CLUSTER_KEY_FILE=str(keys[0]))
        other.join(one, P2PGZ_PEERS__CLUSTER_KEY_FILE=str(keys[1]))
        wait_until(other.peer_ids)
        for number, node in enumerate((one, other)):
            keys[number].write_text(f"{NEW}\n{OLD}\n")
            reload(node)
        wait_until(other.peer_ids)
        assert admitted(one, NEW)
        assert admitted(one, OLD)
        for number, node in enumerate((one, other)):
            keys[number].write_text(NEW)
            reload(node)
        wait_until(other.peer_ids)
        assert admitted(one, NEW)
        assert not admitted(one, OLD)
        keys[0].write_text("of-another-cluster-0123456789")
        reload(one)
        wait_until(lambda: not other.peer_ids())
        wait_until(lambda: "not admitted" in other.log())
        assert other.peer_ids() == set()


def admitted(node: SwarmNode, key: str) -> bool:
    return trio.run(answer_to_join, node, bytes(32), key) is not None


async def answer_to_join(node: SwarmNode, swarm_id: bytes, key: str = "") -> int | None:
    """How many chunks it says that it has; None: it does not talk with us."""
    credentials = Credentials.make(Identity.new(), Admission(cluster_keys=[key.encode()] if key else []))
    address = PeerAddress.parse(node.addresses()[0])
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        try:
            ends = await dial(stream, credentials)
        except Exception:
            return None
        await ends.stream.send_all(encode(Join(swarm_id)))
        with trio.fail_after(5):
            while data := await ends.stream.receive():
                for frame in ends.reader.feed(data):
                    if isinstance(frame, Bitmap):
                        return int.from_bytes(frame.bits, "little").bit_count()
        return None


def test_a_repository_becomes_private_at_once(folder: Path) -> None:
    file = folder / "config.toml"
    file.write_text("")
    with RegistryThread.running() as registry, swarm(folder, 2, P2PGZ_CONFIG=str(file)) as (holder, other):
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        files = {f"f{number}": random.Random(number).randbytes(30_000) for number in range(4)}
        reference = push_converted(converter, folder / "layout", f"{registry.address}/team/app:t", files)
        manifest = registry.fake.store.content[registry.fake.store.tags["team/app", "t"]]
        (layer,) = json.loads(manifest)["layers"]
        toc = Digest.parse(layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"]).raw

        def offered() -> int | None:
            return trio.run(answer_to_join, holder, toc)

        holder.start_node()
        holder.ok("verify", "--plain-http", reference)
        other.join(holder)
        wait_until(other.peer_ids)
        other.ok("ls", "--plain-http", reference)
        assert (offered() or 0) >= len(files)
        for mode in ("none", "proof"):
            file.write_text(f'[[sharing]]\nrepository = "*/team/*"\nmode = "{mode}"\n')
            assert reload(holder)["changed"] == ["sharing"]
            assert offered() == 0
        assert events(holder, "image.not_shared")
        holder.stop_node()
        holder.start_node()  # and it stays so
        assert offered() == 0
        holder.ok("verify", "--plain-http", reference)  # from the registry, into a domain of its own
        assert offered() == 0
        file.write_text("")
        reload(holder)
        assert (offered() or 0) >= len(files)


def test_a_mounted_image_that_becomes_private_is_not_asked_for_at_peers_any_more(folder: Path) -> None:
    rules = folder / "rules.toml"
    rules.write_text("")
    with RegistryThread.running() as registry, swarm(folder, 2) as (holder, reader):
        converter = P2pgz(folder / "converter" / "state")
        converter.home.mkdir()
        files = {f"f{number}": random.Random(number).randbytes(60_000) for number in range(12)}
        reference = push_converted(converter, folder / "layout", f"{registry.address}/team/app:t", files)
        holder.start_node()
        holder.ok("verify", "--plain-http", reference)
        reader.start_node(P2PGZ_CONFIG=str(rules))
        assert reader.peer_ids() == set()
        bootstrap = json.dumps(holder.addresses())
        rules.write_text(f"[peers]\nbootstrap = {bootstrap}\n")
        assert reload(reader)["changed"] == ["peers.bootstrap"]
        wait_until(reader.peer_ids)

        reader.ok("mount", "--plain-http", reference, reader.root)
        wait_until(lambda: chunks(reader, "peer", reader.root / "f0"))
        private = '[[sharing]]\nrepository = "*"\nmode = "none"\n'
        rules.write_text(f"{private}[peers]\nbootstrap = {bootstrap}\n")
        reload(reader)
        (mount,) = reader.status()["mounts"]
        assert mount["present_bytes"] < mount["bytes"], "all of it is here: nothing is shown"
        before = reader.sources()
        assert {name: (reader.root / name).read_bytes() for name in files} == files
        assert reader.sources()["peer"]["chunks"] == before["peer"]["chunks"]
        assert reader.sources()["registry"]["chunks"] > before["registry"]["chunks"]


def chunks(node: SwarmNode, source: str, path: Path) -> int:
    path.read_bytes()
    found: int = node.sources()[source]["chunks"]
    return found
