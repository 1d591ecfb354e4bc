"""What a connected peer has is left out of a file: by its bitmaps, layer by layer. And where a command writes its file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import trio.testing

from p2pgz.cli.exports import _counted, _write
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import Holder
from p2pgz.core.reference import parse_reference
from p2pgz.errors import ImageNotFound, UsageError
from p2pgz.node.exports import Exports, _name, peer_named

PEER, OTHER = PeerId(b"\x00\x24\x08\x01\x12\x20" + b"p" * 32), PeerId(b"\x00\x24\x08\x01\x12\x20" + b"o" * 32)


class Told:
    """A fetcher whose peers tell what they have of the first layer at once, and of the others never."""

    def __init__(self, *holders: Holder) -> None:
        self._holders = holders

    def origin(self, segment: Any) -> Any:
        return segment if segment.known else None

    def holders(self, origin: Any) -> tuple[Holder, ...]:
        return self._holders if origin.first else ()


def exports(fetcher: Told) -> Exports:
    return Exports(
        Mock(),
        fetcher,
        Mock(),
        Mock(),
        Mock(),
        open_image=Mock(),
        platform_of=Mock(),
        in_use=Mock(),
        addresses_of=Mock(),
    )  # type: ignore[arg-type]  # what is asked of it here


class Layer:
    def __init__(self, *, first: bool, known: bool = True) -> None:
        self.first, self.known = first, known


@pytest.mark.trio
async def test_what_a_peer_says_it_has_is_left_out(autojump_clock: trio.testing.MockClock) -> None:
    layers = [Layer(first=True), Layer(first=False), Layer(first=False, known=False)]
    image = SimpleNamespace(layers=layers, reference="image")
    told = Told(Holder(OTHER, lambda n: True, 0.1, 0.0), Holder(PEER, lambda n: n < 2, 0.1, 0.0))
    leave_out = await exports(told)._what_peer_has(image, "name", PEER.__eq__)  # type: ignore[arg-type]
    assert [leave_out(layers[0], n, b"") for n in range(3)] == [True, True, False]  # type: ignore[arg-type]
    assert not leave_out(layers[1], 0, b"")  # type: ignore[arg-type]


@pytest.mark.trio
async def test_a_peer_that_nobody_knows_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    image = SimpleNamespace(layers=[Layer(first=True)], reference="image")
    told = Told(Holder(OTHER, lambda n: True, 0.1, 0.0))
    with pytest.raises(ImageNotFound, match="has anything of image"):
        await exports(told)._what_peer_has(image, "name", PEER.__eq__)  # type: ignore[arg-type]


@pytest.mark.trio
async def test_several_peers_of_one_name_are_an_error(autojump_clock: trio.testing.MockClock) -> None:
    class Each(Told):
        def holders(self, origin: Any) -> tuple[Holder, ...]:
            return (Holder(PEER if origin.first else OTHER, lambda n: True, 0.1, 0.0),)

    image = SimpleNamespace(layers=[Layer(first=True), Layer(first=False)], reference="image")
    with pytest.raises(UsageError, match="several peers"):
        await exports(Each())._what_peer_has(image, "name", lambda peer: True)  # type: ignore[arg-type]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        (str(PEER), True),
        (str(OTHER), False),
        ("192.0.2.7", True),
        ("192.0.2.7:4801", True),
        ("192.0.2.7:4802", False),
        ("192.0.2.8", False),
        ("2001:db8::7", True),
        ("[2001:db8::7]:4801", True),
        ("[2001:db8::7]:1", False),
    ],
)
async def test_a_peer_is_named_by_id_or_address(text: str, is_it: bool) -> None:
    known = {
        PEER.raw: tuple(
            PeerAddress.parse(place).to_bytes()
            for place in ("/ip4/192.0.2.7/tcp/4801", "/ip6/2001:db8::7/tcp/4801")
        )
    }
    is_peer = await peer_named(text, lambda peer: known.get(peer, ()))
    assert is_peer(PEER) is is_it


@pytest.mark.trio
async def test_a_file_that_is_not_there_is_no_host_either() -> None:
    with pytest.raises(ImageNotFound, match="no file, no peer id, and no host"):
        await peer_named("no such.inventory", lambda peer: ())


def test_the_other_side_needs_a_name() -> None:
    local = parse_reference("oci:dir:tag")
    assert str(_name(local, "registry.example/x")) == "registry.example/x:latest"
    with pytest.raises(UsageError, match="needs a name"):
        _name(local, "")


def test_people_see_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pgz.cli.exports.SHOW_BYTES", 3)
    said: list[dict[str, str]] = []
    assert list(_counted(iter([b"ab", b"cd", b"e"]), "written", said.append)) == [b"ab", b"cd", b"e"]
    assert [event["text"] for event in said] == ["4 B written", ""]
    assert list(_counted(iter([b"ab"]), "written", None)) == [b"ab"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def broken() -> Any:
        yield b"first"
        raise ImageNotFound("gone")

    with pytest.raises(ImageNotFound):
        _write(str(path), broken())
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(ImageNotFound):
        _write(str(path), broken())
    assert path.read_bytes() == b"old"
    assert _write(str(path), iter([b"n", b"ew"])) == 3
    assert path.read_bytes() == b"new"
    os.mkfifo(tmp_path / "fifo")
    for place in ("fifo", "nosuch/file"):
        with pytest.raises(UsageError):
            _write(str(tmp_path / place), iter([b"x"]))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["fifo", "file"]
