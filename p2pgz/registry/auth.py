"""Authorization headers for a registry: Basic, and Bearer tokens from the token service that the registry names.

`RegistryClient` calls `header` before each request and `challenged` after a 401. Distribution's token
authentication spec (GET) and its OAuth 2 variant (POST, for identity tokens). A token belongs to one
endpoint and scope, is fetched once however many requests wait for it, and is renewed before it expires.
Tokens and passwords must never get into a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

import trio

from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import AuthRefused, ImageInvalid, SourceUnavailable
from p2pgz.registry.credentials import Credentials, CredentialStore
from p2pgz.registry.hosts import is_loopback
from p2pgz.registry.transport import Transport, TransportError, Url

DEFAULT_TOKEN_SECONDS = 60.0  # the spec's, where expires_in is missing
RENEW_BEFORE_SECONDS = 10.0  # a token must outlive the request that carries it
MAX_TOKEN_BYTES = 1 << 20  # of the token service's whole answer
CLIENT_ID = "p2pgz"
_TOKEN = re.compile(r"[\x21-\x7e]{1,100000}")
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?:\s+|$)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One WWW-Authenticate challenge: scheme in lower case, parameters with lower-case names."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a WWW-Authenticate header (RFC 9110, 11.6.1);

    what cannot be understood ends the list.
    """
    found = []
    at = 0
    while match := _SCHEME.match(header, at):
        at = match.end()
        parameters = {}
        while parameter := _PARAMETER.match(header, at):
            at = parameter.end()
            quoted, bare = parameter[2], parameter[3]
            parameters[parameter[1].lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
        found.append(Challenge(match[1].lower(), parameters))
    return found


@dataclass(slots=True)
class _Token:
    text: str = field(repr=False)
    good_until: float


class Authenticator:
    """The authorization of one client at one endpoint."""

    def __init__(
        self, host: str, repository: str, store: CredentialStore, transport: Transport, *, plain_http: bool
    ) -> None:
        self._host = host
        self._repository = repository
        self._store = store
        self._transport = transport
        self._plain_http = plain_http
        self._challenge: Challenge | None = None
        self._basic = ""
        self._tokens: dict[str, _Token] = {}
        self._fetching: dict[str, trio.Lock] = {}

    async def header(self, scope: str) -> str:
        """The Authorization header for the next request, or empty as long as the registry has not asked for
        one.
        """
        if self._challenge is None:
            return ""
        if self._challenge.scheme == "basic":
            return self._basic
        async with self._fetching.setdefault(scope, trio.Lock()):  # the first fetches, the others find it
            token = self._tokens.get(scope)
            if token is None or trio.current_time() >= token.good_until:
                token = await self._fetch(self._challenge, scope)
                self._tokens[scope] = token
            return f"Bearer {token.text}"

    async def challenged(self, www_authenticate: str, scope: str, sent: str) -> None:
        """Learn from a 401 whose request carried the header `sent`, so that `header` gives a better one.

        Raises AuthRefused when there is nothing better to offer.
        """
        challenges = {challenge.scheme: challenge for challenge in parse_challenges(www_authenticate)}
        challenge = challenges.get("bearer") or challenges.get("basic")
        if challenge is None:
            raise AuthRefused(f"{self._host}: wants credentials of a kind that p2pgz does not know")
        if challenge.scheme == "basic":
            credentials = await self._store.find(self._host, self._repository)
            basic = credentials.basic() if credentials and credentials.username else ""
            if not basic or basic == sent:
                raise self._refused("refuses the credentials" if basic else "wants a user name and password")
            self._basic = basic
        self._challenge = challenge
        token = self._tokens.get(scope)
        if (
            token is not None and sent == f"Bearer {token.text}"
        ):  # not one that another request has renewed since
            del self._tokens[scope]

    def refused(self, status: int) -> AuthRefused:
        """The error for a request that was refused although it carried all that we have."""
        return self._refused("access denied" if status == 403 else "no access, or no such repository")

    def _refused(self, what: str) -> AuthRefused:
        return AuthRefused(
            f"{self._host}/{self._repository}: {what}",
            hint=f"docker login {self._host}, or --user NAME:PASSWORD",
        )

    async def _fetch(self, challenge: Challenge, scope: str) -> _Token:
        credentials = await self._store.find(self._host, self._repository) or Credentials()
        if credentials.registry_token:
            return _Token(credentials.registry_token, trio.current_time() + DEFAULT_TOKEN_SECONDS)
        realm = self._realm(challenge)
        wanted = {"service": challenge.parameters.get("service", ""), "scope": scope}
        parameters = {name: value for name, value in wanted.items() if value}
        started = trio.current_time()
        try:
            if credentials.identity_token:
                form = {
                    **parameters,
                    "grant_type": "refresh_token",
                    "client_id": CLIENT_ID,
                    "refresh_token": credentials.identity_token,
                }
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                sending = self._transport.send("POST", realm, headers, urlencode(form).encode())
            else:
                headers = {"Authorization": credentials.basic()} if credentials.username else {}
                sending = self._transport.send(
                    "GET", realm.with_query(urlencode(parameters, quote_via=quote)), headers
                )
            async with await sending as response:
                status = response.status
                body = await response.read(MAX_TOKEN_BYTES)
        except TransportError as error:
            what = f"token service of {self._host}: {error.what}"
            raise TransportError(
                what, not_tls=error.not_tls, fatal=error.fatal, answered=error.answered, hint=error.hint
            ) from error
        if status in (400, 401, 403):
            raise self._refused(f"the token service {realm.netloc} refuses us")
        if status != 200 or body is None:
            what = f"token service of {self._host}: {realm} answers with status {status}"
            raise TransportError(what, fatal=status < 500 and status != 429, answered=status < 500)
        return self._parse(body, started, realm)

    def _realm(self, challenge: Challenge) -> Url:
        where = f"token service of {self._host}"
        realm = Url.parse(challenge.parameters.get("realm", ""), where=where)
        if realm.scheme == "http" and not self._plain_http and not is_loopback(realm.host):
            raise AuthRefused(
                f"{where}: {realm} would get our credentials without TLS", hint="only with --plain-http"
            )
        return realm

    def _parse(self, body: bytes, started: float, realm: Url) -> _Token:
        where = f"token service {realm.netloc}"
        try:
            document = parse_strict(body, where=where)
        except ImageInvalid:
            raise SourceUnavailable(
                f"{where}: its answer is not JSON"
            ) from None  # the text may quote the token
        if not isinstance(document, dict):
            raise SourceUnavailable(f"{where}: its answer holds no token")
        text = document.get("token") or document.get("access_token")
        if not isinstance(text, str) or not _TOKEN.fullmatch(text):
            raise SourceUnavailable(f"{where}: its answer holds no token")
        lasts = document.get("expires_in")
        seconds = float(lasts) if isinstance(lasts, int | float) and lasts > 0 else DEFAULT_TOKEN_SECONDS
        return _Token(text, started + max(seconds - RENEW_BEFORE_SECONDS, seconds / 2))
