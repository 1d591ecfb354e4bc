"""Reading an image without a mount: `cat` and `get`."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

from p2pgz.core.digest import Digest
from p2pgz.core.schedule import Priority
from p2pgz.errors import ImageNotFound, UsageError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.open import OpenImage
from p2pgz.pool.pool import Pool

# one step of a sequential read: large enough for one request a step, small enough to show progress and bound memory
STEP_BYTES = 4 << 20


async def read_path(image: OpenImage, fetcher: ChunkFetcher, path: bytes) -> AsyncIterator[bytes]:
    """The bytes of the regular file at `path`, symlinks followed inside the image."""
    tree = image.tree
    ino = tree.walk(path)
    inode = tree.inode(ino)
    shown = path.decode(errors="replace")
    if stat.S_ISDIR(inode.mode):
        raise UsageError(f"{shown} is a directory", hint="p2pgz ls lists it")
    if not stat.S_ISREG(inode.mode):
        raise UsageError(f"{shown} is not a regular file")
    extent = tree.extent(ino)
    if extent is None:
        return
    segment = image.segments[extent.segment]
    first = extent.first_chunk
    last = first + extent.chunk_count
    offset = 0
    while offset < inode.size:
        end = min(inode.size, offset + STEP_BYTES)
        start_at, end_at = extent.segment_offset + offset, extent.segment_offset + end
        while first < last and segment.table.segment_offset[first] + segment.table.size[first] <= start_at:
            first += 1
        count = 0
        while first + count < last and segment.table.segment_offset[first + count] < end_at:
            count += 1
        await fetcher.ensure(segment, first, count, Priority.BLOCKED_READ)
        yield bytes(segment.view(start_at, end - offset))
        offset = end


async def read_digest(pool: Pool, fetcher: ChunkFetcher, digest: Digest) -> bytes:
    """A document (TOC, manifest, config) or chunk that is here, or a chunk of an image that is open here."""
    document = pool.get_object(digest)
    if document is not None:
        return document
    place = pool.find(pool.shared_domain, digest.raw)
    if place is None:
        place = _place_in_open_images(fetcher, digest)
    if place is None:
        raise ImageNotFound(f"{digest}: not known here", hint="mount or `p2pgz ls` an image that has it first")
    segment_id, n = place
    segment = pool.segment(segment_id)
    await fetcher.ensure_chunks(segment, segment.presence.missing(n, 1), Priority.BLOCKED_READ)
    return bytes(segment.view(segment.table.segment_offset[n], segment.table.size[n]))


def _place_in_open_images(fetcher: ChunkFetcher, digest: Digest) -> tuple[Digest, int] | None:
    for origin in fetcher.origins():
        n = origin.segment.table.find(digest.raw)
        if n is not None:
            return origin.segment.id, n
    return None
