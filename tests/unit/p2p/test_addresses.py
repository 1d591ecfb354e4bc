"""Which addresses are announced, and which are dialled, for routing tables that are ours and for the real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pgz.core.joining import Endpoint
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.p2p import addresses
from p2pgz.p2p.addresses import OBSERVERS_MAX, OwnAddresses, dialable, is_own_ip, route_source

WILDCARD = [("0.0.0.0", 4801), ("::", 4801)]
LAN, OTHER_LAN, V6 = "10.0.0.5", "192.168.7.5", "2001:db8:1::5"


def routes(ip: str) -> str | None:
    """10/8 and the world by LAN, 192.168/16 by another interface, IPv6 too."""
    if ip.startswith("127."):
        return "127.0.0.1"
    if ip.startswith("192.168."):
        return OTHER_LAN
    if ":" in ip:
        return "::1" if ip == "::1" else V6
    return LAN


def no_routes(ip: str) -> str | None:
    return "127.0.0.1" if ip.startswith("127.") else None


def only_v4(ip: str) -> str | None:
    return None if ":" in ip else routes(ip)


def own(
    *bootstrap: str,
    listeners: list[tuple[str, int]] = WILDCARD,
    route: Callable[[str], str | None] = only_v4,
    interfaces: tuple[str, ...] = (),
    configured: tuple[PeerAddress, ...] = (),
) -> OwnAddresses:
    found = OwnAddresses(listeners, route=route, interfaces=lambda: interfaces, configured=configured)
    found.bootstrap(bootstrap)
    return found


def texts(found: OwnAddresses) -> list[str]:
    return [str(address) for address in found.current]


def raw(text: str) -> bytes:
    return PeerAddress.parse(text).to_bytes()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (own("10.0.0.1"), ["/ip4/10.0.0.5/tcp/4801"]),
        (own("192.168.7.1"), ["/ip4/192.168.7.5/tcp/4801"]),
        (
            own("10.0.0.1", "192.168.7.1", "10.0.0.2"),
            ["/ip4/10.0.0.5/tcp/4801", "/ip4/192.168.7.5/tcp/4801"],
        ),
        (own("2001:db8::9", route=routes), [f"/ip6/{V6}/tcp/4801"]),
        # nobody configured: the way to the world
        (own(), ["/ip4/10.0.0.5/tcp/4801"]),
        (own(route=routes), ["/ip4/10.0.0.5/tcp/4801", f"/ip6/{V6}/tcp/4801"]),
        # one machine
        (own("127.0.0.1"), ["/ip4/127.0.0.1/tcp/4801"]),
        (own("127.0.0.1", "::1", route=routes), ["/ip4/127.0.0.1/tcp/4801", "/ip6/::1/tcp/4801"]),
        (own("127.0.0.1", "10.0.0.1"), ["/ip4/10.0.0.5/tcp/4801"]),
        # no route to anywhere: what the interfaces have, else loopback
        (own("10.0.0.1", route=no_routes, interfaces=("10.0.0.9",)), ["/ip4/10.0.0.9/tcp/4801"]),
        (own("10.0.0.1", route=no_routes), ["/ip4/127.0.0.1/tcp/4801"]),
        # not on all interfaces: there is nothing to guess
        (own("10.0.0.1", listeners=[("192.168.7.5", 7)]), ["/ip4/192.168.7.5/tcp/7"]),
        (own("10.0.0.1", listeners=[("127.0.0.1", 7)]), ["/ip4/127.0.0.1/tcp/7"]),
        (
            own("10.0.0.1", configured=(PeerAddress.parse("/dns/me.example/tcp/9"),)),
            ["/dns/me.example/tcp/9"],
        ),
    ],
)
def test_announced(found: OwnAddresses, expected: list[str]) -> None:
    assert texts(found) == expected


def test_address_that_two_peers_see_is_announced_behind_our_own() -> None:
    found = own("10.0.0.1")
    changes: list[tuple[PeerAddress, ...]] = []
    found.watchers.append(changes.append)
    found.observed(b"a", raw("/ip4/203.0.113.9/tcp/51234"))
    found.observed(b"a", raw("/ip4/203.0.113.9/tcp/51235"))
    assert changes == []
    found.observed(b"b", raw("/ip4/203.0.113.9/tcp/40000"))
    assert texts(found) == ["/ip4/10.0.0.5/tcp/4801", "/ip4/203.0.113.9/tcp/4801"]
    assert changes == [found.current]
    found.observed(b"b", raw("/ip4/203.0.113.10/tcp/40000"))  # changed its mind
    assert texts(found) == ["/ip4/10.0.0.5/tcp/4801"]


def test_what_peers_say_is_checked_and_bounded() -> None:
    found = own("10.0.0.1")
    for peer in range(3 * OBSERVERS_MAX):
        name = peer.to_bytes(2, "big")
        found.observed(name, b"nonsense")
        found.observed(name, raw("/dns/evil.example/tcp/1"))
        found.observed(name, raw("/ip4/127.0.0.1/tcp/1"))
        assert "evil" not in str(texts(found))
        found.observed(name, raw(f"/ip4/203.0.113.{peer // 2 % 250}/tcp/1"))
    assert len(found._observed) == OBSERVERS_MAX
    assert len(found.current) <= addresses.ANNOUNCED_MAX


def test_new_address_of_the_host_is_found() -> None:
    lease = [LAN]
    found = OwnAddresses(WILDCARD, route=lambda ip: None if ":" in ip else lease[0], interfaces=tuple)
    lease[0] = "10.0.0.77"
    found.refresh()
    assert texts(found) == ["/ip4/10.0.0.77/tcp/4801"]


def test_own_listener_is_known_by_whatever_address_leads_to_it() -> None:
    found = OwnAddresses(WILDCARD)
    assert found.is_own(Endpoint("127.0.0.1", 4801))
    assert found.is_own(Endpoint("127.9.9.9", 4801))
    assert not found.is_own(Endpoint("127.0.0.1", 4802))
    assert not found.is_own(Endpoint("198.51.100.1", 4801))
    one = OwnAddresses([("127.0.0.1", 4801)])
    assert one.is_own(Endpoint("127.0.0.1", 4801))
    assert not one.is_own(Endpoint("127.0.0.2", 4801))


def test_real_routing_table() -> None:
    assert route_source("127.0.0.1") == "127.0.0.1"
    assert is_own_ip("127.0.0.2")
    assert is_own_ip("::1")
    assert not is_own_ip("198.51.100.1")
    assert route_source("255.255.255.255") is None
    for ip in addresses.interface_ips():
        assert is_own_ip(ip), ip


LAN_ADDRESS, BRIDGE = raw("/ip4/10.0.0.7/tcp/4801"), raw("/ip4/172.17.0.1/tcp/4801")
LOOPBACK, NAMED = raw("/ip4/127.0.0.1/tcp/4802"), raw("/dns/peer.example/tcp/4801")


def ours(ip: str) -> bool:
    return ip.startswith("127.") or ip == "172.17.0.1"


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ([LAN_ADDRESS, BRIDGE], [LAN_ADDRESS]),
        ([BRIDGE, LOOPBACK, NAMED], [NAMED]),
        ([LOOPBACK], [LOOPBACK]),  # a peer on this machine
        ([BRIDGE, LOOPBACK], [BRIDGE, LOOPBACK]),
        ([LAN_ADDRESS, LAN_ADDRESS], [LAN_ADDRESS]),
        ([b"nonsense", b"", LAN_ADDRESS], [LAN_ADDRESS]),
        ([PeerAddress("ip4", "10.0.0.7", 0).to_bytes()], []),
        ([raw("/ip4/10.0.0.1/tcp/4801"), LAN_ADDRESS], [LAN_ADDRESS]),  # the first one is our own
        (
            [LAN_ADDRESS + bytes.fromhex("a50326002408011220") + bytes(32)],
            [LAN_ADDRESS],
        ),
        ([bytes.fromhex("0400000000910211")], []),  # udp
    ],
)
def test_dialled(announced: list[bytes], expected: list[bytes]) -> None:
    assert dialable(announced, [raw("/ip4/10.0.0.1/tcp/4801")], ours) == tuple(expected)
