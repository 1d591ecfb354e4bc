"""HTTP/1.1 over httpcore2: one request, one response, errors mapped once.

`RegistryClient`, the token fetcher and the sink send everything through `Transport`. No redirects, no
retries, no authentication here. It must never put a query, a header value or user info into an error or a
log: queries hold signatures.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import cast
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2
import trio

from p2pgz import __version__
from p2pgz.errors import ConfigError, SourceUnavailable, SourceUnreachable
from p2pgz.registry.network import LargeReads
from p2pgz.registry.options import RegistryStats

CONNECT_SECONDS = (
    5.0  # a handshake across the world takes 1 s; a mirror that swallows packets must not cost more
)
SILENCE_SECONDS = 10.0  # between two reads; then the request is given up and resumed elsewhere or again
MAX_CONNECTIONS = 64  # per way to a host; the callers' own limits are lower
KEEPALIVE_SECONDS = (
    30.0  # nginx closes idle connections after 75, balancers after 60, some registries after 30
)
USER_AGENT = f"p2pgz/{__version__}"
MAX_URL_LETTERS = 16 << 10  # signed URLs of storage services reach 2 KiB; h11 takes heads up to 100 KiB
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")
_URL = re.compile(r"[\x21-\x7e]+")

# What OpenSSL says when the first bytes are "HTTP/1.1 400 ..."; the second name is OpenSSL 3.2's
_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "UNKNOWN_PROTOCOL",
}

# httpcore2 writes response headers (signed URLs among them) to its debug log
logging.getLogger("httpcore2").setLevel(logging.WARNING)


class TransportError(Exception):
    """A request got no answer, or its answer broke off. `not_tls`: the other side does not speak TLS at all.

    `fatal`: asking again is useless until somebody changes something (a certificate that nobody vouches for).
    `answered`: there was an answer, and it was a refusal.
    """

    def __init__(
        self,
        what: str,
        *,
        not_tls: bool = False,
        fatal: bool = False,
        answered: bool = False,
        hint: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.not_tls = not_tls
        self.fatal = fatal
        self.answered = answered

    def to_error(self, where: str) -> SourceUnavailable:
        """As the caller's error: whether nobody is there, or somebody who cannot or will not answer."""
        there = self.not_tls or self.fatal or self.answered
        kind = SourceUnavailable if there else SourceUnreachable
        return kind(f"{where}: {self.what}", hint=self.hint)


@dataclass(frozen=True, slots=True)
class Url:
    """An absolute http(s) URL that may be requested. `str()` and `repr()` leave out the query."""

    scheme: str
    host: str
    port: int | None
    path: str
    query: str = ""

    @classmethod
    def parse(cls, text: str, *, where: str) -> Url:
        """Parse an absolute URL; raises SourceUnavailable naming `where` if it is none that we would ask."""
        try:
            if len(text) > MAX_URL_LETTERS or not _URL.fullmatch(text):
                raise ValueError
            parts: SplitResult = urlsplit(text)
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
                raise ValueError
            return cls(parts.scheme, parts.hostname, parts.port, parts.path or "/", parts.query)
        except ValueError:
            raise SourceUnavailable(f"{where}: names an address that cannot be asked") from None

    def join(self, location: str, *, where: str) -> Url:
        """What a Location header means here."""
        try:
            return Url.parse(urljoin(self.full, location), where=where)
        except ValueError:  # urljoin on malformed IPv6 addresses
            raise SourceUnavailable(f"{where}: names an address that cannot be asked") from None

    @property
    def netloc(self) -> str:
        """host[:port], brackets round an IPv6 address: the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """Where credentials may go: the same scheme, host and port."""
        return self.scheme, self.host, self.port or (443 if self.scheme == "https" else 80)

    @property
    def target(self) -> str:
        """The request target."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def full(self) -> str:
        """The whole URL, secrets included: for requests and comparisons, never for people."""
        return f"{self.scheme}://{self.netloc}{self.target}"

    def with_query(self, query: str) -> Url:
        """The same with further query parameters."""
        both = f"{self.query}&{query}" if self.query and query else self.query or query
        return Url(self.scheme, self.host, self.port, self.path, both)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"

    __repr__ = __str__


