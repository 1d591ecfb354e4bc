"""One repository's requests: endpoints in order, authentication, redirects, retries.

`source` and `push` say what they wish; `ask` walks mirrors and registry until one answers as wished, and `recover`
decides what a failure further on (a broken body, wrong bytes) means. Never sends Authorization or the headers of
hosts.toml to another origin, never follows a redirect from https to http, never waits longer than a registry may ask for.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
import trio

from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import (
    AuthRefused,
    ConfigError,
    ImageInvalid,
    ImageNotFound,
    P2pgzError,
    SourceUnavailable,
    SourceUnreachable,
)
from p2pgz.registry.auth import Authenticator
from p2pgz.registry.credentials import CredentialStore
from p2pgz.registry.hosts import Endpoint, endpoints_for
from p2pgz.registry.options import RegistryOptions, RegistryStats, RetryPolicy
from p2pgz.registry.transport import SILENCE_SECONDS, Response, TlsSettings, Transport, TransportError, Url

log = structlog.get_logger(component="registry")

MAX_REDIRECTS = 8  # storage services need one or two
MAX_STORAGE_URLS = 1024  # remembered redirects: one per blob in use
MIRROR_PENALTY_SECONDS = 30.0  # a failed mirror is passed over so long
LONGEST_RETRY_AFTER_SECONDS = 60.0  # who asks for more is told to the user at once
PROGRESS_PER_ATTEMPT_BYTES = 1 << 20  # a request that got so far has earned another attempt
MAX_ERROR_BYTES = 8 << 10
_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_PRINTABLE = re.compile(r"[^\x20-\x7e]+")


class TroubleError(Exception):
    """One endpoint did not do as wished.

    `error` is what the caller gets if nobody else does; `again`: asking later may help.
    """

    def __init__(
        self, error: P2pgzError, *, again: bool = False, after_seconds: float = 0.0, blame: bool = True
    ) -> None:
        super().__init__(error.what)
        self.error = error
        self.again = again
        self.after_seconds = after_seconds
        self.blame = blame
        """whether a mirror that does so is passed over for a while"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request to the repository. `path` follows `/v2/<repository>/`, or is an absolute URL.

    `storage_key`: where the request is redirected to may be remembered under it.
    """

    method: str
    path: str
    capability: str = "pull"
    headers: Mapping[str, str] = field(default_factory=dict)
    accepts: frozenset[int] = frozenset({200})
    storage_key: str = ""
    query: str = ""
    body: Callable[[], AsyncGenerator[bytes, None]] | bytes | None = None
    scope: str = ""
    """of the token; empty: pull from this repository"""
    silence_seconds: float = SILENCE_SECONDS


class Way:
    """An endpoint and what has been learned about it."""

    __slots__ = ("auth", "base", "endpoint", "not_before", "passed_over_until", "ranges_warned", "transport")

    def __init__(self, endpoint: Endpoint, transport: Transport, auth: Authenticator) -> None:
        self.endpoint = endpoint
        self.base = endpoint.base
        self.transport = transport
        self.auth = auth
        self.passed_over_until = 0.0
        self.not_before = 0.0
        self.ranges_warned = False

    def may_fall_back(self, url: Url) -> bool:
        """Whether plain HTTP may be tried after this URL failed. Others may have fallen back since it was sent."""
        return self.endpoint.may_be_plain and url.origin == self.endpoint.base.origin

    def fall_back(self, *, same_port: bool) -> None:
        """Speak plain HTTP from now on."""
        tls = self.endpoint.base
        self.base = Url("http", tls.host, tls.port or (443 if same_port else None), tls.path)


class Effort:
    """How often an operation has failed so far; one per operation."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self.received_bytes = 0

    def delay_seconds(self, trouble: TroubleError) -> float:
        """How long to wait before the next attempt; raises the trouble's error when it was the last one."""
        self._failures += 1
        allowed = self._policy.attempts + self.received_bytes // PROGRESS_PER_ATTEMPT_BYTES
        if not trouble.again or self._failures >= allowed:
            cause = trouble.__cause__  # the trouble itself is ours and tells nobody anything
            raise trouble.error from (None if cause is trouble.error else cause)
        return max(self._policy.delay_seconds(self._failures), trouble.after_seconds)


