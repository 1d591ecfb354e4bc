"""One port for both planes: looks at the first byte of a connection and gives it to whom it is for.

TLS begins with 0x16 (RFC 8446 5.1, handshake record), libp2p's multistream with 0x13 (the length of its first line). The
byte is only looked at, not taken. Whatever a connection does, the listener lives on.
"""

from __future__ import annotations

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
    """Serves listeners. `on_tls` and `on_multistream` get the connection untouched and close it."""

    def __init__(self, on_tls: Handler, on_multistream: Handler | None = None) -> None:
        self._on_tls = on_tls
        self._on_multistream = on_multistream
        self._strangers = trio.CapacityLimiter(STRANGERS_MAX)
        self.refused = 0
        """connections that were nobody's, or one too many"""

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled."""
        task_status.started()
        await trio.serve_listeners(self._guarded, listeners)

    async def _guarded(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                handler = await self._whose(stream)
                if handler is None:
                    self.refused += 1
                    return
                await handler(stream)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self.refused += 1
            except P2pgzError as error:
                log.debug("peer.refused", reason=str(error))
            except Exception:  # a bug met by one connection must not end the others
                log.exception("peer.bug")

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
