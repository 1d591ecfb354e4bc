"""The spool: where a plain layer's payloads wait, on disk and without a name, until the whole stream has proven right.

Called by `fetch.plain` and `fetch.plainshare`. Payloads lie in it in the order of the stream, one behind the other. It is
gone with its descriptor, whatever happens, and is no cache: nothing is ever read from it that is not verified once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from p2pgz.core.model import Chunk, ChunkKind, Toc
from p2pgz.core.ownindex import PlainIndex
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import PoolFull
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What is put into the pool in one go, when a spool becomes a segment
ADD_BYTES = 4 << 20


@contextlib.contextmanager
def open_spool(directory: Path) -> Iterator[int]:
    """A descriptor of a new spool; raises PoolFull."""
    try:
        spool = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PoolFull(f"{directory}: no temporary file can be made: {error.strerror}") from error
    try:
        yield spool
    finally:
        os.close(spool)


def append(spool: int, payloads: list[bytes]) -> None:
    """Write payloads behind those that are there. Blocks; raises PoolFull."""
    for payload in payloads:
        view = memoryview(payload)
        with _naming():
            while view:
                view = view[os.write(spool, view) :]


def write_at(spool: int, offset: int, payload: Buffer) -> None:
    """Write one payload to its place. Blocks; raises PoolFull."""
    view = memoryview(payload)
    with _naming():
        while view:
            count = os.pwrite(spool, view, offset)
            view, offset = view[count:], offset + count


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoolFull(
            f"no room for a layer that has to be read whole: {error.strerror}",
            hint="free some space in the state directory, or convert the image",
        ) from error


def numbered_chunks(toc: Toc) -> list[tuple[int, Chunk]]:
    """The chunks that the stream holds, in its order, with their numbers in the segment."""
    found: list[tuple[int, Chunk]] = []
    n = 0
    for entry in toc.entries:
        for chunk in entry.chunks:
            if chunk.kind is ChunkKind.DATA:
                found.append((n, chunk))
            n += 1
    found.sort(key=lambda item: item[1].offset)
    return found


async def move_into_pool(pool: Pool, segment: Segment, index: PlainIndex, spool: int) -> None:
    """Read the payloads back in stream order and add them; each is verified, since the spool is only a file."""
    batch: list[tuple[int, int, int]] = []
    at = start = 0

    async def add() -> None:
        await pool.add_many(segment, await trio.to_thread.run_sync(_read_back, spool, segment, batch))

    for n, chunk in await trio.to_thread.run_sync(numbered_chunks, index.toc):
        batch.append((n, at, chunk.size))
        at += chunk.size
        if at - start >= ADD_BYTES:
            await add()
            batch, start = [], at
    await add()


def _read_back(
    spool: int, segment: Segment, batch: list[tuple[int, int, int]]
) -> list[tuple[int, VerifiedChunk]]:
    return [
        (n, verify(segment.table.digest(n), os.pread(spool, size, at), source="spool file"))
        for n, at, size in batch
    ]
