"""A source that is opened when the first byte is asked of it: for images that are known here, whose source may be away.

Used when a node starts and takes its mounts up again: nothing may depend on a registry, or on a layout's directory, before a
reader needs a chunk that is not here. A source that cannot be opened is tried again with the next request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from p2pgz.core.media import Descriptor
from p2pgz.core.ports import ImageSource
from p2pgz.core.reference import Reference
from p2pgz.errors import P2pgzError, SourceUnavailable


class LazySource:
    """An `ImageSource` in front of one that `open_source` makes; that function keeps what it made."""

    def __init__(self, name: str, open_source: Callable[[], Awaitable[ImageSource]]) -> None:
        self.name = name
        self._open = open_source

    async def _source(self) -> ImageSource:
        try:
            return await self._open()
        except P2pgzError as error:
            # whatever it is, to a reader it means that these bytes cannot be had now
            raise SourceUnavailable(error.what, hint=error.hint) from error

    async def resolve(self, reference: Reference) -> Descriptor:
        """See ImageSource."""
        return await (await self._source()).resolve(reference)

    async def document(self, descriptor: Descriptor) -> bytes:
        """See ImageSource."""
        return await (await self._source()).document(descriptor)

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """See ImageSource."""
        source = await self._source()
        async with source.blob(descriptor, start, end) as pieces:
            yield pieces
