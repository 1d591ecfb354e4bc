"""`FakeRegistry`: an OCI registry in this process, for tests and `p2pgz demo`: pull, push, authentication, storage, faults.

`async with FakeRegistry.open() as registry:` serves on the loopback interface until the block ends. Content is put in
through `registry.store`, trouble through `registry.faults`; what was asked is in `registry.requests`. With `storage` set,
blobs are answered by a redirect to a second server with signed URLs, which notes every Authorization header that reaches
it in `registry.leaks`.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import ACCEPT
from p2pgz.errors import ImageInvalid
from p2pgz.testing.http_server import HttpAnswer, HttpRequest, serve_http
from p2pgz.testing.registry_faults import Fault
from p2pgz.testing.registry_store import RegistryStore

PIECE_BYTES = 64 << 10
_ROUTES = re.compile(r"/v2/(?P<repository>[a-z0-9._/-]+?)/(?P<kind>manifests|blobs|tags)/(?P<rest>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class SeenRequest:
    """A request and its answer's status. `server`: registry, storage or token."""

    server: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int


@dataclass
class FakeRegistry:
    """See the module. Everything may be changed while it serves."""

    store: RegistryStore = field(default_factory=RegistryStore)
    faults: list[Fault] = field(default_factory=list)
    requests: list[SeenRequest] = field(default_factory=list)
    auth: Literal["", "basic", "bearer"] = ""
    users: dict[str, str] = field(default_factory=dict)
    identity_tokens: set[str] = field(default_factory=set)
    anonymous_pull: bool = False
    """bearer: the token service gives anybody a token to pull"""
    token_seconds: int = 300
    storage: bool = False
    leaks: list[str] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"
    realm: str = ""
    """another address of the token service"""
    _storage_port: int = 0
    _signature: int = 1
    _tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> AsyncIterator[FakeRegistry]:
        """Serve, with TLS when there is a context."""
        registry = cls(scheme="https" if tls else "http")

        async def serve(server: str, at: int, nursery: trio.Nursery) -> int:
            async def handle(request: HttpRequest) -> HttpAnswer:
                return await registry._handle(server, request)

            async def run(task_status: trio.TaskStatus[int]) -> None:
                await serve_http(handle, host=host, port=at, tls=tls, task_status=task_status)

            bound: int = await nursery.start(run)
            return bound

        try:
            async with trio.open_nursery() as nursery:
                registry.port = await serve("registry", port, nursery)
                registry._storage_port = await serve("storage", 0, nursery)
                yield registry
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if (
                len(group.exceptions) == 1
            ):  # most likely the user's own: what is raised inside comes out as it is
                raise group.exceptions[0] from None
            raise

    @property
    def address(self) -> str:
        """host:port, as it stands in a reference."""
        return f"127.0.0.1:{self.port}"

    def storage_url(self, digest: Digest) -> str:
        """Where the storage server has a blob, signed."""
        return f"{self.scheme}://127.0.0.1:{self._storage_port}/data/{digest.hex}?signature={self._signature}"

    def expire_signatures(self) -> None:
        """All signed URLs given so far are refused from now on."""
        self._signature += 1

    def expire_tokens(self) -> None:
        """All tokens given so far are refused from now on."""
        self._tokens.clear()

    def seen(self, method: str = "", path: str = "", *, server: str = "") -> list[SeenRequest]:
        """The requests so far whose method is this, whose path contains that."""
        return [
            request
            for request in self.requests
            if method in ("", request.method) and path in request.path and server in ("", request.server)
        ]

    async def _handle(self, server: str, request: HttpRequest) -> HttpAnswer:
        line = f"{request.method} {request.path}"
        fault = next((fault for fault in self.faults if fault.hits(line)), None)
        if fault and fault.silent:
            await trio.sleep_forever()
        if server == "storage":
            answer = self._storage(request, fault)
        elif request.path.startswith("/token"):
            server = "token"
            answer = await self._token(request)
        else:
            answer = await self._registry(request, fault)
        if fault:
            answer = _spoil(answer, fault, request)
        seen = SeenRequest(
            server, request.method, request.path, request.query, request.headers, answer.status
        )
        self.requests.append(seen)
        return answer

    # authentication

    def _allowed(self, request: HttpRequest, wanted: str) -> bool:
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if self.auth == "basic":
            return kind == "Basic" and self._is_user(value)
        if self.auth == "bearer":
            return kind == "Bearer" and wanted in self._tokens.get(value, "").split()
        return True

    def _is_user(self, encoded: str) -> bool:
        try:
            name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:
            return False
        return name in self.users and self.users[name] == password

    def _challenge(self, repository: str, wanted: str) -> HttpAnswer:
        if self.auth == "basic":
            value = 'Basic realm="fake"'
        else:
            scope = f"repository:{repository}:{'pull,push' if wanted.endswith('push') else 'pull'}"
            realm = self.realm or f"{self.scheme}://{self.address}/token"
            value = f'Bearer realm="{realm}",service="fake",scope="{scope}"'
        return _error(401, "UNAUTHORIZED", "authentication required", {"WWW-Authenticate": value})

    async def _token(self, request: HttpRequest) -> HttpAnswer:
        parameters = request.query
        if request.method == "POST":
            form = parse_qs((await request.read()).decode())
            parameters = {key: values[-1] for key, values in form.items()}
            known = parameters.get("refresh_token") in self.identity_tokens
        else:
            kind, _, value = request.headers.get("authorization", "").partition(" ")
            known = kind == "Basic" and self._is_user(value)
            if kind and not known:
                return _error(401, "UNAUTHORIZED", "wrong password")
        granted = []
        for scope in parameters.get("scope", "").split():
            _, repository, actions = scope.split(":")
            allowed = actions.split(",") if known else ["pull"] if self.anonymous_pull else []
            granted += [f"{repository}:{action}" for action in actions.split(",") if action in allowed]
        token = secrets.token_urlsafe(24)
        self._tokens[token] = " ".join(granted)
        body = {"token": token, "access_token": token, "expires_in": self.token_seconds}
        return HttpAnswer(headers={"Content-Type": "application/json"}, body=json.dumps(body).encode())

    # the registry's API

    async def _registry(self, request: HttpRequest, fault: Fault | None) -> HttpAnswer:
        if request.path in ("/v2", "/v2/"):
            return HttpAnswer(headers={"Docker-Distribution-API-Version": "registry/2.0"}, body=b"{}")
        route = _ROUTES.fullmatch(request.path)
        if route is None:
            return _error(404, "UNSUPPORTED", "no such route")
        repository, kind, rest = route["repository"], route["kind"], route["rest"]
        wanted = f"{repository}:{'pull' if request.method in ('GET', 'HEAD') else 'push'}"
        if not self._allowed(request, wanted):
            return self._challenge(repository, wanted)
        try:
            if kind == "manifests":
                return await self._manifest(request, repository, rest)
            if kind == "tags":
                tags = sorted(tag for name, tag in self.store.tags if name == repository)
                return HttpAnswer(body=json.dumps({"name": repository, "tags": tags}).encode())
            if rest.startswith("uploads/"):
                return await self._upload(request, repository, rest.removeprefix("uploads/"))
            return self._blob(request, repository, Digest.parse(rest), fault)
        except (ImageInvalid, ValueError, KeyError) as error:
            return _error(400, "INVALID", str(error))

    async def _manifest(self, request: HttpRequest, repository: str, name: str) -> HttpAnswer:
        if request.method == "PUT":
            data = await request.read()
            if missing := self.store.missing_blobs(repository, data):
                return _error(400, "MANIFEST_BLOB_UNKNOWN", missing[0])
            tag = "" if name.startswith("sha256:") else name
            stored = self.store.add_manifest(
                repository, data, request.headers.get("content-type", ""), tag=tag
            )
            location = f"/v2/{repository}/manifests/{stored.digest}"
            return HttpAnswer(201, {"Location": location, "Docker-Content-Digest": str(stored.digest)})
        digest = self.store.find_manifest(repository, name)
        if digest is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        media_type = self.store.media_types[digest]
        accepted = request.headers.get("accept", ACCEPT)
        if media_type not in accepted and "*/*" not in accepted:
            return _error(404, "MANIFEST_UNKNOWN", "no manifest of an accepted type")
        headers = {"Content-Type": media_type, "Docker-Content-Digest": str(digest)}
        return HttpAnswer(headers=headers, body=self.store.content[digest])

    def _blob(self, request: HttpRequest, repository: str, digest: Digest, fault: Fault | None) -> HttpAnswer:
        data = self.store.blob(repository, digest)
        if data is None:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if self.storage and request.method == "GET":
            return HttpAnswer(307, {"Location": self.storage_url(digest)})
        return _ranged(data, request, digest, ignore=bool(fault and fault.ignore_range))

    def _storage(self, request: HttpRequest, fault: Fault | None) -> HttpAnswer:
        if "authorization" in request.headers:
            self.leaks.append(request.headers["authorization"])
            return _error(400, "LEAK", "a storage server must not get Authorization")
        if request.query.get("signature") != str(self._signature):
            return _error(403, "EXPIRED", "signature expired")
        digest = Digest(bytes.fromhex(request.path.removeprefix("/data/")))
        if digest not in self.store.content:
            return _error(404, "NOT_FOUND", "no such object")
        ignore = bool(fault and fault.ignore_range)
        return _ranged(self.store.content[digest], request, digest, ignore=ignore)

    async def _upload(self, request: HttpRequest, repository: str, session: str) -> HttpAnswer:
        if request.method == "POST":
            if (mount := request.query.get("mount")) and (source := request.query.get("from")):
                data = self.store.blob(source, Digest.parse(mount))
                if data is not None:
                    self.store.add_blob(repository, data)
                    return HttpAnswer(201, {"Location": f"/v2/{repository}/blobs/{mount}"})
            session = secrets.token_hex(8)
            self.store.uploads[session] = bytearray()
            return HttpAnswer(
                202, {"Location": f"/v2/{repository}/blobs/uploads/{session}?state=1", "Range": "0-0"}
            )
        upload = self.store.uploads.get(session)
        if upload is None:
            return _error(404, "BLOB_UPLOAD_UNKNOWN", "no such upload")
        upload += await request.read()
        if request.method == "PUT":
            del self.store.uploads[session]
            digest = Digest.parse(request.query.get("digest"))
            if Digest.of(upload) != digest:
                return _error(400, "DIGEST_INVALID", "the upload has another digest")
            self.store.add_blob(repository, bytes(upload))
            return HttpAnswer(
                201, {"Location": f"/v2/{repository}/blobs/{digest}", "Docker-Content-Digest": str(digest)}
            )
        location = f"/v2/{repository}/blobs/uploads/{session}?state=2"
        return HttpAnswer(202, {"Location": location, "Range": f"0-{max(0, len(upload) - 1)}"})