class RegistryClient:
    """Made by `open_client`. `host` is the reference's, `name` what messages call it."""

    def __init__(
        self, host: str, repository: str, ways: list[Way], options: RegistryOptions, policy: RetryPolicy
    ) -> None:
        self.host = host
        self.repository = repository
        self.name = f"{host}/{repository}"
        self.stats = RegistryStats()
        self._ways = ways
        self._options = options
        self._policy = policy
        self._storage: OrderedDict[tuple[str, Url], Url] = OrderedDict()

    def effort(self) -> Effort:
        """A fresh count of failures."""
        return Effort(self._policy)

    async def ask(self, wish: Wish, effort: Effort) -> tuple[Response, Way]:
        """The first response that is as wished, its body still to be read, and who gave it.

        Raises ImageNotFound, AuthRefused, SourceUnavailable, ConfigError. The caller enters the response at once.
        """
        while True:
            trouble: TroubleError | None = None
            for way in self._candidates(wish.capability):
                try:
                    return await self._ask(way, wish), way
                except TroubleError as error:
                    trouble = error
                    if way.endpoint.mirror:
                        self._pass_over(way, error)
            if trouble is None:
                raise ConfigError(
                    f"{self.name}: no endpoint may {wish.capability}",
                    hint="see capabilities in its hosts.toml",
                )
            await self._pause(trouble, effort)

    async def recover(self, way: Way, trouble: TroubleError, effort: Effort) -> None:
        """Return when the operation should be tried again (a mirror is passed over now); raises the error otherwise."""
        if way.endpoint.mirror:
            self._pass_over(way, trouble)
            if way.passed_over_until > trio.current_time():
                return
        await self._pause(trouble, effort)

    async def _pause(self, trouble: TroubleError, effort: Effort) -> None:
        delay_seconds = effort.delay_seconds(trouble)
        self.stats.retries += 1
        log.debug("registry.retry", repository=self.name, problem=trouble.error.what, seconds=delay_seconds)
        await trio.sleep(delay_seconds)

    def _candidates(self, capability: str) -> list[Way]:
        now = trio.current_time()
        able = [way for way in self._ways if capability in way.endpoint.capabilities]
        # the last one is asked whatever it did before: there is nobody after it
        return [way for way in able[:-1] if way.passed_over_until <= now] + able[-1:]

    def _pass_over(self, way: Way, trouble: TroubleError) -> None:
        if trouble.blame:
            way.passed_over_until = trio.current_time() + MIRROR_PENALTY_SECONDS
            log.warning("registry.mirror-failed", mirror=str(way.base), problem=trouble.error.what)

    async def _ask(self, way: Way, wish: Wish) -> Response:
        if (wait_seconds := way.not_before - trio.current_time()) > 0:
            await trio.sleep(wait_seconds)  # another request was told to come back later
        if response := await self._ask_storage(way, wish):
            return response
        scope = wish.scope or f"repository:{self.repository}:pull"
        for last in (False, True):
            try:
                authorization = await way.auth.header(scope)
                response, redirected = await self._follow(way, wish, authorization)
                if response.status != 401 or redirected:
                    return await self._judge(way, wish, response, redirected)
                async with response:
                    challenge = response.headers.get("www-authenticate", "")
                if last:
                    raise way.auth.refused(401)
                await way.auth.challenged(challenge, scope, authorization)
            except TransportError as error:
                raise TroubleError(error.to_error(self.name), again=not error.fatal) from error
            except (
                AuthRefused,
                SourceUnavailable,
            ) as error:  # a redirect or challenge that cannot be followed
                raise TroubleError(error, blame=not isinstance(error, AuthRefused)) from error
        raise AssertionError("the second round returns or raises")

    async def _ask_storage(self, way: Way, wish: Wish) -> Response | None:
        """Go straight to where the registry sent us for this blob before; None when it has to be asked again."""
        key = (wish.storage_key, way.base)
        url = self._storage.get(key) if wish.storage_key else None
        if url is None:
            return None
        try:
            response = await way.transport.send(
                wish.method, url, wish.headers, silence_seconds=wish.silence_seconds
            )
        except TransportError:
            self._storage.pop(key, None)
            return None
        if response.status in wish.accepts:
            return response
        async with response:  # most likely the signature in the URL has expired
            self._storage.pop(key, None)
        return None

    async def _follow(self, way: Way, wish: Wish, authorization: str) -> tuple[Response, bool]:
        """Send, and follow redirects; the response and whether it came from another origin than the endpoint's."""
        seen: set[str] = set()
        url = self._url(way, wish)
        while True:
            if url.full in seen or len(seen) > MAX_REDIRECTS:
                raise SourceUnavailable(
                    f"{self.name}: redirects in a circle, or more than {MAX_REDIRECTS} times, at {url}"
                )
            seen.add(url.full)
            headers = dict(wish.headers)
            at_home = url.origin in (way.base.origin, way.endpoint.base.origin)
            if at_home:
                headers = {**way.endpoint.headers, **headers}
                if authorization:
                    headers["Authorization"] = authorization
            try:
                response = await self._send(way, wish, url, headers)
            except TransportError as error:
                nobody_there = url.port is None and not error.fatal  # no port was named: try HTTP's own
                if not (way.may_fall_back(url) and (error.not_tls or nobody_there)):
                    raise
                way.fall_back(same_port=error.not_tls)
                log.debug("registry.plain-http", host=way.base.netloc)
                url = self._url(way, wish)
                seen.clear()
                continue
            if response.status not in _REDIRECTS or "location" not in response.headers:
                if len(seen) > 1 and wish.storage_key and response.status in wish.accepts:
                    self._storage[wish.storage_key, way.base] = url
                    if len(self._storage) > MAX_STORAGE_URLS:
                        self._storage.popitem(last=False)
                return response, not at_home
            async with response:
                next_url = url.join(response.headers["location"], where=f"{self.name}: a redirect from {url}")
            if wish.body is not None and response.status in (301, 302, 303):
                raise SourceUnavailable(f"{self.name}: {url} redirects an upload by status {response.status}")
            if url.scheme == "https" and next_url.scheme == "http" and not self._options.plain_http:
                raise SourceUnavailable(
                    f"{self.name}: {url} redirects to {next_url}, without TLS",
                    hint="refused; only with --plain-http",
                )
            url = next_url

    async def _send(self, way: Way, wish: Wish, url: Url, headers: Mapping[str, str]) -> Response:
        body = wish.body() if callable(wish.body) else wish.body
        return await way.transport.send(wish.method, url, headers, body, silence_seconds=wish.silence_seconds)

    def _url(self, way: Way, wish: Wish) -> Url:
        base = way.base
        if "://" in wish.path:  # an upload's Location
            url = Url.parse(wish.path, where=f"{self.name}: the upload's address")
        else:
            url = Url(base.scheme, base.host, base.port, f"{base.path}/{self.repository}/{wish.path}")
        url = url.with_query(wish.query)
        return url.with_query(f"ns={way.endpoint.namespace}") if way.endpoint.namespace else url

    async def _judge(self, way: Way, wish: Wish, response: Response, redirected: bool) -> Response:
        """The response if it is as wished; raises TroubleError for any other status."""
        status = response.status
        if status in wish.accepts:
            return response
        if status < 500 and not way.endpoint.mirror:
            self.stats.refused_at = trio.current_time()
        async with response:
            said = await _error_text(response) if wish.method != "HEAD" else ""
        what = f"{self.name}: {wish.method} {response.url} answers with status {status}{said}"
        if status == 404 and not redirected:
            part, _, name = wish.path.partition("/")
            tagged = part == "manifests" and ":" not in name
            noun = "tag" if tagged else {"manifests": "manifest", "blobs": "blob"}.get(part, part)
            hint = "see that repository and tag are spelled right" if tagged else ""
            error = ImageNotFound(f"{self.name}: no {noun} {name[:200]}{said}", hint=hint)
            raise TroubleError(error, blame=False)
        if status in (401, 403) and not redirected:
            refused = way.auth.refused(status)
            raise TroubleError(AuthRefused(refused.what + said, hint=refused.hint), blame=False)
        kind = SourceUnreachable if status >= 500 else SourceUnavailable
        after_seconds = _retry_after(response.headers.get("retry-after", ""))
        if after_seconds > LONGEST_RETRY_AFTER_SECONDS:
            raise TroubleError(kind(what, hint=f"it asks to come back in {after_seconds:.0f} s"))
        if status in (429, 503) and not redirected and not way.endpoint.mirror:
            way.not_before = trio.current_time() + after_seconds
        # a refusal by storage: the signature expired while we were on the way, and the registry gives a new one
        again = status in _PASSING or (redirected and status in (401, 403, 404))
        raise TroubleError(kind(what), again=again, after_seconds=after_seconds)


