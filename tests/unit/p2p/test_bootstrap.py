"""The bootstrapper with a network and name servers that are ours, on a clock that jumps."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.bootstrap import LOOKUP_SECONDS, Bootstrapper, SystemResolver
from p2pgz.p2p.remembered import RememberedPeers

pytestmark = pytest.mark.trio


def peer(n: int) -> PeerId:
    return PeerId.of_ed25519(n.to_bytes(32, "big"))


OWN = peer(0)


def entry(n: int, expected: PeerId | None = None) -> PeerAddress:
    return PeerAddress("ip4", f"192.0.2.{n}", 4001, expected)


class Network:
    """Hosts 192.0.2.N with peer N. Those in `cut` do not answer, those in `bug` are met by a bug of ours."""

    def __init__(self) -> None:
        self.connected: set[PeerId] = set()
        self.cut: set[int] = set()
        self.bug: set[int] = set()
        self.dials: list[tuple[float, int]] = []
        self.now_dialling = self.most_dialling = 0

    async def dial(self, host: str, port: int, expected: PeerId | None) -> PeerId:
        n = int(host.rpartition(".")[2])
        self.dials.append((trio.current_time(), n))
        self.now_dialling += 1
        self.most_dialling = max(self.most_dialling, self.now_dialling)
        try:
            if n in self.bug:
                raise RuntimeError("a bug")
            if n in self.cut:
                await trio.sleep(3.0)
                raise SourceUnavailable(f"peer at {host}:{port}: no answer within 3 s")
            await trio.sleep(0.01)
        finally:
            self.now_dialling -= 1
        if expected is not None and expected != peer(n):
            raise SourceUnavailable("somebody else answers")
        if peer(n) != OWN:
            self.connected.add(peer(n))
        return peer(n)

    def lose_all(self, *cut: int) -> None:
        self.cut.update(cut)
        self.connected.clear()


async def resolves(address: PeerAddress) -> Sequence[str]:
    await trio.sleep(0.1)
    return [f"192.0.2.{n}" for n in range(6)]


async def hangs(address: PeerAddress) -> Sequence[str]:
    await trio.sleep(LOOKUP_SECONDS)
    raise SourceUnavailable(f"{address.host}: no answer from the name server within {LOOKUP_SECONDS:g} s")


async def reaches(network: Network, count: int, seconds: float) -> None:
    with trio.fail_after(seconds):
        while len(network.connected) < count:
            await trio.sleep(0.05)


async def test_isolated_node_is_back_within_half_a_minute_after_an_hour(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network()
    bootstrapper = Bootstrapper([entry(1)], own=OWN, dial=network.dial, connected=lambda: network.connected)
    await nursery.start(bootstrapper.run)
    await reaches(network, 1, 1.0)
    network.lose_all(1)
    await trio.sleep(3600)
    (row,) = bootstrapper.status()
    assert row["state"] == "failing"
    assert "no answer" in row["error"]
    assert 3590 < row["since_seconds"] < 3600
    network.cut.clear()
    await reaches(network, 1, 30.0)
    assert bootstrapper.status()[0]["state"] == "connected"
    assert 100 < len(network.dials) < 400
    nursery.cancel_scope.cancel()


async def test_lost_peers_are_found_again_without_any_entry(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Nine others, met by way of the DHT; five of them are cut off and come back."""
    network = Network()
    network.connected = {peer(n) for n in range(1, 10)}

    def known() -> list[Contact]:
        return [Contact(p.raw, (entry(p.raw[-1]).to_bytes(),)) for p in network.connected]

    bootstrapper = Bootstrapper(
        [], own=OWN, dial=network.dial, connected=lambda: network.connected, known=known
    )
    await nursery.start(bootstrapper.run)
    await trio.sleep(120)
    network.cut = {5, 6, 7, 8, 9}
    network.connected -= {peer(n) for n in network.cut}
    await trio.sleep(600)
    network.cut.clear()
    await reaches(network, 5, 30.0)
    nursery.cancel_scope.cancel()


