"""Looks for cyclic garbage once a minute. Run by `node.run` in the daemon only: it changes the whole process.

The daemon's thresholds (`cli.node`) keep Python's collector off the event loop: it hardly ever looks at older objects.
Closed connections are cycles, with TLS state and buffers in them.
"""

from __future__ import annotations

import gc
import time
from typing import Final

import trio

EVERY_SECONDS: Final = 60.0
# What is alive once the node is ready stays and is not looked at again: that leaves some milliseconds of work. Should it be
# more, it is done more rarely, so that it takes a 3000th of the time at most
SHARE: Final = 1 / 3000


async def collect_cycles() -> None:
    """Until cancelled."""
    gc.freeze()
    took = 0.0
    while True:
        await trio.sleep(max(EVERY_SECONDS, took / SHARE))
        begin = time.perf_counter()
        gc.collect()
        took = time.perf_counter() - begin
