"""Peers remembered on disk: what is kept, and what a damaged file does (nothing)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import P2pgzError
from p2pgz.p2p import remembered
from p2pgz.p2p.remembered import ADDRESSES_MAX, DAMAGED_FILE, FILE, FORGET_SECONDS, PEERS_MAX, RememberedPeers

NOW = 1_700_000_000.0


def peer(n: int) -> PeerId:
    return PeerId.of_ed25519(n.to_bytes(32, "big"))


def address(n: int, port: int = 4001) -> PeerAddress:
    return PeerAddress("ip4", f"192.0.{n // 250}.{n % 250}", port)


def save(known: RememberedPeers) -> None:
    content = known.pending()
    assert content is not None
    known.write(content)


def test_best_of_the_last_session_come_back(tmp_path: Path) -> None:
    first = RememberedPeers.load(tmp_path, NOW)
    for n in range(3 * PEERS_MAX):
        first.note(peer(n), [address(n), address(n, 4002)], NOW + n)
    first.note(peer(0), [address(0)], NOW + 1000)
    save(first)
    assert first.pending() is None
    again = RememberedPeers.load(tmp_path, NOW + 2000)
    assert len(again) == PEERS_MAX
    assert again.best(2) == [
        (peer(0), (address(0),)),
        (peer(383), (address(383), address(383, 4002))),
    ]
    assert again.contacts()[0].addresses == (address(0).to_bytes(),)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_names_and_the_id_at_the_end_are_not_kept_and_addresses_are_few(tmp_path: Path) -> None:
    known = RememberedPeers.load(tmp_path, NOW)
    known.note(peer(1), [PeerAddress.parse("/dns/seed/tcp/1")], NOW)
    assert known.pending() is None
    known.note(peer(1), [PeerAddress("ip4", "192.0.2.1", port, peer(1)) for port in range(1, 99)], NOW)
    save(known)
    ((_, addresses),) = RememberedPeers.load(tmp_path, NOW).best(9)
    assert len(addresses) == ADDRESSES_MAX
    assert str(addresses[0]) == "/ip4/192.0.2.1/tcp/1"


def test_old_peers_are_forgotten_and_a_wrong_clock_makes_nobody_the_best(tmp_path: Path) -> None:
    known = RememberedPeers.load(tmp_path, NOW)
    known.note(peer(1), [address(1)], NOW - FORGET_SECONDS - 1)
    known.note(peer(2), [address(2)], NOW + 10 * FORGET_SECONDS)
    known.note(peer(3), [address(3)], NOW)
    save(known)
    again = RememberedPeers.load(tmp_path, NOW)
    again.note(peer(4), [address(4)], NOW + 1)
    assert [found for found, _ in again.best(9)] == [peer(4), *(p for p, _ in again.best(9)[1:])]
    assert len(again) == 3


GOOD = {"id": str(peer(1)), "addresses": ["/ip4/192.0.2.1/tcp/1"], "last_seen": NOW}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b"{",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "peers": []}',
        b'{"version": 1, "peers": [1]}',
        b"[" * 100_000,
        b" " * (remembered.FILE_MAX_BYTES + 1),
        *(
            json.dumps({"version": 1, "peers": [{**GOOD, **wrong}]}).encode()
            for wrong in (
                {"id": "nobody"},
                {"id": None},
                {"addresses": ["nowhere"]},
                {"addresses": [7]},
                {"addresses": ["/ip4/192.0.2.1/tcp/1"] * 99},
                {"last_seen": "yesterday"},
                {"last_seen": True},
            )
        ),
        json.dumps({"version": 1, "peers": [GOOD] * (PEERS_MAX + 1)}).encode(),
    ],
    ids=lambda content: content[:24].decode(errors="replace"),
)
def test_damaged_file_is_set_aside_and_the_node_starts_without(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    known = RememberedPeers.load(tmp_path, NOW)
    assert len(known) == 0
    assert (tmp_path / DAMAGED_FILE).read_bytes() == content
    known.note(peer(1), [address(1)], NOW)
    save(known)
    assert len(RememberedPeers.load(tmp_path, NOW)) == 1


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_mutated_files_parse_or_raise_named_errors(noise: bytes, at: int) -> None:
    content = json.dumps({"version": 1, "peers": [GOOD, GOOD]}).encode()
    at %= len(content)
    for data in (noise, content[:at] + noise + content[at:], content[:at] + noise):
        try:
            remembered._parse(data, NOW)
        except (ValueError, P2pgzError):
            continue


def test_disk_that_refuses_does_not_stop_the_node(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    known = RememberedPeers.load(gone, NOW)
    known.note(peer(1), [address(1)], NOW)
    save(known)
    assert not gone.exists()
