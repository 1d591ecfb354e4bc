"""`MemorySink`: an ImageSink that keeps what it is given, checks it, and hands it on as a `MemorySource`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import Descriptor
from p2pgz.core.reference import Reference
from p2pgz.errors import ImageInvalid
from p2pgz.testing.memory_source import MemorySource


@dataclass
class MemorySink:
    """Blobs and tags go to `store`; `sent` lists the digests of blobs in the order they came."""

    name: str = "memory"
    store: MemorySource = field(default_factory=MemorySource)
    sent: list[str] = field(default_factory=list)

    async def has_blob(self, digest: str) -> bool:
        await trio.lowlevel.checkpoint()
        return Digest.parse(digest) in self.store.blobs

    async def put_blob(self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]) -> None:
        data = b"".join([piece async for piece in read()])
        if Digest.of(data) != descriptor.digest or len(data) != descriptor.size:
            raise ImageInvalid(f"{self.name}: a blob is not what its descriptor says")
        self.store.add(data, descriptor.media_type)
        self.sent.append(str(descriptor.digest))

    async def put_document(self, document: bytes, media_type: str, reference: Reference | None) -> Descriptor:
        await trio.lowlevel.checkpoint()
        descriptor = self.store.add(document, media_type)
        if reference is not None:
            self.store.tags[reference.tag] = descriptor
        return descriptor
