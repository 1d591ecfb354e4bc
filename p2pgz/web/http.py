"""The node's HTTP port: connections from browsers, monitoring, and whoever else reaches it.

Started by `node.site`. Speaks HTTP/1.1 by hypercorn, as the control socket does, to clients that nobody has vouched for: few
connections, none of which may be slow or idle for long. What may be asked for is `web.site`'s business.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from starlette.types import ASGIApp, Receive, Scope, Send

from p2pgz.errors import ConfigError, StateError

log = structlog.get_logger(component="http")

AUTO: Final = "auto"
NONE: Final = "none"
DEFAULT_PORT: Final = 4802  # beside the peers' 4801
LOOPBACK: Final = "127.0.0.1"
# A page holds one or two, a scraper one. Beyond, the one that has been idle for longest makes room
CONNECTIONS_MAX: Final = 64
# from the connection, or the end of the answer before, to the end of the next request's head
HEAD_SECONDS: Final = 15.0
# for the client to take one piece of an answer; the largest are some hundred kilobytes
SEND_SECONDS: Final = 20.0
ANSWER_SECONDS: Final = 60.0
HEAD_MAX_BYTES: Final = 16 << 10  # as h11's own default


def parse_listen(text: str, *, where: str = "http.listen") -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT` or `:PORT` (every interface); raises ConfigError."""
    host, colon, port = text.strip().rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_bracketed = host != bare
    if (
        not colon
        or not (port.isascii() and port.isdigit())
        or int(port) > 65_535
        or (":" in bare and not is_bracketed)
    ):
        raise ConfigError(
            f"{where}: {text!r} is no address",
            hint='for example "127.0.0.1:4802", "[::1]:4802", "auto" or "none"',
        )
    return bare, int(port)


async def listen(text: str) -> list[trio.SocketListener]:
    """Listeners for what `http.listen` says; raises StateError when the address cannot be had, ConfigError for nonsense.

    `auto`: the default port on the loopback interface, or another one when it is taken: several nodes on one machine.
    """
    tries = [(LOOPBACK, DEFAULT_PORT), (LOOPBACK, 0)] if text == AUTO else [parse_listen(text)]
    while True:
        host, port = tries.pop(0)
        try:
            return await trio.open_tcp_listeners(port, host=host or None)
        except OSError as error:
            reason = error
        if not tries:
            raise StateError(
                f"http.listen: {host}:{port} cannot be had: {reason.strerror or reason}",
                hint='name another address, or "none"',
            ) from reason
        log.info("http.port_taken", port=port, effect="another port is used")


def addresses(listeners: list[trio.SocketListener]) -> list[str]:
    """The URLs that reach these listeners; of all interfaces the loopback one."""
    found = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.is_unspecified:
            address = ipaddress.ip_address("::1" if address.version == 6 else LOOPBACK)
        found.append(f"http://[{address}]:{port}/" if address.version == 6 else f"http://{address}:{port}/")
    return found


class _PatientStream(trio.abc.Stream):
    """A client's connection, patient for so long only."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self._inner = inner
        self.socket = inner.socket
        self.scope = trio.CancelScope()
        """of the whole connection, whatever it waits for; its deadline moves on with each request"""
        self.head_until()

    def head_until(self) -> None:
        """A request's head is awaited."""
        self.scope.deadline = trio.current_time() + HEAD_SECONDS

    def answer_until(self) -> None:
        """A request is being answered."""
        self.scope.deadline = trio.current_time() + ANSWER_SECONDS

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # hypercorn shields what it sends: this inner scope ends it nevertheless
        with trio.move_on_after(SEND_SECONDS) as patience:
            await self._inner.send_all(data)
        if patience.cancelled_caught:
            await trio.aclose_forcefully(self._inner)
            raise trio.BrokenResourceError("the client does not read")

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Connection(TCPServer):
    """HTTP/1.1 alone: HTTP/2 would have limits of its own."""

    async def _read_data(self) -> None:
        inner = self.protocol.protocol  # past the wrapper, which would go on in HTTP/2
        try:
            while True:
                data = await self.stream.receive_some(MAX_RECV)
                await inner.handle(RawData(bytes(data)))
                if not data:
                    break
        except (
            trio.ClosedResourceError,
            trio.BrokenResourceError,
            H2CProtocolRequiredError,
            H2ProtocolAssumedError,
        ):
            pass
        await inner.handle(Closed())
        await self.idle_task.stop()


class HttpServer:
    """Serves an app to whoever connects. `run` is its task."""

    def __init__(self, app: ASGIApp, *, connections_max: int = CONNECTIONS_MAX) -> None:
        self._app = app
        self._connections_max = connections_max
        self._config = HypercornConfig()
        self._config.keep_alive_timeout = math.inf  # deadlines are _PatientStream's
        self._config.h11_max_incomplete_size = HEAD_MAX_BYTES
        self._config.include_server_header = False
        self._open: set[_PatientStream] = set()
        self._idle: dict[_PatientStream, None] = {}

    async def run(self, listeners: list[trio.SocketListener]) -> None:
        """For ever."""
        await trio.serve_listeners(self._guarded, listeners)

    async def _guarded(self, raw: trio.SocketStream) -> None:
        if len(self._open) >= self._connections_max:
            if not self._idle:
                log.debug("http.refused", reason="too many connections")
                await trio.aclose_forcefully(raw)
                return
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.scope.cancel()
        stream = _PatientStream(raw)
        self._open.add(stream)
        self._idle[stream] = None
        try:
            with stream.scope:
                await self._serve(stream)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except Exception:  # a bug in one request must not end the node
            log.exception("http.bug")
        finally:
            self._open.discard(stream)
            self._idle.pop(stream, None)
            await trio.aclose_forcefully(raw)

    async def _serve(self, stream: _PatientStream) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self._idle.pop(stream, None)
            stream.answer_until()
            try:
                await self._app(scope, receive, send)
            finally:
                stream.head_until()
                if stream in self._open:
                    self._idle[stream] = None

        wrapped = ASGIWrapper(app)  # type: ignore[arg-type]  # starlette and hypercorn spell the ASGI types differently
        await _Connection(wrapped, self._config, WorkerContext(None), ConnectionState({}), stream)  # type: ignore[arg-type]  # plain or TLS


@asynccontextmanager
async def listening(text: str) -> AsyncIterator[list[trio.SocketListener]]:
    """Listeners as `listen` has them, closed with the block."""
    listeners = await listen(text)
    async with AsyncExitStack() as stack:
        for listener in listeners:
            await stack.enter_async_context(listener)
        yield listeners
