"""Hashes, in the background, what a crash has left: chunks that are on record and were not looked at in this boot.

Run once by the node after each start; after a clean stop there is next to nothing to do. Whoever reads such a chunk looks at
it himself and waits for nobody. This is for the others: what was not looked at is not given to peers, and after a power
failure of a whole cluster the registry may be the one that is missing. Design, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

import structlog
import trio

from p2pgz.errors import P2pgzError
from p2pgz.pool.pool import Pool
from p2pgz.pool.presence import iterate_bits
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="pool")

# What is claimed and hashed at a time: 1.2 ms of a core, and eviction waits as long
STEP_BYTES: Final = 2 << 20
STEP_CHUNKS: Final = 256
# A twentieth of a core and a fraction of what disks read; 100 GB are looked at within half an hour
BYTES_PER_SECOND: Final = 64 << 20
# While somebody waits for chunks, the disk and the core are theirs first
BUSY_BYTES_PER_SECOND: Final = 8 << 20


async def recheck(pool: Pool, mounted: Callable[[], Collection[Segment]], is_busy: Callable[[], bool]) -> int:
    """All segments, those of mounted images first, then by their last mount; returns how many chunks were right."""
    begin, right, looked_at = trio.current_time(), 0, 0
    try:
        for row in _order(pool, mounted()):
            segment = pool.segment_of_row(row)
            if segment is None:
                continue
            for step in _steps(segment):
                used_at = {n: segment.used_at[n] for n in step}
                right += len(await pool.revive(segment, step))
                looked_at += len(step)
                for n, used in used_at.items():  # that was no use, as far as eviction is concerned
                    segment.used_at[n] = used
                rate = BUSY_BYTES_PER_SECOND if is_busy() else BYTES_PER_SECOND
                await trio.sleep(segment.bytes_of(step) / rate)
    except P2pgzError as error:
        log.warning("pool.recheck_ended", reason=str(error), effect="chunks are checked when first used")
    if looked_at:
        seconds = round(trio.current_time() - begin, 1)
        log.info("pool.rechecked", chunks=looked_at, right=right, seconds=seconds)
    return right


def _order(pool: Pool, mounted: Collection[Segment]) -> list[int]:
    first = [segment.row for segment in mounted]
    others = sorted(pool.heat(), key=lambda row: -row[4])
    return list(dict.fromkeys([*first, *(row for row, *_ in others)]))


def _steps(segment: Segment) -> Iterator[list[int]]:
    """What is on record and not present, in pieces; asked anew for each piece, since readers do their part meanwhile."""
    table = segment.table
    at = 0
    recorded = [n for n in iterate_bits(segment.on_record.to_bytes()) if not segment.presence.has(n)]
    while at < len(recorded):
        step: list[int] = []
        size = 0
        while at < len(recorded) and size < STEP_BYTES and len(step) < STEP_CHUNKS:
            n = recorded[at]
            at += 1
            if segment.recorded(n) and not segment.presence.has(n):
                step.append(n)
                size += table.size[n]
        if step:
            yield step
