"""The control API: HTTP over the node's unix socket, JSON in, a stream of JSON lines out.

Every command of the command line uses it (docs/reference/control-api.md). Each answer ends with a line
`{"event": "result", …}` or `{"event": "error", …}`; lines before it report progress. File contents are the exception:
frames of a 4-byte length and bytes, an empty frame, then the same last line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from p2pgz.config import NonNegative
from p2pgz.mount.records import MountDocument
from p2pgz.web.drills import DrillRequest, Drills, drill_routes
from p2pgz.web.exports import ExportRequest, Exports, ImportRequest, InventoryRequest
from p2pgz.web.exports import routes as export_routes
from p2pgz.web.layers import LayerRequest, Layers, UnpackedRequest
from p2pgz.web.layers import routes as layer_routes
from p2pgz.web.questions import FindRequest, Questions, WhyRequest, routes
from p2pgz.web.requests import ImageFields
from p2pgz.web.seeds import SeedRequest, Seeds, UnseedRequest
from p2pgz.web.seeds import routes as seed_routes
from p2pgz.web.streaming import Progress, Warn, error_event, events, frames

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Control",
    "DrillRequest",
    "ExportRequest",
    "FindRequest",
    "ImportRequest",
    "InventoryRequest",
    "LayerRequest",
    "Progress",
    "SeedRequest",
    "UnpackedRequest",
    "UnseedRequest",
    "Warn",
    "WhyRequest",
    "create_app",
    "error_event",
    "handler",
]


class MountRequest(ImageFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a reference and its way to the registry need, in every request about an image."""

    allow_unverified_toc: bool = False
    directory: str = ""
    mode: str = "auto"
    fill: bool | None = None
    suid: bool = False
    dev: bool = False
    context: str = ""
    path: str = ""
    recursive: bool = False
    persist: bool = False
    layers: NonNegative = 0


class WaitRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Wait for the end of a mount."""

    id: str


class UpgradeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Go on as the version that is installed now."""


class GetRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask for the bytes that a digest names."""

    digest: str


class VerifyRequest(MountRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Check an image by reference, or the one that is mounted at `directory`."""

    reference: str = ""


class GcRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Give back what the pool need not hold; `all`: everything that is not pinned."""

    all: bool = False


class ScrubRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Check every chunk on the disk; no `bytes_per_second`: as configured, 0: no limit."""

    bytes_per_second: int | None = None


class UnpinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Let an image's chunks be evicted again; `reference` as it was pinned, or the manifest's digest."""

    reference: str


def recorded_request(document: MountDocument) -> MountRequest:
    """The request that a recorded mount was made with."""
    try:
        return msgspec.convert({**document.request, "reference": document.reference}, MountRequest)
    except msgspec.ValidationError:  # another version's: what matters is the reference
        return MountRequest(reference=document.reference)


def kept_fields(request: MountRequest) -> dict[str, Any]:
    """What of a request is written down: how to reach the source, never credentials."""
    document: dict[str, Any] = msgspec.to_builtins(request)
    names = ("plain_http", "platform", "ca_file", "hosts_dir", "allow_unverified_toc", "layers")
    return {name: document[name] for name in names if document[name]}


class Control(Protocol):
    """What the node offers here; errors are P2pgzErrors. Streams of bytes raise before their first piece if they can."""

    def status(self) -> dict[str, Any]: ...

    async def mount(self, request: MountRequest, progress: Progress) -> dict[str, Any]: ...

    async def wait_mount(self, request: WaitRequest, progress: Progress) -> dict[str, Any]: ...

    async def upgrade(self, request: UpgradeRequest, progress: Progress) -> dict[str, Any]: ...

    async def list_files(self, request: MountRequest, progress: Progress) -> dict[str, Any]: ...

    def read_file(self, request: MountRequest, warn: Warn) -> AsyncIterator[Buffer]: ...

    def read_digest(self, request: GetRequest, warn: Warn) -> AsyncIterator[Buffer]: ...

    async def startup_files(self, request: MountRequest, progress: Progress) -> dict[str, Any]: ...

    async def verify(self, request: VerifyRequest, progress: Progress) -> dict[str, Any]: ...

    async def pool_gc(self, request: GcRequest, progress: Progress) -> dict[str, Any]: ...

    async def pool_scrub(self, request: ScrubRequest, progress: Progress) -> dict[str, Any]: ...

    async def pool_pin(self, request: MountRequest, progress: Progress) -> dict[str, Any]: ...

    async def pool_unpin(self, request: UnpinRequest, progress: Progress) -> dict[str, Any]: ...

    @property
    def seeds(self) -> Seeds: ...

    @property
    def layers(self) -> Layers: ...

    @property
    def questions(self) -> Questions: ...

    @property
    def exports(self) -> Exports: ...

    @property
    def drills(self) -> Drills: ...


def create_app(control: Control) -> Starlette:
    """The routes."""

    async def status(_: Request) -> JSONResponse:  # not a plain function: those are called in threads
        await trio.lowlevel.checkpoint()
        return JSONResponse(control.status())

    return Starlette(
        routes=[
            Route("/v1/status", status),
            Route("/v1/mounts", partial(events, control.mount, MountRequest), methods=["POST"]),
            Route("/v1/mounts/wait", partial(events, control.wait_mount, WaitRequest), methods=["POST"]),
            Route("/v1/upgrade", partial(events, control.upgrade, UpgradeRequest), methods=["POST"]),
            Route("/v1/files", partial(events, control.list_files, MountRequest), methods=["POST"]),
            Route("/v1/startup", partial(events, control.startup_files, MountRequest), methods=["POST"]),
            Route("/v1/verify", partial(events, control.verify, VerifyRequest), methods=["POST"]),
            Route("/v1/pool/gc", partial(events, control.pool_gc, GcRequest), methods=["POST"]),
            Route("/v1/pool/scrub", partial(events, control.pool_scrub, ScrubRequest), methods=["POST"]),
            Route("/v1/pool/pin", partial(events, control.pool_pin, MountRequest), methods=["POST"]),
            Route("/v1/pool/unpin", partial(events, control.pool_unpin, UnpinRequest), methods=["POST"]),
            *seed_routes(control.seeds),
            *layer_routes(control.layers),
            *routes(control.questions),
            *export_routes(control.exports),
            *drill_routes(control.drills),
            Route("/v1/content", partial(frames, control.read_file, MountRequest), methods=["POST"]),
            Route("/v1/chunks", partial(frames, control.read_digest, GetRequest), methods=["POST"]),
        ]
    )


class _Connection(TCPServer):
    """One connection, over when its client closes it: hypercorn alone would hold it for the whole keep-alive time, and a
    minute of many short commands would use up the connections that `unix.serve` allows."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


def handler(app: Starlette) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """The app as a handler of `web.unix.serve`: hypercorn's HTTP/1.1 on an accepted stream."""
    config = HypercornConfig()
    config.keep_alive_timeout = 60
    wrapped = ASGIWrapper(app)  # type: ignore[arg-type]  # starlette and hypercorn spell the ASGI types differently
    context = WorkerContext(None)

    async def serve_stream(stream: trio.SocketStream) -> None:
        connection = _Connection(wrapped, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]  # plain or TLS
        await connection

    return serve_stream