def _ranged(data: bytes, request: HttpRequest, digest: Digest, *, ignore: bool) -> HttpAnswer:
    headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": str(digest)}
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or ignore:
        return HttpAnswer(headers=headers | {"Accept-Ranges": "bytes"}, body=data)
    first = int(match[1])
    last = min(int(match[2] or len(data) - 1), len(data) - 1)
    if first > last:
        return _error(416, "RANGE", "out of range", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return HttpAnswer(206, headers, data[first : last + 1])


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> HttpAnswer:
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return HttpAnswer(status, {"Content-Type": "application/json", **(headers or {})}, body)


def _spoil(answer: HttpAnswer, fault: Fault, request: HttpRequest) -> HttpAnswer:
    """The answer as the fault has it."""
    if fault.status:
        answer = _error(fault.status, "FAULT", "as ordered")
    if fault.no_head and request.method == "HEAD":
        answer = _error(405, "UNSUPPORTED", "no HEAD here")
    if fault.redirect:
        answer = HttpAnswer(307, {"Location": fault.redirect})
    if fault.body is not None:
        answer.body = fault.body
    answer.headers = {
        name: value for name, value in answer.headers.items() if name.lower() not in fault.without
    }
    answer.headers |= fault.headers
    if fault.short_by:
        answer.body = answer.body[: -fault.short_by]
        answer.chunked = True
    if fault.drop_after == -1:
        answer.no_head = True
    elif fault.drop_after is not None:
        answer.headers["Content-Length"] = str(len(answer.body))
        answer.body = answer.body[: fault.drop_after]
        answer.cut = True
    if fault.endless or fault.piece_bytes:
        whole, answer.pieces = answer.body, lambda: _slowly(answer.body, fault)
        if not fault.endless:
            answer.headers["Content-Length"] = str(len(whole))
    return answer


async def _slowly(body: bytes, fault: Fault) -> AsyncGenerator[bytes, None]:
    step = fault.piece_bytes or PIECE_BYTES
    for at in range(0, len(body), step):
        yield body[at : at + step]
        await trio.sleep(fault.pause_seconds)
    while fault.endless:
        yield bytes(step)
        await trio.sleep(fault.pause_seconds)
