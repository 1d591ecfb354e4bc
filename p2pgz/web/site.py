"""What the HTTP port shows: the status page, the status document, metrics, probes. It changes nothing, whoever asks.

Made by `node.site`. Every request passes `_Guard` first: its Host must be a name of this node, so that a page of somebody
else's that rebinds its name to our address learns nothing; only GET and HEAD, without a body. Files are known by name: no
path of a request reaches the file system.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any, Final, Protocol

import structlog
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from p2pgz.web import scrape
from p2pgz.web.metrics import Measures

log = structlog.get_logger(component="http")

# of a document that costs milliseconds: many pages look at the same one
STATUS_AGE_SECONDS: Final = 0.5
METHODS: Final = frozenset({"GET", "HEAD"})
SECURITY_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
STATIC: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Watched(Protocol):
    """What the node offers here."""

    def status(self) -> dict[str, Any]: ...

    def measures(self, status: dict[str, Any]) -> Measures: ...

    def problems(self) -> list[str]: ...

    def events(self, after: int) -> list[dict[str, Any]]: ...


def own_names(configured: Iterable[str]) -> frozenset[str]:
    """The names that this host's users know it by."""
    host = socket.gethostname().lower()
    return frozenset(
        {"localhost", host, host.partition(".")[0], *(name.lower().rstrip(".") for name in configured)}
    )


def is_own_host(header: str, names: frozenset[str]) -> bool:
    """Whether a Host header names us: by a name, or by any address, which no foreign page can have as its own name."""
    host, colon, port = header.rpartition(":")
    if not colon or "]" in port:
        host, port = header, ""
    if port and not (port.isascii() and port.isdigit()):
        return False
    host = host.lower().rstrip(".")
    if host in names:
        return True
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True


class _Guard:
    """Turns away what is not a plain question to this host, and adds the headers that keep browsers strict."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def strict_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        answer: ASGIApp = self._refusal(scope) or self._app
        try:
            await answer(scope, receive, strict_send)
        except Exception:  # a bug costs this answer, not the node
            log.exception("http.bug", path=scope["path"][:100])
            if not started:
                await _text(500, "internal error: the node's log has the details")(
                    scope, receive, strict_send
                )

    def _refusal(self, scope: Scope) -> Response | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not is_own_host(hosts[0].decode("latin-1"), self._names):
            return _text(421, "this node is not called that; http.hosts lists further names")
        if scope["method"] not in METHODS:
            return _text(405, "only GET and HEAD: nothing can be changed here", allow="GET, HEAD")
        if headers.get(b"content-length", [b"0"]) != [b"0"] or b"transfer-encoding" in headers:
            return _text(413, "a question has no body", connection="close")
        return None


def _text(status: int, text: str, **headers: str) -> Response:
    return PlainTextResponse(text + "\n", status_code=status, headers=headers)


def create_site(
    watched: Watched, names: frozenset[str], *, now: Callable[[], float] = trio.current_time
) -> ASGIApp:
    """The app. Answers are made on the event loop, from memory."""
    seen: list[tuple[float, dict[str, Any]]] = []

    def status() -> dict[str, Any]:
        if not seen or now() - seen[0][0] > STATUS_AGE_SECONDS:
            seen[:] = [(now(), watched.status())]
        return seen[0][1]

    async def show_status(_: Request) -> JSONResponse:
        await trio.lowlevel.checkpoint()
        return JSONResponse(status())

    async def show_events(request: Request) -> Response:
        text = request.query_params.get("after", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            return _text(400, "after: the number of an event")
        return JSONResponse({"events": watched.events(int(text))})

    async def show_metrics(request: Request) -> Response:
        await trio.to_thread.run_sync(scrape.load)
        body, media_type = scrape.render(watched.measures(status()), request.headers.get("accept", ""))
        return Response(body, headers={"content-type": media_type})

    async def alive(_: Request) -> Response:
        return _text(200, "alive")

    async def ready(_: Request) -> Response:
        problems = watched.problems()
        return _text(503 if problems else 200, "\n".join(problems) or "ready")

    routes = [
        Route("/status", show_status),
        Route("/events", show_events),
        Route("/metrics", show_metrics),
        Route("/healthz", alive),
        Route("/readyz", ready),
    ]
    for path, (name, media_type) in STATIC.items():
        routes.append(Route(path, _file(name, media_type)))
    return _Guard(Starlette(routes=routes), names)


def _file(name: str, media_type: str) -> Callable[[Request], Any]:
    content = resources.files("p2pgz.web").joinpath("static", name).read_bytes()

    async def show(_: Request) -> Response:
        return Response(content, headers={"content-type": media_type})

    return show
