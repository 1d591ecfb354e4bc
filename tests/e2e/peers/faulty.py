"""One node that reads, one registry, one image of many files, and peers that misbehave in processes of their own.

Each test takes files that nobody has read yet (`World.fresh`), so that node, registry and image serve them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pgz.core.digest import Digest
from p2pgz.core.media import TOC_DIGEST_ANNOTATION
from p2pgz.testing.bad_peer import write_chunks
from p2pgz.testing.registry_faults import Fault
from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import push_converted
from tests.e2e.peers.swarm import SwarmNode, wait_until

FILES = 90
TAIL_FILES = 8
CHUNK_BYTES = 64 << 10  # the smallest that `convert` makes
FILE_CHUNKS = 3
# odd, so that no file ends where another begins
FILE_BYTES = FILE_CHUNKS * CHUNK_BYTES - 1001
DEADLINE_SECONDS = 8.0
"""after which a read fails, where the default is 60"""
ALWAYS = 1_000_000


@dataclass
class BadPeer:
    """A process of `p2pgz.testing.bad_peer`."""

    child: subprocess.Popen[str]
    id: str = ""
    events: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    seen: list[str] = field(default_factory=list)

    def wait_for(self, event: str, seconds: float = 10.0) -> dict[str, Any]:
        """Wait until something has happened over there."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            self.seen.append(found["event"])
            if found["event"] == event:
                return found

    def has(self, event: str) -> bool:
        """Whether something has happened so far."""
        with suppress(queue.Empty):
            while True:
                self.seen.append(self.events.get_nowait()["event"])
        return event in self.seen


@dataclass
class World:
    """What the tests of a module share."""

    folder: Path
    registry: RegistryThread
    node: SwarmNode
    reference: str
    contents: dict[str, bytes]
    stock: Path
    unread: list[str]

    def fresh(self, count: int = 1) -> list[str]:
        """Files that nobody has read."""
        assert len(self.unread) >= count, "the image has too few files"
        return [self.unread.pop() for _ in range(count)]

    def read(self, name: str) -> float:
        """Read a file through the mount and compare it; the seconds it took."""
        before = time.monotonic()
        data = (self.node.root / name).read_bytes()
        assert hashlib.sha256(data).digest() == hashlib.sha256(self.contents[name]).digest(), name
        return time.monotonic() - before

    def read_at_last(self, name: str) -> None:
        """Read a file again and again until that works: requests that were under way in bad times may still fail."""
        deadline = time.monotonic() + 2 * DEADLINE_SECONDS
        while True:
            try:
                self.read(name)
            except OSError:
                assert time.monotonic() < deadline, f"{name} cannot be read"
            else:
                return

    def faults(self) -> dict[str, int]:
        """The node's table of faults."""
        found: dict[str, int] = self.node.status()["node"]["faults"]
        return found

    def is_out(self, peer: BadPeer) -> bool:
        """Whether the node has taken a peer's place away."""
        return peer.id in {row["peer_id"] for row in self.node.status()["node"]["faulty_peers"]}

    def address(self) -> str:
        """Where peers dial the node: host:port."""
        parts = self.node.addresses()[0].split("/")
        return f"{parts[2]}:{parts[4]}"

    @contextmanager
    def bad_peer(self, fault: str, *, seed: str = "", joined: bool = True) -> Iterator[BadPeer]:
        """One that is connected, and that the node believes to have everything."""
        command = [sys.executable, "-m", "p2pgz.testing.bad_peer", "--chunks", str(self.stock)]
        command += ["--dial", self.address(), "--fault", fault, "--seed", seed]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        peer = BadPeer(child)

        def listen() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                peer.events.put(json.loads(line))

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            if joined:
                peer.id = peer.wait_for("connected")["peer"]
                peer.wait_for("joined")
            yield peer
        finally:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGCONT)
            assert child.stdin is not None
            child.stdin.close()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            listener.join()
            assert child.stdout is not None
            child.stdout.close()

    def wait_for_registry_request(self) -> None:
        """Until a request meets the fault that the registry was given."""
        wait_until(lambda: any(fault.times < ALWAYS for fault in self.registry.fake.faults))

    @contextmanager
    def registry_does(self, **fault: Any) -> Iterator[None]:
        """The registry fails so with blobs, for the block."""
        self.registry.spoil(Fault(on="/blobs/", times=ALWAYS, **fault))
        try:
            yield
        finally:
            self.registry.spoil()


@contextmanager
def world(folder: Path, **environment: str) -> Iterator[World]:
    """Everything running, the image mounted, nothing read."""
    rng = random.Random(folder.name)
    contents = {f"f{n:03}": rng.randbytes(FILE_BYTES + n) for n in range(FILES)}
    with ExitStack() as stack:
        registry = stack.enter_context(RegistryThread.running())
        node = SwarmNode(folder / "node")
        stack.callback(node.close)
        reference = push_converted(
            node,
            folder / "plain",
            f"{registry.address}/lab/faults:t",
            contents,
            options=("--chunk-size", str(CHUNK_BYTES)),
        )
        stock = folder / "stock"
        write_chunks(stock, toc_of(registry, reference), chunks_of(contents))
        node.start_node(
            P2PGZ_PEERS__ENABLED="always",
            P2PGZ_PEERS__DHT="false",
            P2PGZ_FETCH__READ_DEADLINE_SECONDS=str(DEADLINE_SECONDS),
            **environment,
        )
        node.ok("mount", "--plain-http", "--mode", "tree", reference, node.root)
        # the last ones come with the end of the blob, where the TOC is; of the rest the last goes first, since a request
        # to the registry may bring what follows
        unread = sorted(contents)[:-TAIL_FILES]
        yield World(folder, registry, node, reference, contents, stock, unread)


def toc_of(registry: RegistryThread, reference: str) -> bytes:
    """The digest of the TOC of an image's one layer, which is its swarm."""
    repository, _, tag = reference.partition("/")[2].rpartition(":")
    digest = registry.fake.store.find_manifest(repository, tag)
    assert digest is not None
    (layer,) = json.loads(registry.fake.store.content[digest])["layers"]
    return Digest.parse(layer["annotations"][TOC_DIGEST_ANNOTATION]).raw


def chunks_of(contents: dict[str, bytes]) -> list[bytes]:
    """The chunks of an image of these files, in the order of its TOC."""
    return [
        data[at : at + CHUNK_BYTES] for data in contents.values() for at in range(0, len(data), CHUNK_BYTES)
    ]


def open_descriptors(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
