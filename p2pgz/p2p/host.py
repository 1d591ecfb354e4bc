"""The libp2p host behind a small interface: connections, and one request and answer per stream.

Used by `p2p.dht`. Keeps away from callers what py-libp2p 0.8.1 does wrong: work on streams runs in tasks of the host's own,
so that a caller's cancellation never meets a half-written frame; every wait has a deadline; handlers are guarded; we dial
and accept ourselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import structlog
import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pgz.core.keyspace import Contact
from p2pgz.errors import P2pgzError, SourceUnavailable
from p2pgz.p2p.addresses import dialable
from p2pgz.p2p.indirect import StreamTransport
from p2pgz.p2p.libp2p_opening import StreamOpener
from p2pgz.p2p.libp2p_parts import Notifee, announce_at, make_host, quieten
from p2pgz.p2p.libp2p_streams import (
    MessageReader,
    close_connection,
    close_socket_after,
    close_stream,
    framed,
    hand_over,
    is_library_error,
    reason_of,
    reset_stream,
)

log = structlog.get_logger(component="libp2p")

DIAL_SECONDS = 5.0  # all addresses, handshakes included
CONNECT_SECONDS = 2.0  # TCP to one address
ADDRESSES_DIALLED = 4
CLOSE_SECONDS = 1.0
CALL_SECONDS = 10.0  # open a stream, send, read the answer; callers have shorter deadlines of their own
HANDLER_SECONDS = 15.0  # for one message of a peer to come, or its answer to go
IDENTIFY_SECONDS = 5.0
CALLS_MAX = 256
HANDLERS_MAX = 128
IDLE_SECONDS = 60.0
CONNECTIONS_KEPT = 64  # beyond it the ones idle longest are closed, also before their minute is over
TEND_SECONDS = 10.0
CLOSE_ALL_SECONDS = 2.0
MESSAGES_PER_STREAM = 1000

T = TypeVar("T")
Answer = Callable[[Contact, bytes], Awaitable[bytes | None]]


class PeerHost:
    """Made by `open_host`. All failures are SourceUnavailable."""

    def __init__(self, host: Any, nursery: trio.Nursery, announce: Sequence[str]) -> None:
        self.peer = bytes(host.get_id().to_bytes())
        self.addresses: tuple[bytes, ...] = ()
        self.protocols: dict[bytes, frozenset[str]] = {}
        """what connected peers have said that they speak"""
        self.on_peer: Callable[[Contact, bool], None] = lambda _contact, _dialled: None
        """called when a connected peer has said who it is and where it listens"""
        self._host = host
        self.announce(announce)
        self._nursery = nursery
        self._opener = StreamOpener(host, nursery)
        self._dials: dict[bytes, trio.Event] = {}
        self._used: dict[bytes, float] = {}
        self.contacts: dict[bytes, Contact] = {}
        self._calls = trio.CapacityLimiter(CALLS_MAX)
        self._handlers = trio.CapacityLimiter(HANDLERS_MAX)

    def announce(self, addresses: Sequence[str]) -> None:
        """Multiaddrs at which we are reached from now on; peers hear of them as they ask again, or connect."""
        self.addresses = tuple(Multiaddr(address).to_bytes() for address in addresses)
        announce_at(self._host, addresses)

    def on_observed(self, tell: Callable[[bytes, bytes], None]) -> None:
        """Peer and multiaddr are told whenever a peer says from where it sees us."""
        self._host._observed_addr_manager.tell = tell

    # -- asking

    async def ask(self, contact: Contact, protocol: str, message: bytes) -> bytes:
        """Send a message on a stream of its own and wait for the answer."""

        async def call() -> bytes:
            stream = await self._open(contact, protocol)
            try:
                await stream.write(framed(message))
                answer = await MessageReader(stream).message()
            except BaseException:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await reset_stream(stream)
                raise
            await close_stream(stream)
            if answer is None:
                raise SourceUnavailable("the peer closed the stream without an answer")
            return answer

        return await self._owned(contact, call)

    async def tell(self, contact: Contact, protocol: str, messages: Sequence[bytes]) -> None:
        """Send messages that have no answer on one stream."""

        async def call() -> None:
            stream = await self._open(contact, protocol)
            try:
                for message in messages:
                    await stream.write(framed(message))
            except BaseException:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await reset_stream(stream)
                raise
            await close_stream(stream)

        await self._owned(contact, call)

    async def connect(self, contact: Contact) -> None:
        """Make sure that there is a connection."""
        await self._owned(contact, lambda: self._connect(contact))

    def connected(self) -> list[bytes]:
        """The peers to whom there is a connection."""
        return [bytes(peer.to_bytes()) for peer in list(self._host.get_connected_peers()) if self._live(peer)]

    def _live(self, peer: ID) -> list[Any]:
        """The connections to a peer that are open. The library goes on listing one whose closing was cancelled."""
        network = self._host.get_network()
        live = []
        for connection in list(network.get_connections(peer)):
            if connection.is_closed or connection.muxed_conn.event_shutting_down.is_set():
                network.remove_conn(connection)
            else:
                live.append(connection)
        return live

    async def disconnect(self, peer: bytes) -> None:
        """Close the connection to a peer, if there is one."""
        with trio.move_on_after(DIAL_SECONDS, shield=True):
            await self._host.get_network().close_peer(ID(peer))

    # -- answering

    def serve(self, protocol: str, answer: Answer) -> None:
        """Answer a protocol whose messages are length-prefixed; one stream may carry several requests."""

        async def handler(stream: Any) -> None:
            peer = bytes(stream.muxed_conn.peer_id.to_bytes())
            try:
                self._handlers.acquire_on_behalf_of_nowait(stream)
            except trio.WouldBlock:
                await reset_stream(stream)
                return
            try:
                self._used[peer] = trio.current_time()
                await self._serve_stream(peer, stream, answer)
                await close_stream(stream)
            except Exception as error:  # whatever leaves this function ends the library's host
                if not isinstance(error, P2pgzError | trio.TooSlowError) and not is_library_error(error):
                    log.exception("peer.bug", protocol=protocol, peer=peer.hex())
                await reset_stream(stream)
            finally:
                self._handlers.release_on_behalf_of(stream)

        self._host.set_stream_handler(protocol, handler)

    def serve_streams(self, protocol: str, take: Callable[[StreamTransport], Awaitable[None]]) -> None:
        """Hand each stream of a protocol over; `take` returns soon, and closes the stream when it is done with it."""
        self._host.set_stream_handler(protocol, partial(hand_over, take))

    async def open_stream(self, peer: bytes, protocol: str) -> StreamTransport:
        """A stream to a peer that is connected already, dialled by whichever end; raises SourceUnavailable."""
        if not self._live(ID(peer)):
            raise SourceUnavailable(f"peer {ID(peer)}: there is no libp2p connection to it")
        self._used[peer] = trio.current_time()
        return StreamTransport(await self._opener.opened(ID(peer), protocol))

    async def _serve_stream(self, peer: bytes, stream: Any, answer: Answer) -> None:
        reader = MessageReader(stream)
        for _ in range(MESSAGES_PER_STREAM):
            with trio.fail_after(HANDLER_SECONDS):
                message = await reader.message()
                if message is None:
                    return
                reply = await answer(self.contacts.get(peer, Contact(peer)), message)
                if reply is not None:
                    await stream.write(framed(reply))

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve an inbound connection whose first bytes are multistream's; returns when it is closed.

        Not by the library's listener: that one keeps a slot of its limit for every connection there ever was.
        """
        try:
            connection = await self._host.get_network().upgrade_inbound_raw_conn(
                RawConnection(TrioTCPStream(stream), False), Multiaddr("/ip4/0.0.0.0/tcp/0")
            )
            await connection.event_closed.wait()
        except Exception as error:  # the library raises dozens of types for a failed handshake
            if not is_library_error(error):
                log.exception("peer.bug", where="inbound handshake")

    # -- inside

    async def _owned(self, contact: Contact, call: Callable[[], Awaitable[T]]) -> T:
        """Run a call in a task of the host's: a caller that is cancelled leaves, the call runs to its end or deadline."""
        done = trio.Event()
        answers: list[T] = []
        failures: list[BaseException] = []

        async def run() -> None:
            try:
                async with self._calls:
                    with trio.fail_after(CALL_SECONDS):
                        answers.append(await call())
            except Exception as error:  # noqa: BLE001  # the library raises dozens of types, all mean the same here
                failures.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if answers:
            return answers[0]
        cause = failures[0] if failures else None
        if isinstance(cause, P2pgzError):
            raise cause
        raise SourceUnavailable(f"peer {ID(contact.peer)}: {reason_of(cause)}") from cause

    async def _open(self, contact: Contact, protocol: str) -> Any:
        peer = ID(contact.peer)
        await self._connect(contact)
        self._used[contact.peer] = trio.current_time()
        try:
            return await self._opener.open(peer, protocol)
        except SwarmException:  # the connection is dead and the library does not know it: again on a new one
            for connection in self._live(peer):
                self._host.get_network().remove_conn(connection)
                self._nursery.start_soon(close_connection, connection)
            await self._connect(contact)
            return await self._opener.open(peer, protocol)

    async def _connect(self, contact: Contact) -> None:
        """One dial per peer at a time, whoever wants it."""
        peer = ID(contact.peer)
        while True:
            if self._live(peer):
                return
            dialling = self._dials.get(contact.peer)
            if dialling is None:
                break
            await dialling.wait()
            if not self._live(peer):
                raise SourceUnavailable("cannot be reached")
        addresses = dialable(contact.addresses, self.addresses)
        if not addresses:
            raise SourceUnavailable("no address is known")
        done = self._dials[contact.peer] = trio.Event()
        try:
            with trio.fail_after(DIAL_SECONDS):
                await self._dial(peer, addresses)
        finally:
            del self._dials[contact.peer]
            done.set()

    async def _dial(self, peer: ID, addresses: Sequence[bytes]) -> None:
        """Try a peer's addresses in turn.

        Not by the library's dialler: it waits for ever on a port that accepts and says nothing, refuses a peer for a minute
        after one failure, and leaves the socket open when it is cancelled.
        """
        problem: Exception | None = None
        for raw in addresses[:ADDRESSES_DIALLED]:
            address = Multiaddr(raw)
            host = address.value_for_protocol(address.protocols()[0].code)
            try:
                with trio.fail_after(CONNECT_SECONDS):
                    stream = await trio.open_tcp_stream(
                        str(host), int(address.value_for_protocol("tcp") or 0)
                    )
            except (OSError, trio.TooSlowError) as error:
                problem = error
                continue
            try:
                connection = await self._host.get_network().upgrade_outbound_raw_conn(
                    RawConnection(TrioTCPStream(stream), True), peer
                )
            except Exception as error:  # noqa: BLE001  # the library raises dozens of types for a failed handshake
                problem = error
                stream.socket.close()
                continue
            except BaseException:
                stream.socket.close()
                raise
            self._nursery.start_soon(close_socket_after, connection, stream)
            return
        raise SourceUnavailable(reason_of(problem)) from problem

    def _on_connected(self, network: Any, connection: Any) -> None:
        peer = connection.muxed_conn.peer_id
        if len(network.get_connections(peer)) <= 1:
            self._forget(peer)
            self._host._schedule_identify(peer, reason="new connection")
        dialled = "outbound" in str(connection.direction).lower()
        self._nursery.start_soon(self._met, peer, dialled)

    async def _met(self, peer: ID, dialled: bool) -> None:
        """Wait for what identify brings."""
        name = bytes(peer.to_bytes())
        store = self._host.get_peerstore()
        with trio.move_on_after(IDENTIFY_SECONDS):
            while self._live(peer):
                try:
                    identified = peer in self._host._identified_peers
                    protocols = frozenset(map(str, store.get_protocols(peer))) if identified else frozenset()
                    addresses = (
                        tuple(address.to_bytes() for address in store.addrs(peer)) if protocols else ()
                    )
                except Exception:  # noqa: BLE001  # "not known yet" comes as several types
                    protocols, addresses = frozenset(), ()
                if protocols:
                    self.protocols[name] = protocols
                    self.contacts[name] = contact = Contact(name, dialable(addresses, self.addresses))
                    self.on_peer(contact, dialled)
                    return
                await trio.sleep(0.02)

    def _forget(self, peer: ID) -> None:
        """What the peer said on an earlier connection: it may have restarted on another port.

        The library asks a peer once, and adds what it says later to what it said before.
        """
        name = bytes(peer.to_bytes())
        self.contacts.pop(name, None)
        self.protocols.pop(name, None)
        self._host.get_peerstore().clear_addrs(peer)
        self._host.get_peerstore().clear_protocol_data(peer)

    async def _close_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.connected():
                nursery.start_soon(self.disconnect, peer)

    async def _tend(self) -> None:
        """Close what nobody uses; forget what is gone."""
        while True:
            await trio.sleep(TEND_SECONDS)
            live = {peer: self._live(ID(peer)) for peer in self.connected()}
            for peer in [peer for peer in self.contacts if peer not in live]:
                del self.contacts[peer]
                self.protocols.pop(peer, None)
                self._used.pop(peer, None)
            now = trio.current_time()
            idle = sorted((self._used.setdefault(peer, now), peer) for peer in live)
            excess = len(idle) - CONNECTIONS_KEPT
            for number, (used, peer) in enumerate(idle):
                busy = any(connection.get_streams() for connection in live[peer])
                if not busy and (now - used > IDLE_SECONDS or number < excess):
                    await self.disconnect(peer)


@asynccontextmanager
async def open_host(seed: bytes, *, announce: Sequence[str]) -> AsyncIterator[PeerHost]:
    """A running host with the identity of a raw Ed25519 seed. `announce`: multiaddrs at which our listener is reached."""
    quieten()
    host = make_host(seed, list(announce))
    failure: Exception | None = None
    async with host.run(listen_addrs=[]), trio.open_nursery() as nursery:
        peer_host = PeerHost(host, nursery, announce)
        host.get_network().register_notifee(Notifee(peer_host._on_connected))
        nursery.start_soon(peer_host._tend)
        try:
            yield peer_host
        except Exception as error:  # noqa: BLE001  # the caller's: raised below, outside the nursery's group
            failure = error
        finally:
            # stopped with connections, the library leaves their sockets open
            with trio.move_on_after(CLOSE_ALL_SECONDS, shield=True):
                await peer_host._close_all()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
