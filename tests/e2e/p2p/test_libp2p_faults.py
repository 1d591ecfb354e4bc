"""Each fault of py-libp2p 0.8.1 that p2p/host.py and p2p/libp2p_parts.py work around, and admission on the DHT's plane."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.dht import Dht
from p2pgz.p2p.host import IDLE_SECONDS
from p2pgz.p2p.identity import Identity
from p2pgz.testing.dht import contact_of, listening_dht

pytestmark = pytest.mark.slow
KEY = Digest.of(b"something").multihash


async def echo(sender: Contact, message: bytes) -> bytes:
    await trio.lowlevel.checkpoint()
    return message


async def until_end(stream: Any) -> bytes:
    """What comes before the stream's end or reset, which the library reports by a dozen types."""
    said = b""
    with contextlib.suppress(Exception):
        while read := await stream.read(100):
            said += read
    return said


async def linked(one: Dht, other: Dht) -> None:
    with trio.fail_after(30):
        await other.host.connect(contact_of(one))
        while one.host.peer not in other.host.protocols or other.host.peer not in one.host.protocols:
            await trio.sleep(0.01)


@pytest.mark.trio
async def test_handler_that_raises_costs_its_stream_only() -> None:
    async def broken(sender: Contact, message: bytes) -> bytes:
        raise RuntimeError("a bug")

    async with listening_dht() as one, listening_dht() as other:
        one.host.serve("/broken", broken)
        one.host.serve("/echo", echo)
        await linked(one, other)
        with pytest.raises(SourceUnavailable):
            await other.host.ask(contact_of(one), "/broken", b"hello")
        assert await other.host.ask(contact_of(one), "/echo", b"hello") == b"hello"


@pytest.mark.trio
async def test_connection_survives_a_storm_of_cancelled_requests() -> None:
    async with listening_dht() as one, listening_dht() as other:
        one.host.serve("/echo", echo)
        await linked(one, other)
        before = other.host._host.get_network().get_connections()

        async def impatient(number: int) -> None:
            for step in range(20):
                with trio.move_on_after((number * 7 + step * 13) % 50 / 10_000):
                    await other.host.ask(contact_of(one), "/echo", b"x" * 300_000)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(impatient, number)
        assert await other.host.ask(contact_of(one), "/echo", b"still here") == b"still here"
        assert before == other.host._host.get_network().get_connections()
        with trio.fail_after(30):
            while any(len(connection.get_streams()) for connection in before):
                await trio.sleep(0.05)


@pytest.mark.trio
async def test_stream_whose_negotiation_outlasts_the_caller_is_not_left_in_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2pgz.p2p.host.CALL_SECONDS", 0.2)
    async with listening_dht() as one, listening_dht() as other:
        one.host.serve("/echo", echo)
        await linked(one, other)
        (connection,) = other.host._host.get_network().get_connections()
        opener, client = other.host._opener, other.host._host.multiselect_client
        go, negotiate = trio.Event(), client.select_one_of

        async def late(*arguments: Any) -> Any:
            await go.wait()
            return await negotiate(*arguments)

        client.select_one_of = late
        for _ in range(3):
            with pytest.raises(SourceUnavailable):
                await other.host.ask(contact_of(one), "/echo", b"hello")
        assert opener.running >= 3  # the DHT itself may be asking, too
        monkeypatch.setattr("p2pgz.p2p.libp2p_opening.NEGOTIATIONS_MAX", 3)
        with pytest.raises(SourceUnavailable, match="being opened"):
            await other.host.ask(contact_of(one), "/echo", b"hello")
        go.set()
        with trio.fail_after(10):
            while opener.running or connection.get_streams():
                await trio.sleep(0.01)
        client.select_one_of = negotiate
        monkeypatch.setattr("p2pgz.p2p.host.CALL_SECONDS", 10.0)
        assert await other.host.ask(contact_of(one), "/echo", b"still here") == b"still here"


@pytest.mark.trio
async def test_connection_whose_closing_was_cancelled_does_not_make_the_peer_unreachable() -> None:
    async with listening_dht() as one, listening_dht() as other:
        await linked(one, other)
        (connection,) = other.host._host.get_network().get_connections()
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.close()
        assert connection.is_closed
        assert await other.kad.ping(contact_of(one))


