"""Who is charged for a dial that failed, what happens at our own address, and what busy peers can make us dial."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.messages import Alternative
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.dialling import HINTS_AT_ONCE
from p2pgz.p2p.handshake import Credentials, Ourselves, Unproven
from p2pgz.p2p.identity import Identity
from p2pgz.testing.peers import open_peer, peer_layer

LAYER = peer_layer(3)
NOBODY = PeerId.of_ed25519(bytes(32))
pytestmark = pytest.mark.trio


async def test_own_address_is_known_by_who_answers_and_is_no_connection(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER, chunks=()) as a:
        with pytest.raises(Ourselves) as caught:
            await a.exchange.connect("127.0.0.1", a.port)
        assert not caught.value.twin
        assert a.exchange.dialler.twins == 0
        assert not a.exchange.connections()
        assert not a.exchange.standing.counts


async def test_our_identity_on_another_host_is_told_apart_from_ourselves(tmp_path: Path) -> None:
    identity = Identity.new()
    async with (
        open_peer(tmp_path / "a", LAYER, identity=identity) as a,
        open_peer(tmp_path / "b", LAYER, chunks=(), identity=identity) as b,
    ):
        with pytest.raises(Ourselves, match="our identity") as caught:
            await b.exchange.connect("127.0.0.1", a.port)
        assert caught.value.twin
        assert (a.exchange.dialler.twins, b.exchange.dialler.twins) == (0, 1)


async def test_what_somebody_else_does_at_an_address_is_not_the_expected_peers_fault(tmp_path: Path) -> None:
    """A TLS server that is none of ours: certificate and protocol are wrong, and nothing says whose."""
    accepting, _ = Identity.new().tls_contexts()
    accepting.set_alpn_protocols(["h2"])

    async def other_server(raw: trio.SocketStream) -> None:
        stream = trio.SSLStream(raw, accepting, server_side=True)
        with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):  # noqa: PT012  # until the other end goes
            await stream.do_handshake()
            while await stream.receive_some(1):
                pass
            raise trio.BrokenResourceError

    async with open_peer(tmp_path / "a", LAYER, chunks=()) as a, trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, other_server, 0)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(Unproven):
            await a.exchange.connect("127.0.0.1", port, expected=NOBODY)
        assert not a.exchange.standing.counts
        assert not a.exchange.standing.out_until(NOBODY, trio.current_time())
        nursery.cancel_scope.cancel()


async def test_peer_that_cannot_be_reached_is_left_alone_for_a_moment(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER, chunks=()) as a:
        with trio.socket.socket() as closed:
            await closed.bind(("127.0.0.1", 0))
            with pytest.raises(SourceUnavailable):
                await a.exchange.connect("127.0.0.1", closed.getsockname()[1], expected=NOBODY)
        assert a.exchange.standing.counts == {Fault.LOST: 1}


async def test_peers_that_a_busy_one_names_are_dialled_in_the_background(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "named", LAYER) as named,
        open_peer(tmp_path / "asking", LAYER, chunks=()) as asking,
    ):
        told = Alternative(named.id.raw, f"/ip4/127.0.0.1/tcp/{named.port}")
        asking.exchange.dialler.hint([told, told])
        assert len(asking.exchange.dialler._hinting) == 1
        with trio.fail_after(5):
            while asking.exchange.connection(named.id) is None:
                await trio.sleep(0.01)
        asking.exchange.dialler.hint([told])
        assert not asking.exchange.dialler._hinting


async def test_what_a_busy_peer_can_make_us_dial_is_bounded(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER, chunks=()) as a:
        dialler = a.exchange.dialler
        address = f"/ip4/127.0.0.1/tcp/{a.port}"
        nonsense = [
            Alternative(b"no peer id", address),
            Alternative(NOBODY.raw, "no address"),
            Alternative(NOBODY.raw, "/dns/name.example/tcp/1"),
            Alternative(a.id.raw, address),
        ]
        dialler.hint(nonsense)
        assert not dialler._hinting
        many = [Alternative(PeerId.of_ed25519(bytes([n]) * 32).raw, address) for n in range(20)]
        dialler.hint(many)
        assert len(dialler._hinting) == HINTS_AT_ONCE
        with trio.fail_after(5):
            while dialler._hinting:
                await trio.sleep(0.01)
        dialler.hint(many[:HINTS_AT_ONCE])  # tried a moment ago
        assert not dialler._hinting
        assert not a.exchange.standing.counts  # somebody else answered: not their fault


async def test_nonces_are_kept_no_longer_than_the_handshake(tmp_path: Path) -> None:
    credentials = Credentials.make(Identity.new(), Admission())
    async with (
        open_peer(tmp_path / "a", LAYER, credentials=credentials) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port)
        with trio.fail_after(5):
            while not a.exchange.connections():
                await trio.sleep(0.01)
        assert not credentials.nonces


async def test_status_says_who_did_what(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER, chunks=()) as a,
        open_peer(tmp_path / "b", LAYER) as b,
    ):
        now = trio.current_time()
        a.exchange.standing.fault(b.id, Fault.SLOW, now)
        (row,) = a.exchange.faulty_peers()
        assert (row["peer_id"], row["faults"]) == (str(b.id), {"slow": 1})
        assert 0 < row["out_seconds"] <= 1
        await a.exchange.connect("127.0.0.1", b.port, expected=b.id, insist=True)
        (connection,) = a.exchange.status()
        assert connection["faults"] == {"slow": 1}
        a.exchange.connections()[0].blame(SourceUnavailable("a test"), Fault.CORRUPT)
        (row,) = a.exchange.faulty_peers()
        assert row["faults"] == {"slow": 1, "corrupt": 1}
        assert row["out_seconds"] > 500
