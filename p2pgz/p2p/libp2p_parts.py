"""py-libp2p 0.8.1 as we use it: the parts of it that had to be replaced, each with its reason and its test.

Only `p2p.host` imports this; importing it imports libp2p (0.9 s, 60 MiB). Tests: tests/e2e/p2p/test_libp2p_faults.py.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import trio
from libp2p import create_identity_from_seed, new_host
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.tls.transport import PROTOCOL_ID as TLS
from libp2p.security.tls.transport import TLSTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

FRAME_SECONDS = (
    10.0  # for one yamux frame (64 KiB) to enter the socket, whatever happens to its writer meanwhile
)
CONNECTIONS_MAX = 256  # the library refuses beyond it; our own budget, which closes idle ones, is far below
STREAMS_MAX = 4096
UPGRADE_SECONDS = 5.0  # security and muxer negotiation
NEGOTIATE_SECONDS = 5.0  # of a stream's protocol
CLOSE_SECONDS = 1.0


class ShieldedYamux(Yamux):  # type: ignore[misc]  # the library's types are not looked at
    """A frame is sent whole, or the connection ends.

    A writer that is cancelled half-way leaves the peer with a torn frame, or noise with a nonce that was never sent: every
    stream of the connection fails. So cancellation waits for the frame's end; where that takes too long nothing can be
    saved, and the connection is closed at once rather than found dead by its next user.
    """

    async def _write_frame(self, data: bytes) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FRAME_SECONDS) as scope:
            await super()._write_frame(data)
        if scope.cancelled_caught:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
                await self.secured_conn.close()
            raise trio.BrokenResourceError("the peer takes no more data")


class CachedTls(TLSTransport):  # type: ignore[misc]
    """Makes its SSL contexts once: the library makes one, with the key in a temporary file, for every handshake."""

    def __init__(self, keys: KeyPair) -> None:
        super().__init__(keys)
        self._contexts: dict[bool, ssl.SSLContext] = {}
        for server_side in (True, False):
            self._contexts[server_side] = super().create_ssl_context(server_side=server_side)

    def create_ssl_context(self, server_side: bool = False) -> ssl.SSLContext:
        return self._contexts[server_side]


class NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """Dials nobody. The library's own fills up to the middle between its watermarks, from whatever peer it has heard of."""

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


class Observations:
    """Takes the place of the library's book of observed addresses, whose rules (four observers) are not ours: tells."""

    def __init__(self) -> None:
        self.tell: Callable[[bytes, bytes], None] = lambda _peer, _address: None

    def record_observation(self, connection: Any, observed: Multiaddr, _transports: Any) -> None:
        self.tell(bytes(connection.muxed_conn.peer_id.to_bytes()), bytes(observed.to_bytes()))

    def addrs(self) -> list[Multiaddr]:
        return []

    def remove_conn(self, connection: Any) -> None: ...


class Notifee:
    """The library's call-backs; those not needed do nothing. `connected` is given network and connection."""

    def __init__(self, connected: Callable[[Any, Any], None]) -> None:
        self._connected = connected

    async def connected(self, network: Any, connection: Any) -> None:
        self._connected(network, connection)

    async def disconnected(self, network: Any, connection: Any) -> None: ...
    async def opened_stream(self, network: Any, stream: Any) -> None: ...
    async def closed_stream(self, network: Any, stream: Any) -> None: ...
    async def listen(self, network: Any, address: Any) -> None: ...
    async def listen_close(self, network: Any, address: Any) -> None: ...


class _FromLibp2p(logging.Filter):
    """Drops what the library logs through the root logger (`logging.debug(...)` instead of a logger of its own)."""

    _marks: ClassVar[tuple[str, ...]] = ("/site-packages/libp2p/", "/dist-packages/libp2p/")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(mark in record.pathname for mark in self._marks)


_quiet = _FromLibp2p()


def quieten() -> None:
    """The library logs expected events as errors; what matters is logged by us, once, with the peer's name."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    root = logging.getLogger()
    if _quiet not in root.filters:
        root.addFilter(_quiet)
    if not root.handlers:  # else the library's first root message installs one that writes to standard error
        root.addHandler(logging.NullHandler())


def tls_can_serve() -> bool:
    """Whether the library's way to ask for client certificates is safe here.

    It calls into libssl by ctypes with a pointer taken out of Python's context object. That works when Python's own ssl
    module uses the same shared library, and writes into foreign memory when OpenSSL is linked into the interpreter.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    return len({line.split()[-1] for line in maps.splitlines() if "/libssl.so" in line}) == 1


def announce_at(host: Any, addresses: Sequence[str]) -> None:
    """What identify says from now on; the library wants it once and for all."""
    announced = [Multiaddr(address) for address in addresses]
    host._addrs_factory = lambda _candidates: list(announced)


def make_host(seed: bytes, announce: list[str]) -> Any:
    """The library's host: noise first, TLS second, never plaintext; yamux; listens nowhere (we do that ourselves).

    Without `sec_opt` the library also offers plaintext. One connection per peer, since the dialler otherwise sits out its
    250 ms race between addresses though the first one has succeeded.
    """
    keys = create_identity_from_seed(seed)
    host = new_host(
        key_pair=keys,
        sec_opt={
            NOISE: NoiseTransport(keys, noise_privkey=new_x25519_key().private_key),
            TLS: CachedTls(keys),
        },
        muxer_opt={YAMUX: ShieldedYamux},
        connection_config=ConnectionConfig(
            max_connections=CONNECTIONS_MAX,
            min_connections=0,
            low_watermark=0,
            high_watermark=CONNECTIONS_MAX,
            max_connections_per_peer=1,
            inbound_upgrade_timeout=UPGRADE_SECONDS,
            outbound_upgrade_timeout=UPGRADE_SECONDS,
            inbound_stream_protocol_negotiation_timeout=NEGOTIATE_SECONDS,
            outbound_stream_protocol_negotiation_timeout=NEGOTIATE_SECONDS,
        ),
        resource_manager=ResourceManager(
            limits=ResourceLimits(
                max_connections=CONNECTIONS_MAX, max_memory_mb=512, max_streams=STREAMS_MAX
            ),
            enable_rate_limiting=False,
            enable_prometheus=False,
        ),
        announce_addrs=[Multiaddr(address) for address in announce],
        disable_identify_address_discovery=True,
        enable_tcp=True,
    )
    host._observed_addr_manager = Observations()
    swarm = host.get_network()
    swarm.auto_connector = NoAutoConnector(swarm=swarm, auto_connect_interval=3600.0)
    swarm.retry_config = RetryConfig(max_retries=0)  # who dials again, and when, is decided above
    if not tls_can_serve():
        swarm.upgrader.security_multistream.multiselect.handlers.pop(TLS, None)
    return host