async def test_dead_name_server_keeps_nobody_from_joining(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network()
    entries = [PeerAddress.parse("/dns/dead.example/tcp/4001"), entry(1)]
    bootstrapper = Bootstrapper(
        entries, own=OWN, dial=network.dial, connected=lambda: network.connected, resolve=hangs
    )
    await nursery.start(bootstrapper.run)
    await reaches(network, 1, 0.5)
    await trio.sleep(LOOKUP_SECONDS + 1)
    dead, alive = bootstrapper.status()
    assert (dead["state"], alive["state"]) == ("failing", "connected")
    assert "no answer from the name server" in dead["error"]
    await trio.sleep(600)
    assert bootstrapper.lookups < 30
    nursery.cancel_scope.cancel()


async def test_all_addresses_of_a_name_are_tried_and_ourselves_only_once(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network()
    network.cut = {1, 2}
    heard: list[list[str]] = []
    bootstrapper = Bootstrapper(
        [PeerAddress.parse("/dns/p2pgz.example/tcp/4001")],
        own=OWN,
        dial=network.dial,
        connected=lambda: network.connected,
        resolve=resolves,
        on_addresses=lambda ips: heard.append(list(ips)),
    )
    await nursery.start(bootstrapper.run)
    await reaches(network, 3, 10.0)
    await trio.sleep(120)
    assert network.connected == {peer(3), peer(4), peer(5)}
    assert [n for _, n in network.dials].count(0) == 1
    assert network.most_dialling <= 4
    assert heard[-1] == [f"192.0.2.{n}" for n in range(6)]
    assert {contact.peer for contact in bootstrapper.contacts()} == {peer(n).raw for n in (3, 4, 5)}
    nursery.cancel_scope.cancel()


async def test_bug_met_at_one_address_does_not_end_it(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network()
    network.bug = {1}
    bootstrapper = Bootstrapper(
        [entry(1), entry(2)], own=OWN, dial=network.dial, connected=lambda: network.connected
    )
    await nursery.start(bootstrapper.run)
    await reaches(network, 1, 1.0)
    assert "RuntimeError: a bug" in bootstrapper.status()[0]["error"]
    nursery.cancel_scope.cancel()


async def test_offered_peer_is_dialled_at_once_when_peers_are_missing(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = Network()
    bootstrapper = Bootstrapper([], own=OWN, dial=network.dial, connected=lambda: network.connected)
    await nursery.start(bootstrapper.run)
    await trio.sleep(100.3)
    bootstrapper.offer(Contact(b"nonsense", (b"x",)))
    bootstrapper.offer(Contact(peer(1).raw, (b"nonsense", entry(1).to_bytes())))
    await reaches(network, 1, 0.2)
    nursery.cancel_scope.cancel()


async def test_next_session_joins_through_the_peers_of_the_last(tmp_path: Path) -> None:
    network = Network()
    for entries in ([entry(1), entry(2)], []):
        network.connected.clear()
        async with trio.open_nursery() as nursery:
            bootstrapper = Bootstrapper(
                entries,
                own=OWN,
                dial=network.dial,
                connected=lambda: network.connected,
                remembered=RememberedPeers.load(tmp_path, 1_700_000_000.0),
            )
            await nursery.start(bootstrapper.run)
            await reaches(network, 2, 2.0)
            nursery.cancel_scope.cancel()
    assert network.connected == {peer(1), peer(2)}


async def test_system_resolver_asks_in_a_thread_and_a_hanging_name_blocks_only_itself(
    mock_clock: trio.testing.MockClock,
) -> None:
    release = threading.Event()
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, family: int, kind: int) -> list[object]:
        asked.append(host)
        if host == "dead.example":
            release.wait(30)
        if host == "none.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (family, kind, 6, "", ("192.0.2.1", port)),
            (family, kind, 6, "", ("192.0.2.1", port)),
            (family, kind, 6, "", ("fe80::1%eth0", port, 0, 2)),
            (family, kind, 6, "", ("2001:db8::1", port, 0, 0)),
        ]

    resolver = SystemResolver(getaddrinfo)
    dead, good, none = (
        PeerAddress.parse(f"/dns/{name}.example/tcp/4001") for name in ("dead", "good", "none")
    )
    mock_clock.rate = 100.0
    try:
        for _ in range(2):
            with pytest.raises(SourceUnavailable, match="no answer from the name server within 5 s"):
                await resolver(dead)
        assert await resolver(good) == ["192.0.2.1", "2001:db8::1"]
        with pytest.raises(SourceUnavailable, match="cannot be looked up: Name or service"):
            await resolver(none)
    finally:
        release.set()
    assert asked.count("dead.example") == 1  # the second one waited for the first
