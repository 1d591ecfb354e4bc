"""A machine that comes up again while neither the registry nor a peer can be reached."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from p2pgz.core.media import OCI_INDEX, OCI_MANIFEST
from p2pgz.mount.umount import unmount
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.e2e.restart.lazy_node import LazyNode, push_image, sha256, state_folder, wait_until

COMMIT_SECONDS = 2.0  # the index is written once a second
DEADLINE_SECONDS = 3.0
READY_SECONDS = 10.0  # half a second on an idle machine

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def request(registry: str, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    connection = http.client.HTTPConnection(registry, timeout=10)
    with closing(connection):
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        content = answer.read()
    assert answer.status in {200, 201}, content
    return content


def manifest_of(reference: str) -> bytes:
    registry, _, rest = reference.partition("/")
    repository, _, tag = rest.rpartition(":")
    return request(registry, "GET", f"/v2/{repository}/manifests/{tag}", Accept=OCI_MANIFEST)


def sha256_name(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def push_index(reference: str) -> str:
    """An index of one platform's image; a reference to it by digest."""
    registry, _, rest = reference.partition("/")
    repository = rest.rpartition(":")[0]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    manifest = manifest_of(reference)
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": sha256_name(manifest),
        "size": len(manifest),
        "platform": {"os": "linux", "architecture": machine},
    }
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode()
    request(registry, "PUT", f"/v2/{repository}/manifests/{sha256_name(body)}", body, Content_Type=OCI_INDEX)
    return f"{registry}/{repository}@{sha256_name(body)}"


def reboot(node: LazyNode, roots: list[Path]) -> None:
    """As far as the next node can tell: all processes gone, nothing mounted, another boot."""
    pids = [node.holder_pid(), *node.fs_pids()]
    node.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for root in roots:
        unmount(root, lazy=True)
    with sqlite3.connect(node.state / "index.db") as connection:
        connection.execute("UPDATE mounts SET options = json_set(options, '$.boot_id', 'another')")
    connection.close()


def mounted_at(node: LazyNode) -> set[Path]:
    return {Path(mount["dir"]) for mount in node.status()["mounts"]}


def read_fails(path: Path) -> float:
    """How long it took until the error."""
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    return time.monotonic() - begin


def test_a_reboot_without_network_brings_back_all_mounts_and_what_is_missing_comes_later(
    registry: RunningRegistry, stack: ExitStack, tmp_path: Path
) -> None:
    folder = stack.enter_context(state_folder())
    reference, hashes = push_image(tmp_path / "plain", registry.address, seed=3, files=12)
    unseen, unseen_hashes = push_image(tmp_path / "unseen", registry.address, seed=4, files=2)
    by_digest = f"{reference.rpartition(':')[0]}@{sha256_name(manifest_of(reference))}"
    by_index = push_index(reference)
    wanted = {"tag": reference, "digest": by_digest, "index": by_index}
    roots = {name: folder / name for name in [*wanted, "persistent", "unseen"]}
    config = folder / "config.toml"

    def configure(mounts: dict[str, str]) -> None:
        config.write_text(
            "".join(
                f'[[mounts]]\nreference = "{what}"\ndirectory = "{roots[name]}"\nmode = "tree"\n'
                for name, what in mounts.items()
            )
        )

    port = free_port()
    peer = LazyNode(
        folder / "peer" / "state", environment={"P2PGZ_PEERS__LISTEN": f"/ip4/127.0.0.1/tcp/{port}"}
    )
    peer.state.parent.mkdir()
    stack.callback(peer.close)
    peer.start()
    peer_root = folder / "peer" / "root"
    peer_root.mkdir()
    peer.call("mount", "--mode", "tree", "--no-fill", reference, peer_root)
    node = LazyNode(
        folder / "state",
        environment={
            "P2PGZ_CONFIG": str(config),
            "P2PGZ_PEERS__LISTEN": "/ip4/127.0.0.1/tcp/0",
            "P2PGZ_PEERS__BOOTSTRAP": peer.status()["node"]["addrs"][0],
            "P2PGZ_FETCH__READ_DEADLINE_SECONDS": str(DEADLINE_SECONDS),
            "P2PGZ_FETCH__FILL": "false",
        },
    )
    stack.callback(node.close)
    configure(wanted)
    node.start()
    roots["persistent"].mkdir()
    node.call("mount", "--mode", "tree", "--no-fill", "--persist", reference, roots["persistent"])
    wait_until(lambda: len(mounted_at(node)) == 4)
    for name in ("f004", "f005"):
        assert sha256(roots["tag"] / name) == hashes[name]
    for name in ("f004", "f005", "f006"):
        assert sha256(peer_root / name) == hashes[name]
    time.sleep(COMMIT_SECONDS)

    reboot(node, [roots[name] for name in [*wanted, "persistent"]])
    peer.kill()
    registry.stop()
    configure({**wanted, "unseen": unseen})  # this one was never here: the others must not wait for it
    begin = time.monotonic()
    node.start()
    assert time.monotonic() - begin < READY_SECONDS
    wait_until(lambda: mounted_at(node) == {roots[name] for name in [*wanted, "persistent"]})
    print(f"all mounts are back after {time.monotonic() - begin:.2f} s")
    for name in [*wanted, "persistent"]:
        assert sha256(roots[name] / "f004") == hashes["f004"]
        assert len(os.listdir(roots[name])) == 12
    waited = read_fails(roots["tag"] / "f006")
    assert DEADLINE_SECONDS * 0.8 < waited < DEADLINE_SECONDS + 5

    reader = subprocess.Popen(["sha256sum", roots["digest"] / "f006"], stdout=subprocess.PIPE, text=True)
    peer.start()
    said = reader.communicate(timeout=20)[0].split()
    wait_until(
        lambda: reads(roots["tag"] / "f006") == hashes["f006"], 20
    )  # of the peer: the registry is away
    assert said in ([], [hashes["f006"], str(roots["digest"] / "f006")])  # right, or an error at the deadline

    registry.start()
    assert sha256(roots["persistent"] / "f007") == hashes["f007"]
    wait_until(lambda: roots["unseen"] in mounted_at(node), 30)
    assert sha256(roots["unseen"] / "f000") == unseen_hashes["f000"]


def reads(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        return os.strerror(error.errno or 0)
