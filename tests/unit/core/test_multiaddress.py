"""Addresses of peers: the same as the multiaddr library's, and wrong ones named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import ConfigError

PEER = PeerId.of_ed25519(bytes(range(32)))
GOOD = [
    "/ip4/192.0.2.7/tcp/4001",
    "/ip6/2001:db8::7/tcp/1",
    "/dns/seed.example.org/tcp/65535",
    "/dns4/p2pgz.kube-system.svc.cluster.local/tcp/4001",
    "/dns6/seed/tcp/4001",
]


@pytest.mark.parametrize("text", [*GOOD, *(f"{text}/p2p/{PEER}" for text in GOOD)])
def test_text_and_bytes_are_those_of_the_multiaddr_library(text: str) -> None:
    address = PeerAddress.parse(text)
    assert str(address) == text
    assert address.to_bytes() == Multiaddr(text).to_bytes()
    assert PeerAddress.from_bytes(address.to_bytes()) == address


def test_other_spellings_become_the_usual_one() -> None:
    assert str(PeerAddress.parse("/ip6/2001:0DB8:0::7/tcp/04001")) == "/ip6/2001:db8::7/tcp/4001"
    assert str(PeerAddress.parse("/dns/Seed.Example/tcp/1")) == "/dns/seed.example/tcp/1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a multiaddr"),
        ("192.0.2.7:4001", "not a multiaddr"),
        ("/ip4", "not a multiaddr"),
        ("/ip4/192.0.2.7", "only /tcp/PORT"),
        ("/ip4/192.0.2.7/udp/4001", "only /tcp/PORT"),
        ("/ip4/192.0.2.7/tcp/4001/ws", "only /tcp/PORT"),
        ("/ip4/192.0.2.7/tcp/4001/ws/x", "only /tcp/PORT"),
        ("/ip4/192.0.2.7/tcp/4001/", "only /tcp/PORT"),
        ("/ip4/192.0.2.7/tcp/4001/p2p/nobody", "peer id"),
        ("/ip4/192.0.2.7/tcp/0", "not a port"),
        ("/ip4/192.0.2.7/tcp/65536", "not a port"),
        ("/ip4/192.0.2.7/tcp/+1", "not a port"),
        ("/ip4/192.0.2.700/tcp/4001", "192.0.2.700"),
        ("/ip6/fe80::1%eth0/tcp/4001", "zone"),
        ("/dns/a..b/tcp/4001", "not a name"),
        ("/dns/-a/tcp/4001", "not a name"),
        ("/dns/" + "a." * 200 + "b/tcp/4001", "not a name"),
        ("/dnsaddr/seed.example.org", "dnsaddr is not supported"),
        ("/onion3/abc/tcp/1", "none of ip4"),
        ("/dns/" + "a" * 600 + "/tcp/1", "too long"),
    ],
)
def test_what_is_wrong_is_said_with_the_key(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        PeerAddress.parse(text, where="peers.bootstrap[1]")
    assert caught.value.what.startswith("peers.bootstrap[1]: ")
    assert "/ip4/192.0.2.7/tcp/4001" in caught.value.hint


def test_any_port_is_for_listening_only() -> None:
    assert PeerAddress.parse("/ip4/0.0.0.0/tcp/0", any_port=True).port == 0


@given(st.binary(max_size=64))
def test_random_bytes_parse_or_raise_the_named_error(data: bytes) -> None:
    try:
        address = PeerAddress.from_bytes(data)
    except ValueError:
        return
    assert PeerAddress.from_bytes(address.to_bytes()) == address


@given(
    st.sampled_from([Multiaddr(f"{text}/p2p/{PEER}").to_bytes() for text in GOOD]),
    st.integers(0, 80),
    st.integers(0, 255),
)
def test_mutated_addresses_parse_or_raise_the_named_error(data: bytes, at: int, value: int) -> None:
    mutated = bytearray(data)
    mutated[at % len(data)] = value
    for candidate in (bytes(mutated), data[: at % len(data)], data + bytes([value])):
        try:
            PeerAddress.from_bytes(candidate)
        except ValueError:
            continue


@given(st.text(max_size=80) | st.from_regex(r"/(ip4|ip6|dns)/[^/]{0,20}/tcp/[^/]{0,6}(/p2p/[^/]{0,60})?"))
def test_random_text_parses_or_raises_the_named_error(text: str) -> None:
    try:
        PeerAddress.parse(text)
    except ConfigError:
        return


def test_number_with_a_byte_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiaddr"):
        PeerAddress.from_bytes(b"\x84\x00" + PeerAddress.of_ip("192.0.2.1", 4001).to_bytes()[1:])
