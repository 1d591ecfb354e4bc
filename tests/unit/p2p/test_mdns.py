"""mDNS: the records, and two peers that find each other on this machine's loopback interface."""

from __future__ import annotations

import secrets

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.p2p.mdns import ADDRESSES_MAX, Mdns, make_record, read_record

ONE, OTHER = (PeerId.of_ed25519(bytes([n]) * 32) for n in (1, 2))
ADDRESSES = [
    PeerAddress.parse("/ip4/192.0.2.7/tcp/4801"),
    PeerAddress.parse("/ip6/2001:db8::7/tcp/4801"),
]


def strings(*texts: bytes) -> bytes:
    return b"".join(bytes([len(text)]) + text for text in texts)


def test_record_is_that_of_the_spec() -> None:
    record = make_record(ONE, ADDRESSES)
    assert record == strings(
        f"dnsaddr=/ip4/192.0.2.7/tcp/4801/p2p/{ONE}".encode(),
        f"dnsaddr=/ip6/2001:db8::7/tcp/4801/p2p/{ONE}".encode(),
    )
    assert read_record(record) == Contact(ONE.raw, tuple(address.to_bytes() for address in ADDRESSES))


def test_what_cannot_be_dialled_is_passed_over() -> None:
    record = strings(
        b"",
        b"txtvers=1",
        b"dnsaddr=nowhere",
        b"dnsaddr=\xff",
        b"dnsaddr=/ip4/192.0.2.1/tcp/1",
        f"dnsaddr=/dns/other.example/tcp/1/p2p/{ONE}".encode(),
        f"dnsaddr=/ip4/192.0.2.1/udp/1/quic-v1/p2p/{ONE}".encode(),
        f"dnsaddr=/ip4/192.0.2.2/tcp/1/p2p/{ONE}".encode(),
        f"dnsaddr=/ip4/192.0.2.3/tcp/1/p2p/{OTHER}".encode(),
    )
    assert read_record(record) == Contact(ONE.raw, (PeerAddress("ip4", "192.0.2.2", 1).to_bytes(),))
    assert read_record(b"") is None
    many = make_record(ONE, [PeerAddress("ip4", "192.0.2.1", port) for port in range(1, 99)])
    found = read_record(many)
    assert found is not None
    assert len(found.addresses) == ADDRESSES_MAX


@given(st.binary(max_size=300), st.integers(0, 200))
def test_random_and_mutated_records_are_read_or_passed_over(noise: bytes, at: int) -> None:
    record = make_record(ONE, ADDRESSES)
    for data in (noise, record[:at] + noise + record[at:], record[:at]):
        read_record(data)


@pytest.mark.trio
async def test_two_peers_find_each_other_and_hear_of_new_addresses() -> None:
    # a name of its own: other tests of this kind may run on this machine
    service = f"_t{secrets.token_hex(5)}._udp.local."
    here = {peer: [PeerAddress("ip4", "127.0.0.1", 4000 + n)] for n, peer in enumerate((ONE, OTHER))}
    heard: dict[PeerId, list[Contact]] = {ONE: [], OTHER: []}

    def announcer(peer: PeerId) -> Mdns:
        return Mdns(
            peer,
            addresses=lambda: here[peer],
            found=heard[peer].append,
            interfaces=["127.0.0.1"],
            service=service,
        )

    def contact(peer: PeerId) -> Contact:
        return Contact(peer.raw, tuple(address.to_bytes() for address in here[peer]))

    async with trio.open_nursery() as nursery:
        one, other = announcer(ONE), announcer(OTHER)
        for mdns in (one, other):
            await nursery.start(mdns.run)
            assert mdns.error is None
        with trio.fail_after(20):
            while not (heard[ONE] and heard[OTHER]):
                await trio.sleep(0.02)
        assert contact(OTHER) in heard[ONE]
        assert contact(ONE) in heard[OTHER]
        here[ONE] = [PeerAddress("ip4", "127.0.0.1", 5000)]
        one.changed()
        with trio.fail_after(20):
            while contact(ONE) not in heard[OTHER]:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert {found.peer for found in heard[ONE]} == {OTHER.raw}


@pytest.mark.trio
async def test_no_multicast_is_said_and_harms_nobody() -> None:
    mdns = Mdns(ONE, addresses=lambda: ADDRESSES, found=lambda _contact: None, interfaces=["203.0.113.77"])
    async with trio.open_nursery() as nursery:
        await nursery.start(mdns.run)
        assert mdns.error is not None
        nursery.cancel_scope.cancel()
