"""Addresses of peers as text and bytes: the few multiaddrs that p2pgz listens at and dials (libp2p specs, "addressing").

Called by the configuration, by bootstrap and by mDNS. Only TCP over an IP address or a name, with the peer's id at the
end or without; everything else is another transport. Asks no name server and imports no library: a command must be able
to check a configuration in milliseconds.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from p2pgz.core.peerid import PeerId
from p2pgz.errors import ConfigError

# multicodec table: code, size of the value in bytes (None: a length stands before it)
_CODES: Final = {"ip4": 0x04, "ip6": 0x29, "dns": 0x35, "dns4": 0x36, "dns6": 0x37}
_NETWORKS: Final = {code: name for name, code in _CODES.items()}
_SIZES: Final = {"ip4": 4, "ip6": 16}
_TCP: Final = 0x06
_P2P: Final = 0x01A5
# RFC 1035 2.3.4; a name of 253 letters is the longest that a name server can be asked for
NAME_MAX_LETTERS: Final = 253
TEXT_MAX_LETTERS: Final = 512
# letters as resolvers take them: underscores occur in names of services
_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
HINT: Final = "it looks like /ip4/192.0.2.7/tcp/4001 or /dns/seed.example.org/tcp/4001/p2p/12D3KooW…"


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer listens: `/ip4/192.0.2.7/tcp/4001`, and who it must be, if that is known."""

    network: str
    """ip4, ip6, dns, dns4 or dns6"""
    host: str
    port: int
    peer: PeerId | None = None

    @classmethod
    def parse(cls, text: str, *, where: str = "address", any_port: bool = False) -> PeerAddress:
        """Parse a multiaddr that a person wrote; raises ConfigError that names `where`.

        `any_port`: port 0 is allowed, as where one listens.
        """

        def wrong(why: str) -> ConfigError:
            return ConfigError(f"{where}: {text[:120]!r}: {why}", hint=HINT)

        if len(text) > TEXT_MAX_LETTERS:
            raise wrong("too long")
        root, *parts = text.split("/")
        if root or len(parts) < 2:
            raise wrong("is not a multiaddr")
        network, host, *rest = parts
        if network == "dnsaddr":
            raise wrong("dnsaddr is not supported; dns asks for all addresses of a name")
        if network not in _CODES:
            raise wrong(f"{network!r} is none of {', '.join(_CODES)}")
        if rest[:1] != ["tcp"] or len(rest) not in (2, 4) or (len(rest) == 4 and rest[2] != "p2p"):
            raise wrong("only /tcp/PORT may follow the host, and /p2p/ID the port")
        port = rest[1]
        if not re.fullmatch(r"[0-9]{1,5}", port) or not (0 if any_port else 1) <= int(port) <= 65535:
            raise wrong(f"{port!r} is not a port")
        try:
            host = _checked_host(network, host)
        except ValueError as error:
            raise wrong(str(error)) from None
        peer = None
        if len(rest) == 4:
            try:
                peer = PeerId.parse(rest[3])
            except ConfigError as error:
                raise wrong(error.what) from None
        return cls(network, host, int(port), peer)

    @classmethod
    def of_ip(cls, ip: str, port: int, peer: PeerId | None = None) -> PeerAddress:
        """The address of a port on an IP address."""
        address = ipaddress.ip_address(ip)
        return cls(f"ip{address.version}", str(address), port, peer)

    @classmethod
    def from_bytes(cls, data: bytes) -> PeerAddress:
        """Undo `to_bytes`; raises ValueError, also for multiaddrs of other kinds."""
        code, rest = _varint(data)
        network = _NETWORKS.get(code)
        if network is None:
            raise ValueError(f"a multiaddr that begins with code {code}")
        size = _SIZES.get(network)
        if size is None:
            size, rest = _varint(rest)
        raw, rest = rest[:size], rest[size:]
        tcp, rest = _varint(rest)
        if len(raw) != size or tcp != _TCP or len(rest) < 2:
            raise ValueError("not a host and a TCP port")
        port, rest = int.from_bytes(rest[:2], "big"), rest[2:]
        host = str(ipaddress.ip_address(raw)) if network in _SIZES else raw.decode("ascii")
        peer = None
        if rest:
            code, rest = _varint(rest)
            size, rest = _varint(rest)
            if code != _P2P or len(rest) != size:
                raise ValueError("something else than a peer id follows the port")
            peer = PeerId(rest)
        return cls(network, _checked_host(network, host), port, peer)

    def to_bytes(self) -> bytes:
        """The binary form, as in DHT messages (which carry addresses without the peer id)."""
        if self.network in _SIZES:
            raw = ipaddress.ip_address(self.host).packed
        else:
            raw = self.host.encode("ascii")
            raw = bytes([*_encoded(len(raw)), *raw])
        head = bytes(_encoded(_CODES[self.network])) + raw + bytes([_TCP]) + self.port.to_bytes(2, "big")
        if self.peer is None:
            return head
        return head + bytes([*_encoded(_P2P), *_encoded(len(self.peer.raw))]) + self.peer.raw

    @property
    def is_name(self) -> bool:
        """Whether a name server has to be asked."""
        return self.network not in _SIZES

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The IP address, if it is one."""
        return None if self.is_name else ipaddress.ip_address(self.host)

    def without_peer(self) -> PeerAddress:
        """The same without the peer id."""
        return PeerAddress(self.network, self.host, self.port)

    def __str__(self) -> str:
        text = f"/{self.network}/{self.host}/tcp/{self.port}"
        return text if self.peer is None else f"{text}/p2p/{self.peer}"


def _checked_host(network: str, host: str) -> str:
    """The host in its usual spelling; raises ValueError that says what is wrong."""
    if network == "ip4":
        return str(ipaddress.IPv4Address(host))
    if network == "ip6":
        address = ipaddress.IPv6Address(host)
        if address.scope_id is not None:
            raise ValueError("addresses with a zone (%eth0) are not supported")
        return str(address)
    if len(host) > NAME_MAX_LETTERS or not _NAME.fullmatch(host):
        raise ValueError(f"{host[:80]!r} is not a name")
    return host.lower()


def _encoded(number: int) -> list[int]:
    """An unsigned varint (multiformats), least significant seven bits first."""
    found = []
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return [*found, number]


def _varint(data: bytes) -> tuple[int, bytes]:
    number = 0
    for at, byte in enumerate(data[:2]):  # no code or length here takes more than two bytes
        number |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            if at and not byte:
                break  # 0x80 0x00 is a zero too many
            return number, data[at + 1 :]
    raise ValueError("not a multiaddr")
