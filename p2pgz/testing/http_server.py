"""A small HTTP/1.1 server on trio and h11, for fakes: full control over what goes on the wire, right or wrong."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import parse_qs, unquote, urlsplit

import h11
import trio

READ_BYTES = 64 << 10
MAX_IDLE_SECONDS = 60.0


@dataclass
class HttpRequest:
    """One request. `body` streams it; what is not read is read and dropped before the next one."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Callable[[], AsyncGenerator[bytes, None]]

    async def read(self) -> bytes:
        """The whole body."""
        async with aclosing(self.body()) as pieces:
            return b"".join([piece async for piece in pieces])


@dataclass
class HttpAnswer:
    """One answer.

    With `pieces` the body is a stream; `chunked` leaves out Content-Length; `cut`: drop the connection after what is in
    `body`; `no_head`: drop it without a word.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: Callable[[], AsyncGenerator[bytes, None]] | None = None
    chunked: bool = False
    cut: bool = False
    no_head: bool = False


Handle = Callable[[HttpRequest], Awaitable[HttpAnswer]]


async def serve_http(
    handle: Handle,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; starts with the port."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    bound: int = listeners[0].socket.getsockname()[1]
    ready: list[trio.abc.Listener[trio.abc.Stream]] = [
        trio.SSLListener(listener, tls, https_compatible=True) if tls else listener for listener in listeners
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, partial(_connection, handle), ready))
        task_status.started(bound)


async def _connection(handle: Handle, stream: trio.abc.Stream) -> None:
    """One client. Whatever it does wrong ends its connection and nothing else."""
    connection = _Connection(stream, handle)
    try:
        try:
            await connection.run()
        except h11.RemoteProtocolError as error:
            await connection.refuse(error.error_status_hint)
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError, OSError):
        pass
    finally:
        with trio.move_on_after(1, shield=True):
            await trio.aclose_forcefully(stream)


class _Connection:
    def __init__(self, stream: trio.abc.Stream, handle: Handle) -> None:
        self._stream = stream
        self._handle = handle
        self._state = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        while True:
            with trio.move_on_after(MAX_IDLE_SECONDS):
                event = await self._next()
                if not isinstance(event, h11.Request):
                    return
                if not await self._serve(event):
                    return
                self._state.start_next_cycle()
                continue
            return

    async def refuse(self, status: int) -> None:
        """Tell the client that this was no HTTP, as servers do that are spoken to in TLS."""
        if self._state.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(
                status_code=status, headers=[("connection", "close"), ("content-length", "0")]
            )
            await self._stream.send_all(self._state.send(head) or b"")

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._state.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # NEED_DATA is the only other
            if self._state.they_are_waiting_for_100_continue:
                go = h11.InformationalResponse(status_code=100, headers=[])
                await self._stream.send_all(self._state.send(go) or b"")
            self._state.receive_data(bytes(await self._stream.receive_some(READ_BYTES)))

    async def _body(self) -> AsyncGenerator[bytes, None]:
        while self._state.their_state is h11.SEND_BODY:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _serve(self, event: h11.Request) -> bool:
        """Answer one request; whether the connection can go on."""
        parts = urlsplit(event.target.decode("ascii"))
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        request = HttpRequest(event.method.decode("ascii"), unquote(parts.path), query, headers, self._body)
        answer = await self._handle(request)
        async with aclosing(self._body()) as rest:
            async for _ in rest:
                pass
        if answer.no_head:
            return False
        await self._send(answer, head_only=request.method == "HEAD")
        return not answer.cut and self._state.our_state is h11.DONE and self._state.their_state is h11.DONE

    async def _send(self, answer: HttpAnswer, *, head_only: bool) -> None:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        if not answer.chunked and answer.pieces is None:
            headers.setdefault("content-length", str(len(answer.body)))
        head = h11.Response(status_code=answer.status, headers=list(headers.items()), reason=b"")
        await self._stream.send_all(self._state.send(head) or b"")
        if not head_only:
            if answer.pieces is None:
                await self._data(answer.body)
            else:
                async with aclosing(answer.pieces()) as pieces:
                    async for piece in pieces:
                        await self._data(piece)
        if not answer.cut:
            await self._stream.send_all(self._state.send(h11.EndOfMessage()) or b"")

    async def _data(self, data: bytes) -> None:
        if data:
            await self._stream.send_all(self._state.send(h11.Data(data=data)) or b"")