@pytest.mark.trio
async def test_dead_connection_that_the_library_believes_in_is_replaced() -> None:
    async with listening_dht() as one, listening_dht() as other:
        await linked(one, other)
        (connection,) = other.host._host.get_network().get_connections()

        async def fail(data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            raise ConnectionResetError("reset by the peer")

        connection.muxed_conn._write_frame = fail
        assert await other.kad.ping(contact_of(one))


@pytest.mark.trio
async def test_port_that_accepts_and_says_nothing_fails_the_dial_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2pgz.p2p.host.DIAL_SECONDS", 0.5)
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    async with listening_dht() as one:
        address = b"\x04\x7f\x00\x00\x01\x06" + port.to_bytes(2, "big")
        stranger = Contact(Identity.new().peer_id.raw, (address,))
        with trio.fail_after(3), pytest.raises(SourceUnavailable, match="no answer in time"):
            await one.host.connect(stranger)
    await silent[0].aclose()


@pytest.mark.trio
async def test_peer_that_could_not_be_reached_is_dialled_again_at_once() -> None:
    identity = Identity.new()
    async with listening_dht() as one:
        async with listening_dht(identity=identity) as other:
            gone = contact_of(other)
        with pytest.raises(SourceUnavailable):
            await one.host.connect(gone)
        async with listening_dht(identity=identity) as back:
            await one.host.connect(contact_of(back))
            assert await one.kad.ping(contact_of(back))


@pytest.mark.trio
async def test_another_identity_at_the_address_is_refused() -> None:
    async with listening_dht() as one, listening_dht() as other:
        with pytest.raises(SourceUnavailable):
            await other.host.connect(Contact(Identity.new().peer_id.raw, one.host.addresses))


@pytest.mark.trio
async def test_dial_takes_no_quarter_of_a_second() -> None:
    async with listening_dht() as one, listening_dht() as other:
        took = []
        for _ in range(3):
            begin = trio.current_time()
            await other.host.connect(contact_of(one))
            took.append(trio.current_time() - begin)
            await other.host.disconnect(one.host.peer)
        assert min(took) < 0.2


@pytest.mark.trio
async def test_inbound_connections_come_and_go_beyond_the_librarys_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library counts every inbound connection there ever was against its limit."""
    monkeypatch.setattr("p2pgz.p2p.libp2p_parts.CONNECTIONS_MAX", 3)
    async with listening_dht() as one, listening_dht() as other:
        for _ in range(5):
            await other.host.connect(contact_of(one))
            assert await other.kad.ping(contact_of(one))
            await other.host.disconnect(one.host.peer)
            with trio.fail_after(30):
                while one.host.connected():
                    await trio.sleep(0.02)


@pytest.mark.trio
async def test_nothing_in_the_clear_is_offered_or_accepted() -> None:
    async with listening_dht() as one:
        upgrader = one.host._host.get_network().upgrader
        offered = [str(protocol) for protocol in upgrader.security_multistream.transports]
        assert offered == ["/noise", "/tls/1.0.0"]
        port = int.from_bytes(one.host.addresses[0][-2:], "big")
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n")
            said = b""
            with trio.fail_after(30):
                while b"na\n" not in said:
                    said += await stream.receive_some() or b"na\n"
            assert b"plaintext" not in said


@pytest.mark.trio
@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xff\xff\xff\x7f" + bytes(100),
        b"\x80\x80\x40" + bytes(100),
        b"\x05\xff\xff\xff\xff\xff",
        b"\x20\x08",
        b"\x02\x08\x04",
        b"\x02\x08\x63",
    ],
    ids=["4 GB", "over 1 MiB", "no protobuf", "cut short", "no key", "no such kind"],
)
async def test_junk_costs_the_stream_and_no_more(junk: bytes) -> None:
    async with listening_dht() as one, listening_dht() as other:
        await linked(one, other)
        stream = await other.host._open(contact_of(one), one.kad.protocol)
        await stream.write(junk)
        await stream.close_write()
        with trio.fail_after(30):
            assert await until_end(stream) == b""
        await stream.reset()
        assert await other.kad.ping(contact_of(one))


@pytest.mark.trio
async def test_peer_that_comes_back_on_another_port_is_known_by_that_only() -> None:
    """The library keeps the addresses of earlier connections among those it gives out."""
    identity = Identity.new()
    async with listening_dht() as one:
        for _ in range(3):
            async with listening_dht(one, identity=identity) as other:
                with trio.fail_after(30):
                    while one.kad.table.get(other.host.peer) != contact_of(other):
                        await trio.sleep(0.02)


@pytest.mark.trio
async def test_idle_connection_is_closed_and_made_again_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pgz.p2p.host.TEND_SECONDS", 0.05)
    async with listening_dht() as one, listening_dht() as other:
        await linked(one, other)
        with trio.fail_after(20):
            while other.host.connected():
                # whatever the two still had to say to each other at the start counts as use
                other.host._used[one.host.peer] = trio.current_time() - IDLE_SECONDS - 1
                await trio.sleep(0.02)
        assert await other.kad.ping(contact_of(one))


@pytest.mark.trio
async def test_connections_over_the_budget_are_closed_idle_longest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with listening_dht() as hub, listening_dht() as one, listening_dht() as two:
        await linked(one, hub)
        await linked(two, hub)
        hub.host._used[one.host.peer] = trio.current_time() - 5
        monkeypatch.setattr("p2pgz.p2p.host.CONNECTIONS_KEPT", 1)
        monkeypatch.setattr("p2pgz.p2p.host.TEND_SECONDS", 0.05)
        hub.host._nursery.start_soon(hub.host._tend)
        with trio.fail_after(30):
            while len(hub.host.connected()) > 1:
                await trio.sleep(0.02)
        assert [two.host.peer] == hub.host.connected()


@pytest.mark.trio
async def test_library_dials_nobody_by_itself() -> None:
    async with listening_dht() as one, listening_dht() as other:
        await linked(one, other)
        await other.host.disconnect(one.host.peer)
        await other.host._host.get_network().auto_connector.maybe_connect()
        await trio.sleep(0.3)
        assert other.host.connected() == []


@pytest.mark.trio
async def test_address_that_is_ours_as_well_is_not_dialled() -> None:
    async with listening_dht() as one:
        bridge = Contact(Identity.new().peer_id.raw, one.host.addresses)
        with pytest.raises(SourceUnavailable, match="no address"):
            await one.host.connect(bridge)
        malformed = Contact(Identity.new().peer_id.raw, (b"\xff\xff", b""))
        with pytest.raises(SourceUnavailable, match="no address"):
            await one.host.connect(malformed)


@pytest.mark.trio
async def test_only_who_knows_the_cluster_key_takes_part() -> None:
    key, wrong = b"0123456789abcdef", b"fedcba9876543210"
    async with listening_dht(admission=Admission(cluster_keys=[key])) as one:  # noqa: SIM117  # bootstraps from it
        async with listening_dht(one, admission=Admission(cluster_keys=[key])) as member:
            member.announcer.provide(KEY)
            with trio.fail_after(30):
                while not one.kad.records.providers(KEY, trio.current_time()):
                    await trio.sleep(0.02)
            async with (
                listening_dht(one, admission=Admission(cluster_keys=[wrong])) as outsider,
                listening_dht(one) as stranger,
            ):
                assert not await outsider.kad.ping(contact_of(one))
                assert await stranger.kad.find_providers(KEY) == []
                with pytest.raises(SourceUnavailable):
                    await stranger.host.ask(contact_of(one), "/p2pgz/records/1.0.0", b"\x04")
                assert {member.host.peer} == {contact.peer for contact in one.kad.table}


@pytest.mark.trio
async def test_stopped_peer_fails_a_request_within_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP and SIGKILL of a real process: the one answers never, the other looks like a clean end."""
    monkeypatch.setattr("p2pgz.p2p.kad.QUERY_SECONDS", 1.0)
    code = (
        "import sys, trio\n"
        "from p2pgz.testing.dht import listening_dht, multiaddr_of\n"
        "async def main():\n"
        "    async with listening_dht() as dht:\n"
        "        print(multiaddr_of(dht), dht.host.peer.hex(), dht.host.addresses[0].hex(), flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        _, peer, address = (await trio.to_thread.run_sync(process.stdout.readline)).split()
        contact = Contact(bytes.fromhex(peer), (bytes.fromhex(address),))
        async with listening_dht() as one:
            assert await one.kad.ping(contact)
            os.kill(process.pid, signal.SIGSTOP)
            begin = trio.current_time()
            assert not await one.kad.ping(contact)
            assert trio.current_time() - begin < 2
            os.kill(process.pid, signal.SIGCONT)
            with trio.fail_after(30):
                while not await one.kad.ping(contact):
                    await trio.sleep(0.1)
            process.kill()
            process.wait()
            assert not await one.kad.ping(contact)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_library_writes_nothing_to_standard_error() -> None:
    code = (
        "import logging, trio\n"
        "from p2pgz.testing.dht import listening_dht, contact_of\n"
        "async def main():\n"
        "    async with listening_dht() as one:\n"
        "        async with listening_dht(one) as other:\n"
        "            await trio.sleep(0.5)\n"
        "        assert not await one.kad.ping(contact_of(other))\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_command_line_does_not_import_libp2p() -> None:
    code = "import sys; from p2pgz.cli import main; import p2pgz.node; print('libp2p' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_our_own_log_records_pass_the_librarys_filter() -> None:
    from p2pgz.p2p.libp2p_parts import quieten

    quieten()
    quieten()
    root = logging.getLogger()
    ours = logging.LogRecord("p2pgz", logging.ERROR, __file__, 1, "x", (), None)
    theirs = logging.LogRecord("root", logging.ERROR, "/x/site-packages/libp2p/a.py", 1, "x", (), None)
    assert (bool(root.filter(ours)), bool(root.filter(theirs))) == (True, False)