class Response:
    """Status, headers (lower-case names) and a body to be streamed once.

    An async context manager; leaving it early closes the connection, since the rest of the body would have
    to be read otherwise.
    """

    __slots__ = ("_inner", "_stats", "headers", "status", "url")

    def __init__(self, inner: httpcore2.Response, url: Url, stats: RegistryStats) -> None:
        self._inner = inner
        self._stats = stats
        self.url = url
        self.status: int = inner.status
        headers: dict[str, str] = {}
        for raw_name, raw_value in inner.headers:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value  # RFC 9110, 5.3
        self.headers: Mapping[str, str] = headers

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._inner.aclose()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives; raises TransportError when it breaks off."""
        stream = cast("AsyncIterable[bytes]", self._inner.stream)
        try:
            async with aclosing(cast("AsyncGenerator[bytes, None]", aiter(stream))) as pieces:
                async for piece in pieces:
                    self._stats.received_bytes += len(piece)
                    yield piece
        except _FAILURES as error:
            raise _failure(error, self.url) from error

    async def read(self, limit_bytes: int) -> bytes | None:
        """The whole body, or None when it has more than `limit_bytes`."""
        body = bytearray()
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                if len(body) + len(piece) > limit_bytes:
                    return None
                body += piece
        return bytes(body)


_FAILURES = (
    httpcore2.NetworkError,
    httpcore2.TimeoutException,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
)


class Transport:
    """Connections to hosts that share one TLS set-up, kept alive between requests. Close it with `aclose`."""

    def __init__(self, tls: TlsSettings, stats: RegistryStats) -> None:
        self._tls = tls
        self._stats = stats
        # by whether they encrypt: whoever speaks HTTP only need not wait until the system's certificates are read
        self._pools: dict[bool, httpcore2.AsyncConnectionPool] = {}
        self._opening = trio.Lock()

    async def send(
        self,
        method: str,
        url: Url,
        headers: Mapping[str, str],
        body: AsyncGenerator[bytes, None] | bytes | None = None,
        *,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> Response:
        """Send one request and return once the response's head is there; raises TransportError.

        A streamed `body` needs a Content-Length among the headers.
        """
        encrypts = url.scheme == "https"
        pool = self._pools.get(encrypts) or await self._open(encrypts=encrypts)
        request = httpcore2.Request(
            method,
            httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target),
            headers=_head(url, headers, body),
            content=_body(body, self._stats),
            extensions={
                "timeout": {"connect": CONNECT_SECONDS, "read": silence_seconds, "write": silence_seconds}
            },
        )
        self._stats.requests += 1
        try:
            answer = await pool.handle_async_request(request)
        except _FAILURES as error:
            self._stats.answers[0] += 1
            raise _failure(error, url) from error
        except httpcore2.UnsupportedProtocol as error:
            raise TransportError(f"{url}: cannot be asked", fatal=True) from error
        self._stats.answers[answer.status] += 1
        return Response(answer, url, self._stats)

    async def _open(self, *, encrypts: bool) -> httpcore2.AsyncConnectionPool:
        async with self._opening:
            if encrypts not in self._pools:
                # reading the system's certificates takes 20 ms and more: not on the event loop
                context = await trio.to_thread.run_sync(self._tls.context) if encrypts else None
                self._pools[encrypts] = httpcore2.AsyncConnectionPool(
                    ssl_context=context,
                    max_connections=MAX_CONNECTIONS,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                    network_backend=LargeReads(),
                )
            return self._pools[encrypts]

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Whom to trust and who we are, on one way to a host."""

    ca_files: tuple[str, ...] = ()
    client_pairs: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False

    def context(self) -> ssl.SSLContext:
        """The TLS context; raises ConfigError naming the file that cannot be used."""
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in self.ca_files:
            try:
                context.load_verify_locations(path)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"{path}: no CA certificates in PEM form: {_reason(error)}") from error
        for certificate, key in self.client_pairs:
            try:
                context.load_cert_chain(certificate, key or None, password=_no_password)
            except (OSError, ssl.SSLError, ValueError) as error:
                raise ConfigError(
                    f"{certificate}: cannot be used as client certificate: {_reason(error)}"
                ) from error
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _head(url: Url, headers: Mapping[str, str], body: object) -> list[tuple[bytes, bytes]]:
    found = {"Host": url.netloc, "User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
    if isinstance(body, bytes):
        found["Content-Length"] = str(len(body))
    for name, value in found.items():
        if not _HEADER_VALUE.fullmatch(value):  # h11 would show the value in its own error
            raise ConfigError(f"{url}: the value of the header {name} has control characters or is not ASCII")
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in found.items()]


async def _body(
    body: AsyncGenerator[bytes, None] | bytes | None, stats: RegistryStats
) -> AsyncGenerator[bytes, None]:
    if isinstance(body, bytes):
        stats.sent_bytes += len(body)
        yield body
    elif body is not None:
        async with aclosing(body) as pieces:
            async for piece in pieces:
                stats.sent_bytes += len(piece)
                yield piece


def _failure(error: Exception, url: Url) -> TransportError:
    """Say what broke, from the chain of causes: httpcore2 keeps the socket's or TLS's error there."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return TransportError(
            f"{url.netloc}: its certificate is not trusted: {cause.verify_message}",
            fatal=True,
            hint="name its CA with --tlscacert FILE, or ca = in hosts.toml",
        )
    hung_up = isinstance(cause, ssl.SSLEOFError) and isinstance(error, httpcore2.ConnectError)
    if isinstance(cause, ssl.SSLError) and (hung_up or cause.reason in _NOT_TLS):
        return TransportError(
            f"{url.netloc}: does not speak TLS", not_tls=True, hint="a plain HTTP registry wants --plain-http"
        )
    if isinstance(cause, ssl.SSLError):
        return TransportError(f"{url.netloc}: TLS failed: {_reason(cause)}")
    if isinstance(error, httpcore2.ConnectTimeout):
        return TransportError(f"{url.netloc}: no connection within {CONNECT_SECONDS:g} s")
    if isinstance(error, httpcore2.TimeoutException):
        return TransportError(f"{url}: silent for {SILENCE_SECONDS:g} s")
    if isinstance(error, httpcore2.ConnectError):
        return TransportError(f"{url.netloc}: cannot connect: {_os_reason(error)}")
    return TransportError(f"{url}: the connection broke")


def _os_reason(error: BaseException) -> str:
    cause: BaseException | None = error
    reason = "no answer"
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):  # trio: one error per address
            cause = cause.exceptions[-1]
            continue
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return reason


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "unknown").lower().replace("_", " ")
    return getattr(error, "strerror", None) or type(error).__name__
