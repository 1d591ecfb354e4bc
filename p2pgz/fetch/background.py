"""Fetching what nobody waits for: the prefetch landmark's files first, then the rest of the image.

Both go through `ChunkFetcher.ensure_chunks`, in batches of blob order, so that each batch is one or two large requests and
everything bounded: one batch of flights at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog
import trio

from p2pgz.core.schedule import Priority
from p2pgz.errors import P2pgzError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.pool.pool import Segment

log = structlog.get_logger(component="fetch")

# compressed bytes of a batch: large enough that the pause between two batches does not count
BATCH_BYTES = 16 << 20
# after a failed batch the source is left alone for a while; mounts can last for months, so it never gives up
RETRY_START_SECONDS = 5.0
RETRY_MAX_SECONDS = 600.0
# a program that misses chunks for longer than this does not start, it works: then the rest may come beside it
CALM_MAX_SECONDS = 60.0


def batches(
    segment: Segment, order: Sequence[int], until: int | None, *, batch_bytes: int = BATCH_BYTES
) -> Iterator[list[int]]:
    """Missing chunks in blob order, grouped by `batch_bytes`; only members that end at or before `until`, if given."""
    table, presence = segment.table, segment.presence
    batch: list[int] = []
    gathered_bytes = 0
    last_end = -1
    for n in order:
        if until is not None and table.blob_end[n] > until:
            continue
        if presence.has(n):
            continue
        batch.append(n)
        if table.blob_end[n] != last_end:
            last_end = table.blob_end[n]
            gathered_bytes += last_end - table.blob_offset[n]
        if gathered_bytes >= batch_bytes:
            yield batch
            batch, gathered_bytes = [], 0
    if batch:
        yield batch


async def prefetch(fetcher: ChunkFetcher, segment: Segment, until: int) -> None:
    """Fetch the files that the image's author put before the landmark at blob offset `until`.

    Failures are left to readers, who have deadlines and are told.
    """
    origin = fetcher.origin(segment)
    if origin is None:
        return
    for batch in batches(segment, origin.order.chunk_at, until):
        try:
            await fetcher.ensure_chunks(segment, batch, Priority.START_UP)
        except P2pgzError as error:
            log.info("prefetch.stopped", segment=str(segment.id), reason=error.what)
            return


async def calm(requests: Callable[[], int], *, delay_seconds: float) -> None:
    """Return when a program has started: for `delay_seconds` nothing was asked for, or that goes on and on."""
    with trio.move_on_after(delay_seconds and CALM_MAX_SECONDS):
        seen = -1
        while seen != requests():
            seen = requests()
            await trio.sleep(delay_seconds)


async def fill(fetcher: ChunkFetcher, segments: Sequence[Segment]) -> None:
    """Fetch all that is missing of an image, politely; returns when everything is here."""
    for segment in segments:
        retry_seconds = RETRY_START_SECONDS
        while segment.presence.present_count() < segment.table.chunk_count:
            origin = fetcher.origin(segment)
            if origin is None:
                break
            try:
                for batch in batches(segment, origin.order.chunk_at, None):
                    await fetcher.ensure_chunks(segment, batch, Priority.FILL)
                break
            except P2pgzError as error:
                log.info("fill.waits", segment=str(segment.id), seconds=retry_seconds, reason=error.what)
                await trio.sleep(retry_seconds)
                retry_seconds = min(RETRY_MAX_SECONDS, 2 * retry_seconds)
