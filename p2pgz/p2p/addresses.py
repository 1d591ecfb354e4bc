"""Which addresses we announce, and which of a peer's are worth dialling.

`OwnAddresses` is made by the node and told what is learned; `dialable` is used by `p2p.host`. No packet is sent to find
anything out: the kernel's routing table says from which address a peer would see us, and which addresses are ours.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from p2pgz.core.joining import Endpoint
from p2pgz.core.multiaddress import PeerAddress

log = structlog.get_logger(component="addresses")

REFRESH_SECONDS: Final = 30.0  # a lease may end, an interface come up
ANNOUNCED_MAX: Final = 4  # dialled one after the other: more would only make a dead peer take longer
OBSERVERS_MIN: Final = 2
OBSERVERS_MAX: Final = 64
OBSERVED_MAX: Final = 2
# routing asks for a port, too; discard (RFC 863) gets nothing, since nothing is sent
_DISCARD_PORT: Final = 9
# RFC 5737 and 3849, addresses for documentation: nobody's, so that their route is the default one
_ELSEWHERE: Final = ("192.0.2.1", "2001:db8::1")
# bridges and virtual interfaces whose addresses mean nothing to another host, asked only where there is no route at all
_BRIDGES: Final = re.compile(r"(docker|br-|veth|virbr|cni|flannel|cali|lxc|lxd|podman|kube|vnet|tun|tap)")
_WILDCARDS: Final = {"0.0.0.0": 4, "::": 6}  # noqa: S104  # compared with, not listened at


def route_source(ip: str) -> str | None:
    """The address from which this host would speak to `ip`; None where there is no way."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            udp.connect((ip, _DISCARD_PORT))
            return str(udp.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def is_own_ip(ip: str) -> bool:
    """Whether an address is this host's: then it would speak to it from the same address."""
    return ipaddress.ip_address(ip).is_loopback or route_source(ip) == ip


def interface_ips() -> list[str]:
    """The addresses of our interfaces that may mean something to others; bridges only if there is nothing else."""
    import ifaddr

    proper: list[str] = []
    bridges: list[str] = []
    for adapter in ifaddr.get_adapters():
        for item in adapter.ips:
            ip = ipaddress.ip_address(item.ip if isinstance(item.ip, str) else item.ip[0])
            if not (ip.is_loopback or ip.is_link_local):
                (bridges if _BRIDGES.match(adapter.name) else proper).append(str(ip))
    return proper or bridges


def dialable(
    addresses: Sequence[bytes], own: Sequence[bytes], is_own: Callable[[str], bool] = is_own_ip
) -> tuple[bytes, ...]:
    """Plain TCP addresses, without the peer id at their end, and none that is ours.

    An address whose IP this host has as well (172.17.0.1, the bridge that docker makes everywhere) leads back to this
    host: such ones are left out, unless the peer has no other, that is, lives on this host.
    """
    far: list[bytes] = []
    near: list[bytes] = []
    for raw in addresses:
        try:
            address = PeerAddress.from_bytes(raw).without_peer()
        except ValueError as error:
            log.debug("address.not_for_us", reason=str(error)[:200])
            continue
        data = address.to_bytes()
        if address.port and data not in own:
            (near if not address.is_name and is_own(address.host) else far).append(data)
    return tuple(dict.fromkeys(far or near))


class OwnAddresses:
    """At which addresses others reach our listeners, as far as is known now.

    `configured` (peers.announce) ends all guessing. Otherwise a listener on all interfaces is announced at the address of
    the route to the bootstrap peers, else to the world, else at those of the interfaces; at loopback only if the
    bootstrap peers are there, all of them, or there is nothing else. Addresses that two peers see us at come behind.
    """

    def __init__(
        self,
        listeners: Iterable[tuple[str, int]],
        *,
        configured: Sequence[PeerAddress] = (),
        route: Callable[[str], str | None] = route_source,
        interfaces: Callable[[], Sequence[str]] = interface_ips,
    ) -> None:
        self.watchers: list[Callable[[tuple[PeerAddress, ...]], None]] = []
        """called when `current` has changed"""
        self._listeners = list(listeners)
        self._configured = tuple(address.without_peer() for address in configured)
        self._route = route
        self._interfaces = interfaces
        self._bootstrap: tuple[str, ...] = ()
        self._observed: OrderedDict[bytes, str] = OrderedDict()
        self.current = self._find()

    def configure(self, addresses: Iterable[PeerAddress]) -> None:
        """Announce these from now on; none: find out."""
        self._configured = tuple(address.without_peer() for address in addresses)
        self.refresh()

    def bootstrap(self, ips: Iterable[str]) -> None:
        """These are the addresses of the bootstrap peers, as far as they are known."""
        self._bootstrap = tuple(ips)
        self.refresh()

    def observed(self, peer: bytes, address: bytes) -> None:
        """A peer says from which address it sees us (identify). Its port is that of one connection and means nothing."""
        try:
            seen = PeerAddress.from_bytes(address)
        except ValueError:
            return
        if seen.ip is None or seen.ip.is_loopback or seen.ip.is_unspecified or seen.ip.is_link_local:
            return
        self._observed.pop(peer, None)
        self._observed[peer] = seen.host
        if len(self._observed) > OBSERVERS_MAX:
            self._observed.popitem(last=False)
        self.refresh()

    def refresh(self) -> None:
        """Look again at routes and interfaces."""
        found = self._find()
        if found != self.current:
            self.current = found
            log.info("addresses.changed", addrs=[str(address) for address in found])
            for tell in self.watchers:
                tell(found)

    async def run(self) -> None:
        """Refresh now and then until cancelled."""
        while True:
            await trio.sleep(REFRESH_SECONDS)
            self.refresh()

    def is_own(self, endpoint: Endpoint) -> bool:
        """Whether our own listener answers at an endpoint."""
        if PeerAddress.of_ip(*endpoint) in self.current:
            return True
        return any(
            endpoint.port == port
            and (endpoint.host == host or (host in _WILDCARDS and is_own_ip(endpoint.host)))
            for host, port in self._listeners
        )

    def _find(self) -> tuple[PeerAddress, ...]:
        if self._configured:
            return self._configured
        found: list[PeerAddress] = []
        routed = self._routed()
        for host, port in self._listeners:
            version = _WILDCARDS.get(host)
            if version is None:
                found.append(PeerAddress.of_ip(host, port))
                continue
            ips = [ip for ip in (*routed, *self._agreed()) if ipaddress.ip_address(ip).version == version]
            found += [PeerAddress.of_ip(ip, port) for ip in ips]
        if not found:
            found = [
                PeerAddress.of_ip("127.0.0.1" if _WILDCARDS[host] == 4 else "::1", port)
                for host, port in self._listeners[:1]
            ]
        return tuple(dict.fromkeys(found))[:ANNOUNCED_MAX]

    def _routed(self) -> list[str]:
        """The addresses of our end of the routes to the bootstrap peers, or to the world, or of the interfaces."""
        sources = _sources(self._route, self._bootstrap)
        if sources and all(_is_loopback(ip) for ip in self._bootstrap):
            return sources
        sources = [ip for ip in sources if not _is_loopback(ip)]
        return sources or _usable(_sources(self._route, _ELSEWHERE)) or _usable(self._interfaces())

    def _agreed(self) -> list[str]:
        """The addresses that enough peers see us at, those that most see first."""
        counts = Counter(self._observed.values()).most_common(OBSERVED_MAX)
        return [ip for ip, count in counts if count >= OBSERVERS_MIN]


def _sources(route: Callable[[str], str | None], ips: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(source for ip in ips if (source := route(ip)) is not None))


def _usable(ips: Iterable[str]) -> list[str]:
    return [ip for ip in ips if not _is_loopback(ip)]


def _is_loopback(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_loopback
