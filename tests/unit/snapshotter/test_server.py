"""The service by gRPC, as containerd's client speaks it: statuses, streams, sockets."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from p2pgz.errors import StateError, StateInUse
from p2pgz.snapshotter import server
from p2pgz.snapshotter.pb import snapshots_pb2 as pb
from p2pgz.snapshotter.service import Snapshotter
from tests.unit.snapshotter.fake_images import FakeImages, chain, labels


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a name that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="p2pgz-g-") as name:
        yield Path(name)


class Client:
    """containerd's end."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def call(self, name: str, /, **fields: Any) -> Any:
        method = pb.DESCRIPTOR.services_by_name["Snapshots"].methods_by_name[name]
        request = getattr(pb, method.input_type.name)(snapshotter="p2pgz", **fields)
        make = self._channel.unary_stream if name == "List" else self._channel.unary_unary
        answer = getattr(pb, method.output_type.name, None)
        parse = answer.FromString if answer is not None else bytes
        stub = make(
            f"/{server.SERVICE}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=parse,
        )
        result = stub(request, timeout=30)
        return list(result) if name == "List" else result


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    service = Snapshotter(folder / "root", FakeImages())
    with (
        service.opened(),
        server.served(service, folder / "s.sock"),
        grpc.insecure_channel(f"unix:{folder}/s.sock") as channel,
    ):
        yield Client(channel)


def test_every_method(client: Client) -> None:
    made = client.call("Prepare", key="a", labels={"x": "y"}).mounts
    assert [(mount.type, list(mount.options)) for mount in made] == [("bind", ["rw", "rbind"])]
    assert client.call("Mounts", key="a").mounts == made
    client.call("Commit", name="A", key="a", labels={"x": "z"})
    info = client.call("Stat", key="A").info
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("A", "", pb.COMMITTED, {"x": "z"})
    assert info.created_at.seconds > 1_700_000_000
    info.labels["new"] = "1"
    assert client.call("Update", info=info, update_mask={"paths": ["labels.new"]}).info.labels["new"] == "1"
    assert client.call("View", key="v", parent="A").mounts[0].options == ["ro", "rbind"]
    assert client.call("Usage", key="A").inodes == 1
    listed = [one.name for page in client.call("List", filters=["kind==view"]) for one in page.info]
    assert listed == ["v"]
    client.call("Remove", key="v")
    client.call("Cleanup")
    assert [one.name for page in client.call("List") for one in page.info] == ["A"]


def test_a_lazy_layer_already_exists(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call("Prepare", key="extract-1", labels=labels(1))
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]
    assert client.call("Stat", key=chain(1)).info.kind == pb.COMMITTED


@pytest.mark.parametrize(
    ("name", "fields", "code"),
    [
        ("Stat", {"key": "x"}, grpc.StatusCode.NOT_FOUND),
        ("Prepare", {"key": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ("List", {"filters": ["=="]}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_errors_have_the_statuses_that_containerd_knows(
    client: Client, name: str, fields: dict[str, Any], code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(name, **fields)
    assert caught.value.code() == code  # type: ignore[attr-defined]


def test_many_snapshots_are_listed_in_pages(client: Client) -> None:
    for number in range(server.LIST_PAGE + 5):
        client.call("Prepare", key=f"{number}")
    pages = client.call("List")
    assert [len(page.info) for page in pages] == [server.LIST_PAGE, 5]


def test_the_socket_is_its_owners_alone(client: Client, folder: Path) -> None:
    assert (folder / "s.sock").stat().st_mode & 0o077 == 0


def test_the_socket_of_a_dead_server_is_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s.sock"))
    server.check_address(folder / "s.sock")
    assert not (folder / "s.sock").exists()


def test_a_socket_that_is_served_and_other_files_are_left_alone(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(folder / "s.sock"))
        alive.listen()
        with pytest.raises(StateInUse):
            server.check_address(folder / "s.sock")
    (folder / "file").write_text("mine")
    with pytest.raises(StateError):
        server.check_address(folder / "file")
    assert (folder / "file").read_text() == "mine"
    with pytest.raises(StateError):
        server.check_address(folder / ("x" * 120))
    assert sorted(os.listdir(folder)) == ["file", "s.sock"]
