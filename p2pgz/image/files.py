"""Reading an image without a mount: `cat` and `get`."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

from p2pgz.core.digest import Digest
from p2pgz.core.schedule import Priority
from p2pgz.errors import ImageNotFound, UsageError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.image.reader import patched, read_whole
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.segment import SHARED_DOMAIN


async def read_path(image: OpenImage, fetcher: ChunkFetcher, path: bytes) -> AsyncIterator[memoryview]:
    """The bytes of the regular file at `path`, symlinks followed inside the image."""
    ino = image.tree.walk(path)
    mode = image.tree.inode(ino).mode
    shown = path.decode(errors="replace")
    if stat.S_ISDIR(mode):
        raise UsageError(f"{shown} is a directory", hint="p2pgz ls lists it")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{shown} is not a regular file")
    segments = image.segments

    unkept: dict[int, bytes] = {}

    async def ensure(segment: int, first: int, count: int, priority: Priority) -> None:
        nonlocal unkept
        unkept = await fetcher.supply(segments[segment], first, count, priority)

    def view(segment: int, offset: int, size: int) -> memoryview:
        piece = segments[segment].file_view(offset, size)
        return memoryview(patched(piece, offset, segments[segment].table, unkept)) if unkept else piece

    pieces = read_whole(
        image.tree,
        lambda segment: segments[segment].table,
        ino,
        ensure,
        view,
    )
    async for piece in pieces:
        yield piece


async def read_digest(pool: Pool, fetcher: ChunkFetcher, digest: Digest) -> bytes:
    """A document (TOC, manifest, config) or chunk that is here, or a chunk of an image that is open here."""
    document = await pool.get_object(digest)
    if document is not None:
        return document
    place = pool.find(SHARED_DOMAIN, digest.raw) or _place_in_open_images(fetcher, digest)
    if place is None:
        raise ImageNotFound(
            f"{digest}: not known here", hint="mount or `p2pgz ls` an image that has it first"
        )
    segment, n = place
    unkept = await fetcher.supply(segment, n, 1, Priority.BLOCKED_READ)
    return unkept[n] if unkept else bytes(segment.view(n))


def _place_in_open_images(fetcher: ChunkFetcher, digest: Digest) -> tuple[Segment, int] | None:
    for origin in fetcher.origins():
        n = origin.segment.table.find(digest.raw)
        if n is not None and origin.segment.domain == SHARED_DOMAIN:
            return origin.segment, n
    return None
