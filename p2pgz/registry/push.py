"""`RegistrySink`: a registry's repository as an ImageSink (see `core.ports`).

Blobs go up as POST + one PUT of the whole (distribution spec, "POST then PUT"), which every registry takes; a failed upload
starts over with a new pass over its bytes. Documents are checked against the digest that the registry says it stored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import cast
from urllib.parse import quote

from p2pgz.core.digest import Digest
from p2pgz.core.media import Descriptor
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.registry.client import RegistryClient, TroubleError, Way, Wish
from p2pgz.registry.options import RegistryStats

UPLOAD_SILENCE_SECONDS = 300.0  # a registry hashes and copies the blob before it answers the PUT


class RegistrySink:
    """The sink of `open_sink` for registry references.

    `mount_from`: a repository of the same registry to take blobs from.
    """

    def __init__(self, client: RegistryClient, *, mount_from: str = "") -> None:
        self._client = client
        self._mount_from = mount_from
        self._scope = f"repository:{client.repository}:pull,push"
        if mount_from:
            self._scope += f" repository:{mount_from}:pull"
        self.name = client.name

    @property
    def stats(self) -> RegistryStats:
        """What this sink has sent and received."""
        return self._client.stats

    async def has_blob(self, digest: str) -> bool:
        """Whether the repository has the blob."""
        path = f"blobs/{Digest.parse(digest)}"
        wish = Wish(
            method="HEAD", path=path, capability="push", accepts=frozenset({200, 404}), scope=self._scope
        )
        response, _ = await self._client.ask(wish, self._client.effort())
        async with response:
            return response.status == 200

    async def put_blob(self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]) -> None:
        """Send a blob, or have it mounted from `mount_from`."""
        effort = self._client.effort()
        while True:
            location, way = await self._start(descriptor, mount=bool(self._mount_from))
            if not location:
                return
            upload = Wish(
                method="PUT",
                path=location,
                capability="push",
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)},
                query=f"digest={quote(str(descriptor.digest), safe='')}",
                accepts=frozenset({201, 202, 204, 404, 416}),
                body=lambda: self._checked(descriptor, read),
                scope=self._scope,
                silence_seconds=UPLOAD_SILENCE_SECONDS,
            )
            response, way = await self._client.ask(upload, effort)
            async with response:
                if response.status in (201, 202, 204):
                    return
            # the upload's session is gone, as after a restart of the registry: begin a new one
            lost = SourceUnavailable(
                f"{self.name}: the upload of {descriptor.digest} was forgotten by the registry"
            )
            await self._client.recover(way, TroubleError(lost, again=True), effort)

    async def _start(self, descriptor: Descriptor, *, mount: bool) -> tuple[str, Way]:
        """Begin an upload: the URL to PUT to, or empty when the registry has the blob by mounting."""
        query = f"mount={descriptor.digest}&from={quote(self._mount_from, safe='/')}" if mount else ""
        wish = Wish(
            method="POST",
            path="blobs/uploads/",
            capability="push",
            headers={"Content-Length": "0"},
            query=query,
            accepts=frozenset({201, 202}),
            scope=self._scope,
        )
        response, way = await self._client.ask(wish, self._client.effort())
        async with response:
            if response.status == 201:
                return "", way
            location = response.headers.get("location", "")
            return response.url.join(location, where=f"{self.name}: the upload's address").full, way

    async def _checked(
        self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]
    ) -> AsyncGenerator[bytes, None]:
        """One pass over the blob, which must have the size that was announced."""
        sent = 0
        async with aclosing(cast("AsyncGenerator[bytes, None]", read())) as pieces:
            async for piece in pieces:
                sent += len(piece)
                if sent > descriptor.size:
                    break
                yield piece
        if sent != descriptor.size:
            raise ImageInvalid(
                f"{descriptor.digest}: has {sent} bytes or more, its descriptor says {descriptor.size}"
            )

    async def put_document(self, document: bytes, media_type: str, reference: Reference | None) -> Descriptor:
        """Store a manifest or index under the reference's tag, or by digest only when there is none."""
        digest = Digest.of(document)
        name = reference.tag if reference is not None and reference.tag else str(digest)
        wish = Wish(
            method="PUT",
            path=f"manifests/{name}",
            capability="push",
            headers={"Content-Type": media_type},
            accepts=frozenset({200, 201, 202}),
            body=document,
            scope=self._scope,
            silence_seconds=UPLOAD_SILENCE_SECONDS,
        )
        try:
            response, _ = await self._client.ask(wish, self._client.effort())
        except ImageNotFound as error:
            raise SourceUnavailable(
                f"{self.name}: the registry does not take the manifest: {error.what}"
            ) from error
        async with response:
            stored = response.headers.get("docker-content-digest", str(digest))
        if stored != str(digest):
            raise ImageInvalid(f"{self.name}: sent {digest}, the registry stored {stored[:80]!r}")
        return Descriptor(media_type=media_type, digest=digest, size=len(document))
