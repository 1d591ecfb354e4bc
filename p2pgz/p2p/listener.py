"""One port for both planes: looks at the first byte of a connection and gives it to whom it is for.

TLS begins with 0x16 (RFC 8446 5.1, handshake record), libp2p's multistream with 0x13 (the length of its first line). The
byte is only looked at, not taken. Whatever a connection does, the listener lives on.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from p2pgz.errors import P2pgzError, StateError

log = structlog.get_logger(component="peers")

TLS_BYTE: Final = 0x16
MULTISTREAM_BYTE: Final = 0x13
# from accept to the first byte; a real peer sends it at once
FIRST_BYTE_SECONDS: Final = 5.0
# connections that have not said who they are: each costs a descriptor and a TLS handshake
STRANGERS_MAX: Final = 128
BACKLOG: Final = 256
# with no descriptor left there is nothing to do but to wait for one
PAUSE_SECONDS: Final = 0.1
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

Handler = Callable[[trio.SocketStream], Awaitable[None]]


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """Listeners on a host and port (0: any); raises StateError that says which."""
    try:
        return list(await trio.open_tcp_listeners(port, host=host or None, backlog=BACKLOG))
    except OSError as error:
        raise StateError(
            f"{host or '*'}:{port}: cannot listen: {error.strerror}",
            hint="is another node running? peers.listen chooses another port",
        ) from error


class PeerListener:
    """Serves listeners. `on_tls` and `on_multistream` get the connection untouched; it is theirs unless they raise."""

    def __init__(self, on_tls: Handler, on_multistream: Handler | None = None) -> None:
        self._on_tls = on_tls
        self._on_multistream = on_multistream
        self._strangers = trio.CapacityLimiter(STRANGERS_MAX)
        self._accepting: list[trio.CancelScope] = []
        self.refused = 0
        """connections that were nobody's, or one too many"""

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled. Connections that were handed over live on.

        Not by trio.serve_listeners: it closes a connection when its handler returns.
        """
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept, listener, nursery)
            task_status.started()

    def stop(self) -> None:
        """Accept no more; the ports are free then. Connections that were accepted live on."""
        for scope in self._accepting:
            scope.cancel()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        with trio.CancelScope() as scope:
            self._accepting.append(scope)
            await self._accept_until_stopped(listener, nursery)

    async def _accept_until_stopped(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _OUT_OF_RESOURCES:
                        raise
                    log.warning("peers.no_descriptors", reason=error.strerror)
                    await trio.sleep(PAUSE_SECONDS)
                    continue
                nursery.start_soon(self._guarded, stream)

    async def _guarded(self, stream: trio.SocketStream) -> None:
        try:
            handler = await self._whose(stream)
            if handler is not None:
                await handler(stream)
                return
            self.refused += 1
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            self.refused += 1
        except P2pgzError as error:
            log.debug("peer.refused", reason=str(error))
        except trio.Cancelled:
            await trio.aclose_forcefully(stream)
            raise
        except Exception:  # a bug met by one connection must not end the others
            log.exception("peer.bug")
        await trio.aclose_forcefully(stream)

    async def _whose(self, stream: trio.SocketStream) -> Handler | None:
        try:
            self._strangers.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            return None
        try:
            with trio.fail_after(FIRST_BYTE_SECONDS):
                first = await stream.socket.recv(1, socket.MSG_PEEK)
        finally:
            self._strangers.release_on_behalf_of(stream)
        if first == bytes([TLS_BYTE]):
            return self._on_tls
        if first == bytes([MULTISTREAM_BYTE]):
            return self._on_multistream
        return None
