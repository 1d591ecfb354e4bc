"""`p2pgz verify`: every byte of an image against its digest, read from the pool's disk and hashed again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkCorrupt, P2pgzError
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.pool.pool import Pool, Segment

Progress = Callable[[dict[str, Any]], Awaitable[None]]

# chunks hashed in one thread hop, and the step of fetching
STEP_CHUNKS = 256


async def verify_image(
    image: OpenImage, pool: Pool, fetcher: ChunkFetcher, *, fetch: bool, progress: Progress
) -> dict[str, Any]:
    """Check all chunks; with `fetch` the missing ones are fetched first, otherwise they are only counted.

    A wrong chunk is taken out of the pool, so that the next reader fetches it again.
    """
    right_chunks = right_bytes = missing_chunks = 0
    wrong: list[str] = []
    total = sum(segment.table.chunk_count for segment in image.segments)
    for segment in image.segments:
        order = _blob_order(fetcher, segment)
        for start in range(0, len(order), STEP_CHUNKS):
            step = order[start : start + STEP_CHUNKS]
            if fetch:
                wrong += await _fetch_step(fetcher, segment, [n for n in step if not segment.presence.has(n)])
            # claimed: what is evicted while it is read would look wrong
            await segment.claim(step)
            try:
                here = [n for n in step if segment.presence.has(n)]
                bad = await trio.to_thread.run_sync(_wrong_chunks, segment, here)
            finally:
                segment.release(step)
            # checked when they came, and the pool has no room for them
            unkept = [n for n in step if pool.unkept(segment, n) is not None] if fetch else []
            missing_chunks += len(step) - len(here) if not fetch else 0
            for n in bad:
                wrong.append(f"chunk {Digest(segment.table.digest(n))} in segment {segment.id}")
            if bad:
                # not removed: a hole punched under a reader's reply would show zeros. Without its bit, a chunk is
                # hashed again by `revive`, found wrong, and forgotten; the next reader fetches over it
                for n in bad:
                    segment.presence.clear(n)
                await pool.revive(segment, bad)
            right = {*here, *unkept} - set(bad)
            right_chunks += len(right)
            right_bytes += sum(segment.table.size[n] for n in right)
            done = right_chunks + missing_chunks + len(wrong)
            await progress(
                {
                    "event": "progress",
                    "text": f"verified {done} of {total} chunks",
                    "done": done,
                    "total": total,
                }
            )
    return {
        "reference": image.reference,
        "digest": str(image.digest),
        "right_chunks": right_chunks,
        "right_bytes": right_bytes,
        "missing_chunks": missing_chunks,
        "wrong": wrong,
    }


async def _fetch_step(fetcher: ChunkFetcher, segment: Segment, absent: list[int]) -> list[str]:
    """Fetch a step in few requests; what the source gives wrong is told apart chunk by chunk."""
    try:
        await fetcher.ensure_chunks(segment, absent, Priority.READ_AHEAD)
        return []
    except ChunkCorrupt:
        pass
    wrong = []
    for n in absent:
        try:
            await fetcher.ensure_chunks(segment, [] if segment.presence.has(n) else [n], Priority.READ_AHEAD)
        except ChunkCorrupt as error:
            wrong.append(error.what)
    return wrong


def _blob_order(fetcher: ChunkFetcher, segment: Segment) -> list[int]:
    origin = fetcher.origin(segment)
    return list(origin.order.chunk_at) if origin else list(range(segment.table.chunk_count))


def _wrong_chunks(segment: Segment, chunks: list[int]) -> list[int]:
    """Hash chunks as the disk has them: runs in a thread."""
    bad = []
    for n in chunks:
        data = segment.view(n)
        try:
            verify(segment.table.digest(n), data, source="pool")
        except P2pgzError:
            bad.append(n)
    return bad
