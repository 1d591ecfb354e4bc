"""`RegistrySource`: a registry's repository as an ImageSource (see `core.ports`).

Documents are verified here. Ranges are asked for one at a time in single-range requests (some registries answer several
by the first alone), every answer's Content-Range is checked, and a body that breaks off goes on where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import structlog

from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    ACCEPT,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    SIZE_UNKNOWN,
    Descriptor,
    bare_type,
    check_document,
)
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid, SourceUnavailable
from p2pgz.registry.client import RegistryClient, TroubleError, Way, Wish
from p2pgz.registry.options import RegistryStats
from p2pgz.registry.transport import Response, TransportError

log = structlog.get_logger(component="registry")

MAX_DOCUMENT_BYTES = 128 << 20  # read into memory: configs, external TOC layers
MAX_SKIP_BYTES = (
    64 << 20
)  # thrown away per request where a registry ignores ranges; beyond, the blob cannot be used lazily
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
Pace = Callable[[int], Awaitable[None]]
_HEAD_UNKNOWN = frozenset({400, 405, 406, 501})  # registries that know no HEAD of manifests answer so


class RegistrySource:
    """The source of `open_source` for registry references.

    `pace` is awaited with the size of each piece of a blob that is read whole; who asks for ranges paces them.
    """

    def __init__(self, client: RegistryClient, pace: Pace | None = None) -> None:
        self._client = client
        self._pace = pace
        self.name = client.name

    @property
    def stats(self) -> RegistryStats:
        """What this source has sent and received."""
        return self._client.stats

    async def resolve(self, reference: Reference) -> Descriptor:
        """The descriptor of a tag, by HEAD where that is known, else by GET. A digest needs no request."""
        if reference.digest is not None:
            return Descriptor(media_type="", digest=reference.digest, size=SIZE_UNKNOWN)
        path = f"manifests/{reference.tag}"
        effort = self._client.effort()
        wish = Wish(
            method="HEAD",
            path=path,
            capability="resolve",
            headers={"Accept": ACCEPT},
            accepts=_HEAD_UNKNOWN | {200},
        )
        response, _ = await self._client.ask(wish, effort)
        async with response:
            if response.status == 200 and (descriptor := _described(response)):
                return descriptor
        return await self._resolve_by_get(path)

    async def _resolve_by_get(self, path: str) -> Descriptor:
        effort = self._client.effort()
        wish = Wish(method="GET", path=path, capability="resolve", headers={"Accept": ACCEPT})
        while True:
            response, way = await self._client.ask(wish, effort)
            try:
                data = await self._read(response, MAX_MANIFEST_BYTES, path)
                found = Digest.of(data)
                stated = response.headers.get("docker-content-digest")
                if stated is not None and stated != str(found):
                    raise ImageInvalid(
                        f"{self.name}: {path} has the digest {found}, the registry says {stated[:80]!r}",
                        hint="the registry or a proxy on the way gave other bytes",
                    )
                return Descriptor(
                    media_type=bare_type(response.headers.get("content-type", "")),
                    digest=found,
                    size=len(data),
                )
            except (TransportError, ImageInvalid, SourceUnavailable) as error:
                await self._client.recover(way, self._trouble(error), effort)

    async def document(self, descriptor: Descriptor) -> bytes:
        """The bytes of a manifest, index, config or other small blob, verified."""
        is_manifest = descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES or descriptor.size == SIZE_UNKNOWN
        most = MAX_MANIFEST_BYTES if is_manifest else MAX_DOCUMENT_BYTES
        where = f"{self.name}: {descriptor.digest}"
        if descriptor.size > most:
            raise ImageInvalid(f"{where}: a document of {descriptor.size} bytes, the limit is {most}")
        effort = self._client.effort()
        wish = Wish(
            method="GET",
            path=f"{'manifests' if is_manifest else 'blobs'}/{descriptor.digest}",
            headers={"Accept": ACCEPT if is_manifest else "*/*"},
        )
        while True:
            response, way = await self._client.ask(wish, effort)
            try:
                limit = most if descriptor.size == SIZE_UNKNOWN else descriptor.size
                data = await self._read(response, limit, str(descriptor.digest))
                check_document(descriptor, data, where=self.name)
                return data
            except (TransportError, ImageInvalid, SourceUnavailable) as error:
                await self._client.recover(way, self._trouble(error), effort)

    async def _read(self, response: Response, limit_bytes: int, what: str) -> bytes:
        async with response:
            _refuse_html(response, f"{self.name}: {what}")
            _refuse_encoded(response, f"{self.name}: {what}")
            data = await response.read(limit_bytes)
        if data is None:
            raise ImageInvalid(f"{self.name}: {what} is longer than {limit_bytes} bytes")
        return data

    def _trouble(self, error: TransportError | ImageInvalid | SourceUnavailable) -> TroubleError:
        if isinstance(error, TransportError):
            return TroubleError(error.to_error(self.name), again=not error.fatal)
        return TroubleError(error)

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Stream exactly the bytes `start` .. `end` of a blob, not verified; see `core.ports.ImageSource`."""
        if not 0 <= start <= end <= descriptor.size:
            raise ValueError(f"{start}..{end} is not a range of a blob of {descriptor.size} bytes")
        async with aclosing(self._stream(descriptor, start, end)) as pieces:
            yield pieces

    async def _stream(self, descriptor: Descriptor, start: int, end: int) -> AsyncGenerator[bytes, None]:
        effort = self._client.effort()
        at = start
        whole = start == 0 and end == descriptor.size
        while at < end:
            wish = Wish(
                method="GET",
                path=f"blobs/{descriptor.digest}",
                headers={} if whole and not at else {"Range": f"bytes={at}-{end - 1}"},
                accepts=frozenset({200, 206, 416}),
                storage_key=str(descriptor.digest),
            )
            response, way = await self._client.ask(wish, effort)
            where = f"{self.name}: {descriptor.digest}"
            async with response:
                try:
                    skip, stop = self._check_head(response, way, descriptor, at, end, where)
                    # the whole body is consumed, so that the connection can be used again, unless it is another's
                    async with aclosing(response.pieces()) as pieces:
                        async for piece in pieces:
                            if skip:
                                cut = min(skip, len(piece))
                                skip -= cut
                                piece = piece[cut:]
                            if len(piece) > stop - at:
                                if response.status == 206:
                                    raise TroubleError(
                                        SourceUnavailable(f"{where}: sends more than the range asked for")
                                    )
                                piece = piece[: stop - at]
                            if piece:
                                at += len(piece)
                                effort.received_bytes += len(piece)
                                yield piece
                                if whole and self._pace is not None:
                                    await self._pace(len(piece))
                            if at == end and response.status == 200:
                                break
                    trouble = TroubleError(
                        SourceUnavailable(f"{where}: the body ended at {at} of {end}"), again=True
                    )
                except TransportError as error:
                    if at == end:
                        return
                    trouble = self._trouble(error)
                except (TroubleError, SourceUnavailable) as error:
                    trouble = error if isinstance(error, TroubleError) else TroubleError(error)
                    if at == end and not way.endpoint.mirror:
                        raise trouble.error from None  # too long a body, noticed after its last good byte
            if at < end:
                await self._client.recover(way, trouble, effort)

    def _check_head(
        self, response: Response, way: Way, descriptor: Descriptor, at: int, end: int, where: str
    ) -> tuple[int, int]:
        """How many body bytes to skip, and where the wanted ones stop; raises TroubleError for another range."""
        _refuse_encoded(response, where)
        if response.status == 416:
            raise TroubleError(
                SourceUnavailable(f"{where}: the registry says that bytes {at}-{end - 1} are beyond its end"),
            )
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
            if match is None:
                raise TroubleError(
                    SourceUnavailable(f"{where}: a partial answer that does not say which part")
                )
            first, last, total = int(match[1]), int(match[2]), match[3]
            if first != at or not at <= last < end or (total != "*" and int(total) != descriptor.size):
                raise TroubleError(
                    SourceUnavailable(f"{where}: asked for bytes {at}-{end - 1}, got {match[0][:80]!r}"),
                )
            return 0, last + 1
        _refuse_html(response, where)
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) != descriptor.size:
            raise TroubleError(
                SourceUnavailable(f"{where}: has {length[:20]} bytes there, not {descriptor.size}")
            )
        if at == 0 and end == descriptor.size:
            return 0, end
        if not way.ranges_warned:
            way.ranges_warned = True
            log.warning(
                "registry.no-ranges", host=way.base.netloc, problem="whole blobs are sent for parts of them"
            )
        if at > MAX_SKIP_BYTES:
            raise TroubleError(
                SourceUnavailable(
                    f"{where}: {way.base.netloc} does not answer ranges, and {at} bytes would be thrown away",
                    hint=f"lazy reading needs ranges beyond {MAX_SKIP_BYTES} bytes; use a registry or mirror that has them",
                )
            )
        return at, end


def _described(response: Response) -> Descriptor | None:
    """What the head of a manifest says, if it says all."""
    length = response.headers.get("content-length", "")
    digest = response.headers.get("docker-content-digest", "")
    media_type = bare_type(response.headers.get("content-type", ""))
    if not length.isdecimal() or len(length) > 19 or media_type not in MANIFEST_TYPES | INDEX_TYPES:
        return None
    try:
        return Descriptor(media_type=media_type, digest=Digest.parse(digest), size=int(length))
    except ImageInvalid:
        return None


def _refuse_html(response: Response, where: str) -> None:
    if bare_type(response.headers.get("content-type", "")) in ("text/html", "application/xhtml+xml"):
        raise SourceUnavailable(
            f"{where}: {response.url} answers with an HTML page",
            hint="a proxy or login page in place of the registry?",
        )


def _refuse_encoded(response: Response, where: str) -> None:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise SourceUnavailable(f"{where}: sent in the encoding {encoding[:40]!r}, which was not asked for")
