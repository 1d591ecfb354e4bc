"""The command line's side of the control socket: nothing that a node does, or does not do, may hang a command."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pgz.cli import client
from p2pgz.cli.client import NodeClient
from p2pgz.errors import NodeUnavailable
from p2pgz.web.unix import API_SOCKET

HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"


@contextmanager
def answering(folder: Path, answer: Callable[[socket.socket], None]) -> Iterator[NodeClient]:
    """A node that does with a connection what `answer` does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / API_SOCKET))
        listener.listen(8)
        done = threading.Event()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                answer(sock)
                done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield NodeClient(folder)
        finally:
            done.set()
            thread.join()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)


def test_a_node_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with answering(tmp_path, lambda sock: None) as node, pytest.raises(NodeUnavailable, match="not answer"):
        node.status()


def test_a_node_that_stops_in_the_middle_of_its_status_is_given_up(tmp_path: Path) -> None:
    with (
        answering(tmp_path, lambda sock: sock.sendall(HEAD + b"{")) as node,
        pytest.raises(NodeUnavailable, match="does not go on"),
    ):
        node.status()


def test_a_request_may_take_its_time_once_the_node_has_begun(tmp_path: Path) -> None:
    def answer(sock: socket.socket) -> None:
        sock.sendall(HEAD)
        time.sleep(0.6)
        sock.sendall(json.dumps({"event": "result", "found": 7}).encode() + b"\n")

    with answering(tmp_path, answer) as node:
        assert node.call("/v1/anything", {})["found"] == 7
