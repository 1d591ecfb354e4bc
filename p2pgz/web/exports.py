"""The requests of the control API that carry files: exports out, imports in, and what this pool has.

A request with a file has one line of JSON and then the file's bytes. It is taken in before the answer begins; when something
is wrong with it, the rest is read and thrown away, so that the client, which is still sending, comes to hear of it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from p2pgz.core.inventory import INVENTORY_MAX_BYTES
from p2pgz.errors import ConfigError, ExportInvalid, P2pgzError
from p2pgz.web.requests import ImageFields
from p2pgz.web.streaming import Progress, Warn, answer_events, answer_frames, frames

if TYPE_CHECKING:
    from typing_extensions import Buffer

LINE_MAX_BYTES: Final = 1 << 20


class ExportRequest(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Write an image into a file. `name`: what it is to be called there; `peer`: whose chunks are left out."""

    name: str = ""
    peer: str = ""
    inventory_name: str = ""


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Take an image out of a file, called `name` in messages. `digest`: take this manifest only."""

    name: str
    digest: str = ""


class InventoryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this pool has."""


class Import(Protocol):
    """A file on its way in."""

    async def feed(self, data: bytes) -> None: ...

    async def finish(self, progress: Progress) -> dict[str, Any]: ...


class Exports(Protocol):
    """What the node offers here; see `web.api.Control`."""

    def export(self, request: ExportRequest, inventory: bytes, warn: Warn) -> AsyncIterator[Buffer]: ...

    def importing(self, request: ImportRequest) -> AbstractAsyncContextManager[Import]: ...

    def inventory(self, request: InventoryRequest, warn: Warn) -> AsyncIterator[Buffer]: ...


class _Upload:
    """The body of a request: its line, then the rest in pieces."""

    def __init__(self, request: Request) -> None:
        self._pieces = request.stream()
        self._rest = b""

    async def line(self, shape: type[Any]) -> Any:
        """The request's value; raises ConfigError."""
        held = b""
        async for piece in self._pieces:
            held += piece
            line, newline, self._rest = held.partition(b"\n")
            if newline:
                try:
                    return msgspec.convert(json.loads(line), type=shape)
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                    raise ConfigError(
                        f"the request is not understood: {error}",
                        hint="client and node differ in version?",
                    ) from error
            if len(held) > LINE_MAX_BYTES:
                break
        raise ConfigError("the request is too large, or has no end")

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows."""
        first, self._rest = self._rest, b""
        if first:
            yield first
        async for piece in self._pieces:
            if piece:
                yield piece


async def _export(exports: Exports, request: Request) -> Response:
    upload = _Upload(request)
    failure: P2pgzError | None = None
    inventory = bytearray()
    asked: ExportRequest | None = None
    try:
        asked = await upload.line(ExportRequest)
    except P2pgzError as error:
        failure = error
    async for piece in upload.rest():
        if len(inventory) <= INVENTORY_MAX_BYTES:
            inventory += piece
    if len(inventory) > INVENTORY_MAX_BYTES:
        failure = failure or ExportInvalid(f"an inventory of more than {INVENTORY_MAX_BYTES} bytes")

    def give(warn: Warn) -> AsyncIterator[Buffer]:
        if failure is not None or asked is None:
            raise failure or ConfigError("the request is not understood")
        return exports.export(asked, bytes(inventory), warn)

    return answer_frames(give)


async def _import(exports: Exports, request: Request) -> Response:
    upload = _Upload(request)
    last: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        asked = await upload.line(ImportRequest)
        async with exports.importing(asked) as coming:
            async for piece in upload.rest():
                await coming.feed(piece)
            last = await coming.finish(_unheard)
    except P2pgzError as error:
        failure = error
    except ClientDisconnect:
        return Response(status_code=400)
    async for _ in upload.rest():
        pass

    async def tell(progress: Progress) -> dict[str, Any]:
        if failure is not None:
            raise failure
        return last

    return answer_events(tell)


async def _unheard(_: dict[str, Any]) -> None:
    """Progress while the request is still being read: the client counts what it sends."""


def routes(exports: Exports) -> list[Route]:
    """Their routes."""
    endpoints: list[tuple[str, Callable[[Request], Awaitable[Response]]]] = [
        ("/v1/export", partial(_export, exports)),
        ("/v1/import", partial(_import, exports)),
        ("/v1/inventory", partial(frames, exports.inventory, InventoryRequest)),
    ]
    return [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints]