@asynccontextmanager
async def open_client(
    host: str, repository: str, options: RegistryOptions, policy: RetryPolicy | None = None
) -> AsyncIterator[RegistryClient]:
    """A client for one repository; its connections close with the context. Raises ConfigError."""
    endpoints = endpoints_for(host, options)
    store = CredentialStore(options)
    mirrors_store = CredentialStore(
        replace(options, user=None)
    )  # --user is for the registry, no mirror may have it
    async with AsyncExitStack() as stack:
        transports: dict[TlsSettings, Transport] = {}
        ways: list[Way] = []
        client = RegistryClient(host, repository, ways, options, policy or RetryPolicy())
        for endpoint in endpoints:
            transport = transports.get(endpoint.tls)
            if transport is None:
                transport = transports[endpoint.tls] = Transport(endpoint.tls, client.stats)
                stack.push_async_callback(_close, transport)
            # credentials belong to the host of the reference; a mirror's own are found under the mirror's name
            owner = endpoint.base.netloc if endpoint.mirror else host
            secrets = mirrors_store if endpoint.mirror else store
            auth = Authenticator(owner, repository, secrets, transport, plain_http=options.plain_http)
            ways.append(Way(endpoint, transport, auth))
        yield client


async def _close(transport: Transport) -> None:
    with trio.CancelScope(shield=True):  # closing sockets does not wait for the other side
        await transport.aclose()


async def _error_text(response: Response) -> str:
    """What the registry says about it (distribution spec, "Error Codes"), fit to be shown."""
    try:
        body = await response.read(MAX_ERROR_BYTES)
        document: Any = parse_strict(body or b"", where="")
        first = document["errors"][0]
        text = f"{first.get('code', '')}: {first.get('message', '')}"
    except (TransportError, ImageInvalid, KeyError, IndexError, TypeError, AttributeError):
        return ""
    return f" ({_PRINTABLE.sub(' ', text)[:200]})"


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3), 0 when it is missing or odd."""
    if text.isascii() and text.isdecimal():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
