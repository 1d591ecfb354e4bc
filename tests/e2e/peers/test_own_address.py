"""A bootstrap address that leads to the node itself, as a name that stands for all hosts does on each of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.peers.swarm import SwarmNode, wait_until
from tests.e2e.restart.lazy_node import state_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Forwarder:
    """A port that leads to another one, as a service's address does; counts who comes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.target = 0
        self.has_target = threading.Event()
        self.count = 0
        self.open: list[socket.socket] = []

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                self.count += 1
                self.has_target.wait(10)
                far = socket.create_connection(("127.0.0.1", self.target))
                self.open += [near, far]
                threading.Thread(target=pump, args=(near, far), daemon=True).start()
                threading.Thread(target=pump, args=(far, near), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def forwarder() -> Iterator[Forwarder]:
    made = Forwarder()
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        yield made
    finally:
        made.listener.shutdown(socket.SHUT_RDWR)
        made.listener.close()
        thread.join()
        for each in made.open:
            each.close()


def test_node_finds_out_that_it_has_dialled_itself_and_stops(tmp_path: Path) -> None:
    with state_folder() as folder, forwarder() as service:
        node = SwarmNode(folder / "node")
        try:
            node.start_node(
                P2PGZ_PEERS__BOOTSTRAP=f"/ip4/127.0.0.1/tcp/{service.port}", P2PGZ_PEERS__DHT="false"
            )
            service.target = int(node.addresses()[0].split("/")[4])
            service.has_target.set()
            wait_until(lambda: "bootstrap.reached" in node.log())
            time.sleep(2)  # an address that fails, or whose peer is gone, is dialled five times in that
            assert service.count == 1
            status = node.status()["node"]
            assert status["identity_twins"] == 0
            assert not any(status["faults"].values())
            assert node.peer_ids() == set()
        finally:
            node.close()
