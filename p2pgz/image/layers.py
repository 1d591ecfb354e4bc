"""Opens one layer of an image: its TOC, its segment in the pool, and what is remembered so that it is never asked for twice.

Called by `image.open` for all layers at once. A converted layer costs one request for its tail; one with an external TOC
three small ones more; a plain layer is read whole (`fetch.plain`). What was learned is kept: the TOC as an object of the
pool, and a small file `layers/KEY.json` that says which TOC a blob has. The key covers the annotations, because they are
what vouches for the TOC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor, Manifest, parse_manifest_or_index
from p2pgz.core.messages import DOCUMENT_MAX_BYTES
from p2pgz.core.model import Toc
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import Reference
from p2pgz.core.tail import (
    NeedExternal,
    NeedMore,
    NotLazy,
    Opened,
    open_document,
    open_external,
    open_layer_tail,
    shared_document,
    tail_start,
)
from p2pgz.core.toc import parse_toc
from p2pgz.errors import ImageInvalid, ImageNotFound, P2pgzError, PoolFull
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.from_registry import harvest
from p2pgz.fetch.shares import Access
from p2pgz.fetch.stall import watched
from p2pgz.image.layer_records import LayerFacts, LayerRecord, OpenLayer, domain_of, facts_name, laid_out
from p2pgz.image.opening import first_error
from p2pgz.image.plain_layers import PlainLayer, PlainLayers
from p2pgz.pool.disk import write_durably
from p2pgz.pool.pool import Pool, SegmentMeta

log = structlog.get_logger(component="image")

Progress = Callable[[dict[str, Any]], Awaitable[None]]

LAYERS: Final = "layers"
PLAIN: Final[Literal["plain"]] = "plain"
# A TOC image's layer: the gzipped TOC of one layer. The TOC parser's own limits apply to what it inflates to.
EXTERNAL_TOC_MAX_BYTES: Final = 128 << 20
# What peers may take to supply a TOC before the blob's tail is asked for; a large TOC at 100 Mbit/s takes a second
TOC_FROM_PEERS_SECONDS: Final = 5.0
# stargz-snapshotter's "external TOC" feature: which layer a TOC image's layer belongs to
LAYER_DIGEST_ANNOTATION: Final = "containerd.io/snapshot/stargz/layer.digest"


class _Tail:
    """The last bytes of a blob, as far as they have been fetched."""

    def __init__(self, source: ImageSource, descriptor: Descriptor) -> None:
        self.source = source
        self.descriptor = descriptor
        self.start = descriptor.size
        self.data = b""

    async def extend(self, start: int) -> None:
        """Fetch what is missing from `start` on; raises ImageInvalid when that is nothing."""
        if start >= self.start and self.descriptor.size:
            raise ImageInvalid("the footer asks for a TOC that is not there")
        if start < self.start:
            blob = self.source.blob(self.descriptor, start, self.start)
            async with watched(blob, self.source.name) as pieces:
                self.data = b"".join([piece async for piece in pieces]) + self.data
            self.start = start


class LayerOpener:
    """Opens layers of any format."""

    def __init__(
        self,
        pool: Pool,
        documents: Documents,
        counters: Counters,
        state_path: Path,
        plain: PlainLayers | None = None,
    ) -> None:
        self._pool = pool
        self._documents = documents
        self._counters = counters
        self.plain = plain or PlainLayers(pool, counters, state_path)
        self._facts = state_path / LAYERS

    async def open(
        self,
        reference: Reference,
        source: ImageSource,
        descriptor: Descriptor,
        *,
        access: Access,
        diff_id: Callable[[], Awaitable[Digest]],
        allow_unverified_toc: bool,
        progress: Progress,
    ) -> OpenLayer:
        """Open one layer; raises ImageInvalid that names it, or what the source raises."""
        try:
            known = await self._known(descriptor, diff_id, access)
            if known is not None:
                return known
            found = await self._from_peers(descriptor, access)
            if found is not None:
                return await self.keep_lazy(descriptor, found, access)
            if shared_document(descriptor.annotations) is None:
                plain = await self.plain.from_peers(descriptor, await diff_id(), access, progress)
                if plain is not None:
                    return await self.keep_plain(descriptor, plain, access)
            layer = await self._by_lease(reference, source, descriptor, access)
            layer = layer or await self._from_tail(
                reference, source, descriptor, access, allow_unverified_toc
            )
            if layer is None:
                plain = await self.plain.from_source(source, descriptor, await diff_id(), access, progress)
                return await self.keep_plain(descriptor, plain, access)
        except PoolFull:
            raise
        except P2pgzError as error:
            error.what = f"layer {descriptor.digest} of {reference}: {error.what}"
            raise
        return layer

    async def _from_tail(
        self,
        reference: Reference,
        source: ImageSource,
        descriptor: Descriptor,
        access: Access,
        allow_unverified: bool,
    ) -> OpenLayer | None:
        """The layer by the end of its blob; None when it is a plain one."""
        asked_at = trio.current_time()
        tail = _Tail(source, descriptor)
        opened = await self._open_tail(reference, tail, allow_unverified=allow_unverified)
        if opened is None:
            return None
        layer = await self.keep_lazy(descriptor, opened, access)
        brought = await harvest(self._pool, layer.segment, tail.data, tail.start, source=source.name)
        self._counters.brought_along(layer.segment, brought, source.name, trio.current_time() - asked_at)
        return layer

    async def _by_lease(
        self, reference: Reference, source: ImageSource, descriptor: Descriptor, access: Access
    ) -> OpenLayer | None:
        """Where others may open the same layer now: by the TOC that the one whose turn it is reads from the blob. None:
        open it as if there were nobody else."""
        wanted = shared_document(descriptor.annotations)
        if wanted is None or not self._documents.leases(access):
            return None
        made: list[OpenLayer | None] = []

        async def fetch() -> bytes:
            made.append(await self._from_tail(reference, source, descriptor, access, False))
            if made[0] is None:
                raise ImageInvalid("a plain layer whose annotation names a TOC")
            return b""

        try:
            document = await self._documents.by_lease(
                wanted, limit_bytes=DOCUMENT_MAX_BYTES, fetch=fetch, access=access
            )
            return made[0] if document is None else await self.adopt(descriptor, document, access)
        except ImageInvalid as error:
            log.info("toc.not_usable", blob=str(descriptor.digest), reason=error.what)
            return None

    async def described(self, descriptor: Descriptor, access: Access) -> tuple[Digest, bytes] | None:
        """What says what is in a layer that was opened here before: its `shared_document`, or a plain one's index."""
        wanted = shared_document(descriptor.annotations)
        if wanted is None:
            try:
                facts = msgspec.json.decode(
                    (self._facts / facts_name(descriptor)).read_bytes(), type=LayerFacts
                )
            except (OSError, msgspec.MsgspecError):
                await trio.lowlevel.checkpoint()
                return None
            wanted = Digest.parse(facts.document)
        data = await self._pool.get_object(wanted, domain=access.domain)
        return None if data is None else (wanted, data)

    async def adopt(self, descriptor: Descriptor, document: bytes, access: Access) -> OpenLayer:
        """Open a layer by its `shared_document`, which somebody has brought; raises ImageInvalid."""
        opened = await trio.to_thread.run_sync(
            open_document, document, descriptor.size, descriptor.media_type, descriptor.annotations
        )
        return await self.keep_lazy(descriptor, opened, access)

    async def _from_peers(self, descriptor: Descriptor, access: Access) -> Opened | None:
        """The layer by the TOC that a peer has, without a request for its blob."""
        wanted = shared_document(descriptor.annotations)
        if wanted is None:
            return None
        document = await self._documents.from_peers(
            wanted, limit_bytes=DOCUMENT_MAX_BYTES, seconds=TOC_FROM_PEERS_SECONDS, access=access
        )
        if document is None:
            return None
        try:
            return await trio.to_thread.run_sync(
                open_document, document, descriptor.size, descriptor.media_type, descriptor.annotations
            )
        except (
            ImageInvalid
        ) as error:  # the manifest's own fault, or a format that needs its footer: ask the blob
            log.info("toc.not_usable", blob=str(descriptor.digest), reason=error.what)
            return None

    async def _known(
        self, descriptor: Descriptor, diff_id: Callable[[], Awaitable[Digest]], access: Access
    ) -> OpenLayer | None:
        """The layer as it was opened before, from the pool alone."""
        try:
            facts = msgspec.json.decode((self._facts / facts_name(descriptor)).read_bytes(), type=LayerFacts)
            data = await self._pool.get_object(Digest.parse(facts.document), domain=access.domain)
        except (OSError, msgspec.MsgspecError, P2pgzError):
            return None
        if data is None:
            return None

        if facts.kind == "plain":
            plain = await self.plain.known(Digest.parse(facts.document), data, await diff_id())
            return await self._finish_plain(descriptor, plain, access) if plain is not None else None
        kind = facts.kind

        def parse() -> tuple[Toc, SegmentLayout]:
            toc = parse_toc(data, kind=kind, payload_end=facts.payload_end, blob_size=descriptor.size)
            return toc, SegmentLayout.build(toc, compression=facts.compression)

        toc, layout = await trio.to_thread.run_sync(parse)
        return await self._finish(descriptor, toc, layout, kind, access, unverified=False)

    async def _open_tail(self, reference: Reference, tail: _Tail, *, allow_unverified: bool) -> Opened | None:
        """The layer by its footer; None for a plain one."""
        descriptor = tail.descriptor
        size, annotations = descriptor.size, descriptor.annotations
        await tail.extend(tail_start(size))
        while True:
            answer = await trio.to_thread.run_sync(
                partial(open_layer_tail, tail.data, size, annotations, allow_unverified=allow_unverified)
            )
            if not isinstance(answer, NeedMore):
                break
            await tail.extend(answer.start)
        if isinstance(answer, NotLazy):
            return None
        if isinstance(answer, NeedExternal):
            blob = await self._external_toc(reference, tail.source, descriptor)
            return await trio.to_thread.run_sync(
                partial(
                    open_external, answer.footer, size, blob, annotations, allow_unverified=allow_unverified
                )
            )
        return answer

    async def _external_toc(self, reference: Reference, source: ImageSource, descriptor: Descriptor) -> bytes:
        """The blob that holds the TOC of a layer: a layer of the image tagged TAG-esgztoc."""
        if not reference.tag:
            raise ImageInvalid(
                "its TOC is in another image, which is named after the tag",
                hint="mount it by tag, or by tag and digest: NAME:TAG@sha256:…",
            )
        toc_reference = reference.with_tag(reference.external_toc_tag)
        try:
            found = await source.resolve(toc_reference)
        except ImageNotFound as error:
            raise ImageNotFound(
                f"its TOC is in another image, {toc_reference}, which is not there",
                hint="push the TOC image beside it",
            ) from error
        manifest = parse_manifest_or_index(
            await source.document(found), found.media_type, where=str(toc_reference)
        )
        if not isinstance(manifest, Manifest):
            raise ImageInvalid(f"{toc_reference} is an index, not a manifest of TOCs")
        for layer in manifest.layers:
            if layer.annotations.get(LAYER_DIGEST_ANNOTATION) == str(descriptor.digest):
                if layer.size > EXTERNAL_TOC_MAX_BYTES:
                    raise ImageInvalid(
                        f"its TOC has {layer.size} bytes, the limit is {EXTERNAL_TOC_MAX_BYTES}"
                    )
                return await source.document(layer)
        raise ImageNotFound(f"{toc_reference} has no TOC for this layer")

    async def keep_lazy(self, descriptor: Descriptor, opened: Opened, access: Access) -> OpenLayer:
        """Remember a lazily readable layer, and make its segment."""
        known = self._pool.segment(opened.toc.digest, access.domain) if opened.vouched else None
        opened, layout = await trio.to_thread.run_sync(laid_out, descriptor, opened, known)
        try:
            # both wait for the disk most of the time
            async with trio.open_nursery() as nursery:
                if opened.vouched:
                    nursery.start_soon(self._remember_lazy, descriptor, opened, access)
                kind = opened.footer.kind
                return await self._finish(
                    descriptor, opened.toc, layout, kind, access, unverified=not opened.vouched
                )
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _remember_lazy(self, descriptor: Descriptor, opened: Opened, access: Access) -> None:
        facts = LayerFacts(
            document=str(opened.toc.digest),
            kind=opened.footer.kind,
            compression=opened.compression,
            payload_end=opened.footer.payload_end,
        )
        await self._remember(descriptor, facts, opened.toc.digest, opened.toc_json, access)
        if opened.document is not opened.toc_json:
            await self._documents.keep(
                await trio.to_thread.run_sync(Digest.of, opened.document), opened.document, access
            )

    async def keep_plain(self, descriptor: Descriptor, plain: PlainLayer, access: Access) -> OpenLayer:
        """The same for a plain one."""
        document = str(plain.document)
        facts = LayerFacts(document=document, kind=PLAIN, compression="none", payload_end=descriptor.size)
        await self._remember(descriptor, facts, plain.document, plain.data, access)
        return await self._finish_plain(descriptor, plain, access)

    async def _finish_plain(self, descriptor: Descriptor, plain: PlainLayer, access: Access) -> OpenLayer:
        return await self._finish(descriptor, plain.toc, plain.layout, PLAIN, access, unverified=False)

    async def _remember(
        self, descriptor: Descriptor, facts: LayerFacts, document: Digest, data: bytes, access: Access
    ) -> None:
        """Keep what was learned; a full disk costs the next open its requests, nothing else."""
        path = self._facts / facts_name(descriptor)

        def write() -> None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(path, msgspec.json.encode(facts))

        try:
            await self._pool.put_object(document, data, domain=access.domain)
            await trio.to_thread.run_sync(write)
        except (PoolFull, OSError) as error:
            log.warning("toc.not_kept", blob=str(descriptor.digest), reason=str(error))

    async def _finish(
        self,
        descriptor: Descriptor,
        toc: Toc,
        layout: SegmentLayout,
        kind: str,
        access: Access,
        *,
        unverified: bool,
    ) -> OpenLayer:
        record = LayerRecord(
            segment=str(toc.digest),
            blob=str(descriptor.digest),
            streamed=kind == PLAIN,
            unverified=unverified,
            prefetch_end=toc.prefetch_end,
        )
        meta = SegmentMeta(
            domain=domain_of(record, access.domain),
            blob_digest=descriptor.digest,
            blob_bytes=descriptor.size,
            source=kind,
        )
        segment = await self._pool.open_segment(layout, meta)
        return OpenLayer(toc=toc, layout=layout, segment=segment, record=record)
