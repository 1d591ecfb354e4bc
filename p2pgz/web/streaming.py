"""Answers of the control API that are written while the work goes on: events, a JSON object a line, and frames of bytes.

Used by `web.api` and by the modules whose routes it takes in. A request is parsed whole first. Whatever goes wrong, an
answer ends with its last line, and a bug costs that answer, not the node. Closing the connection cancels the work.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope
from starlette.types import Send as ASGISend

from p2pgz.errors import ConfigError, P2pgzError

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = structlog.get_logger(component="control")

REQUEST_MAX_BYTES = 1 << 20

Progress = Callable[[dict[str, Any]], Awaitable[None]]
Warn = Callable[[str], None]
"""what people should know about the bytes that they get"""


def error_event(error: P2pgzError) -> dict[str, Any]:
    """The last line of an answer that failed; `p2pgz.cli` turns it back into the error."""
    return {
        "event": "error",
        "type": type(error).__name__,
        "message": error.what,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


async def _parse(request: Request, shape: type[Any]) -> Any:
    """The request's value, or the error it is answered with. Read whole here: later only the disconnect is listened for."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > REQUEST_MAX_BYTES:
            return ConfigError("the request is too large")
    try:
        # not msgspec's own reader: names that are not UTF-8 come as escaped lone surrogates, which it refuses
        return msgspec.convert(json.loads(body), type=shape)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return ConfigError(
            f"the request is not understood: {error}", hint="client and node differ in version?"
        )


def _value(parsed: Any) -> Any:
    if isinstance(parsed, P2pgzError):
        raise parsed
    return parsed


def _line(event: dict[str, Any]) -> bytes:
    """One line of JSON, pure ASCII: names in images need not be UTF-8, and survive as escaped surrogates."""
    return json.dumps(event).encode() + b"\n"


class _Streamed(Response):
    """An answer that a coroutine writes while it works; it is cancelled when the client goes away."""

    def __init__(
        self, media_type: str, write: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]]
    ) -> None:
        super().__init__(media_type=media_type)
        self._write = write
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: ASGISend) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def body(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def watch(cancel: trio.CancelScope) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            cancel.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            await self._write(body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            nursery.cancel_scope.cancel()


async def _outcome(work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The last line of an answer, whatever happened; a bug is reported and the node lives on."""
    try:
        return {"event": "result", **await work()}
    except P2pgzError as error:
        return error_event(error)
    except Exception as error:  # see above
        log.exception("control.bug")
        return error_event(
            P2pgzError(f"internal error of the node: {error!r}", hint="its log has the details")
        )


async def events(
    call: Callable[[Any, Progress], Awaitable[dict[str, Any]]], shape: type[Any], request: Request
) -> Response:
    """Answer a request of this shape with what the call says meanwhile, then with its result."""
    parsed = await _parse(request, shape)

    async def work(progress: Progress) -> dict[str, Any]:
        return await call(_value(parsed), progress)

    return answer_events(work)


def answer_events(work: Callable[[Progress], Awaitable[dict[str, Any]]]) -> Response:
    """An answer of what the work says meanwhile, then of its result."""

    async def write(body: Callable[[bytes], Awaitable[None]]) -> None:
        async def event(value: dict[str, Any]) -> None:
            await body(_line(value))

        await event(await _outcome(lambda: work(event)))

    return _Streamed("application/x-ndjson", write)


async def frames(
    call: Callable[[Any, Warn], AsyncIterator[Buffer]], shape: type[Any], request: Request
) -> Response:
    """Answer a request of this shape with the bytes that the call gives."""
    parsed = await _parse(request, shape)
    return answer_frames(lambda warn: call(_value(parsed), warn))


def answer_frames(give: Callable[[Warn], AsyncIterator[Buffer]]) -> Response:
    """An answer of bytes."""

    async def write(body: Callable[[bytes], Awaitable[None]]) -> None:
        warnings: list[str] = []

        async def work() -> dict[str, Any]:
            async for piece in give(warnings.append):
                data = bytes(piece)
                if data:
                    await body(struct.pack(">I", len(data)) + data)
            return {"warnings": warnings}

        last = await _outcome(work)
        await body(struct.pack(">I", 0) + _line(last))

    return _Streamed("application/octet-stream", write)
