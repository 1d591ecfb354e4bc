"""Peers on the local network by multicast DNS (RFC 6762, 6763), in the form of libp2p's spec "mDNS peer discovery".

Run by the node if `peers.mdns` asks for it. The records are those of libp2p (`dnsaddr=` and a multiaddr with the peer id,
the service's name a random string), under a service name of our own, so that only p2pgz nodes meet. zeroconf runs in threads
of its own and blocks in all its calls: the event loop touches nothing of it. (libp2p's own mDNS calls it from the loop
and changes the host's peerstore from zeroconf's threads.) Who is found is only offered: it still has to be admitted.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import ConfigError
from p2pgz.p2p.addresses import is_own_ip

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

log = structlog.get_logger(component="mdns")

SERVICE: Final = "_p2pgz._udp.local."
DNSADDR: Final = b"dnsaddr="
NAME_BYTES: Final = 16  # libp2p: a peer name of 32 to 63 letters
# a record must fit into one packet, and nobody listens at more
ADDRESSES_MAX: Final = 8
# one string of a TXT record (RFC 1035 3.3.14)
STRING_MAX_BYTES: Final = 255
ASK_MILLISECONDS: Final = 3000
CLOSE_SECONDS: Final = 2.0
# no interface, no right to the port: it may come
RETRY_SECONDS: Final = 60.0


class Mdns:
    """Announces us and finds others while `run` runs.

    `addresses`: ours, asked whenever we announce; `found`: called in the event loop for each peer that announces itself;
    `twin`: for one that has our own id, and is perhaps another host.
    `interfaces`: IP addresses of those to use; None: all.
    """

    def __init__(
        self,
        own: PeerId,
        *,
        addresses: Callable[[], Sequence[PeerAddress]],
        found: Callable[[Contact], None],
        twin: Callable[[Contact], None] = lambda contact: None,
        interfaces: Sequence[str] | None = None,
        service: str = SERVICE,
    ) -> None:
        self.found = 0
        self.error: str | None = None
        """why there is no multicast at the moment"""
        self._own = own
        self._addresses = addresses
        self._tell = found
        self._twin = twin
        self._interfaces = interfaces
        self._service = service
        self._changed = trio.Event()
        self._threads = trio.CapacityLimiter(2)

    def changed(self) -> None:
        """Our addresses have changed: announce the new ones, on the interfaces there are now."""
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce and listen until cancelled; where there is no multicast, try again from time to time."""
        token = trio.lowlevel.current_trio_token()
        started = False
        while True:
            self._changed = trio.Event()
            service = _Service(self._service, self._own, self._addresses())
            try:
                await self._in_thread(service.open, self._interfaces, token, self._heard)
                self.error = None
            except OSError as error:
                if self.error is None:
                    log.warning("mdns.not_available", reason=str(error), again_seconds=RETRY_SECONDS)
                self.error = str(error)
            if not started:
                started = True
                task_status.started()
            try:
                with trio.move_on_after(math.inf if self.error is None else RETRY_SECONDS):
                    await self._changed.wait()
            finally:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await self._in_thread(service.close)

    async def _in_thread(self, call: Callable[..., None], *arguments: Any) -> None:
        await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True, limiter=self._threads)

    def _heard(self, contact: Contact) -> None:
        if contact.peer == self._own.raw:
            self._twin(contact)
        else:
            self.found += 1
            log.debug("mdns.found", peer=str(PeerId(contact.peer)))
            self._tell(contact)


class _Service:
    """Our service and the browser, for one set of addresses. Its methods block: for threads."""

    def __init__(self, service: str, own: PeerId, addresses: Sequence[PeerAddress]) -> None:
        self._service = service
        self._own = own
        self._addresses = [address for address in addresses if not address.is_name][:ADDRESSES_MAX]
        self._name = secrets.token_hex(NAME_BYTES)
        self._zeroconf: Zeroconf | None = None
        self._closed = False

    def open(
        self,
        interfaces: Sequence[str] | None,
        token: trio.lowlevel.TrioToken,
        heard: Callable[[Contact], None],
    ) -> None:
        """Join the multicast groups, announce, and ask who is there; raises OSError."""
        from zeroconf import (
            Error,
            InterfaceChoice,
            ServiceBrowser,
            ServiceStateChange,
            Zeroconf,
        )

        for ip in interfaces or ():
            if not is_own_ip(ip):  # zeroconf finds out too, and leaves a socket open
                raise OSError(f"{ip} is no address of this host")
        zeroconf = Zeroconf(interfaces=list(interfaces) if interfaces is not None else InterfaceChoice.All)
        self._zeroconf = zeroconf

        def changed(
            zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
        ) -> None:
            """In the browser's thread."""
            if state_change is ServiceStateChange.Removed or name.startswith(self._name):
                return
            try:
                info = zeroconf.get_service_info(service_type, name, timeout=ASK_MILLISECONDS)
                contact = read_record(info.text) if info is not None and info.text else None
                if contact is not None:
                    token.run_sync_soon(heard, contact)
            except (Error, OSError, RuntimeError, trio.RunFinishedError) as error:  # we are ending
                log.debug("mdns.not_heard", reason=str(error))

        try:
            ServiceBrowser(zeroconf, self._service, handlers=[changed])
            if self._addresses:
                # our name is 128 random bits: no second is spent on asking whether somebody has it
                zeroconf.register_service(self._info(), cooperating_responders=True)
        except Error as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            if self._closed:  # meanwhile nobody waits for us any more
                zeroconf.close()

    def close(self) -> None:
        """Say goodbye and end the threads."""
        self._closed = True
        if self._zeroconf is not None:
            self._zeroconf.close()

    def _info(self) -> ServiceInfo:
        from zeroconf import ServiceInfo

        return ServiceInfo(
            self._service,
            f"{self._name}.{self._service}",
            port=self._addresses[0].port,
            properties=make_record(self._own, self._addresses),
            server=f"{self._name}.local.",
            addresses=[address.ip.packed for address in self._addresses if address.ip is not None],
        )


def make_record(own: PeerId, addresses: Sequence[PeerAddress]) -> bytes:
    """The TXT record that announces a peer: one string per address."""
    strings = [
        DNSADDR + str(PeerAddress(each.network, each.host, each.port, own)).encode("ascii")
        for each in addresses
    ]
    return b"".join(bytes([len(text)]) + text for text in strings if len(text) <= STRING_MAX_BYTES)


def read_record(text: bytes) -> Contact | None:
    """The peer that a TXT record announces; None if it is none that we can dial."""
    peer: PeerId | None = None
    found: list[bytes] = []
    at = 0
    while at < len(text) and len(found) < ADDRESSES_MAX:
        size = text[at]
        string = text[at + 1 : at + 1 + size]
        at += 1 + size
        if not string.startswith(DNSADDR):
            continue
        try:
            address = PeerAddress.parse(string.removeprefix(DNSADDR).decode("ascii"), where="mDNS")
        except (ConfigError, UnicodeError):
            continue
        if address.is_name or address.peer is None or (peer is not None and address.peer != peer):
            continue
        peer = address.peer
        found.append(address.without_peer().to_bytes())
    return Contact(peer.raw, tuple(found)) if peer is not None else None
