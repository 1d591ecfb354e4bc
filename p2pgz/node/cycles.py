"""Looks for cyclic garbage once a minute and gives free memory back. Run by `node.run` in the daemon only: it changes the
whole process.

The daemon's thresholds (`cli.node`) keep Python's collector off the event loop: it hardly ever looks at older objects.
Closed connections are cycles, with TLS state and buffers in them. And chunks on their way are buffers of every size, after
which the C library keeps what it can use again: a fifth of the node after some bursts, for good.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

EVERY_SECONDS: Final = 60.0
# What is alive once the node is ready, and again a minute later when all libraries are there, stays and is not looked at
# any more: that leaves some milliseconds of work. Should it be more, it is done more rarely, so that it takes a 3000th of
# the time at most: of the processor's, since on a loaded machine the clock measures the others
SHARE: Final = 1 / 3000


async def collect_cycles() -> None:
    """Until cancelled."""
    gc.freeze()
    give_back = _give_back()
    took, is_first = 0.0, True
    while True:
        await trio.sleep(max(EVERY_SECONDS, took / SHARE))
        begin = time.thread_time()
        gc.collect()
        took = time.thread_time() - begin
        if is_first:
            gc.freeze()
            took, is_first = 0.0, False
        if give_back is not None:
            # some milliseconds after a burst, without Python's lock
            await trio.to_thread.run_sync(give_back)


def _give_back() -> Callable[[], object] | None:
    """glibc's malloc_trim(3), which has the kernel take back free pages from the midst of the heap too; None elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else partial(trim, ctypes.c_size_t(0))
