"""What a process takes."""

from __future__ import annotations

import ctypes
import gc
import os

import pytest
import trio
import trio.testing

from p2pgz.telemetry.process import anonymous_bytes, figures


@pytest.mark.trio
async def test_a_leak_shows_in_the_figures() -> None:
    # what other tests have left free would be given back, or used again, in between
    gc.collect()
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    before = figures()
    pipe = os.pipe()
    kept = bytearray(os.urandom(1 << 20)) * 40
    async with trio.open_nursery() as nursery, trio.open_nursery() as other:
        for somewhere in (nursery, other):
            somewhere.start_soon(trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        after = figures()
        nursery.cancel_scope.cancel()
    for fd in pipe:
        os.close(fd)
    assert after["tasks"] == before["tasks"] + 2
    assert after["open_files"] == before["open_files"] + 2
    assert 38 << 20 < after["memory_bytes"] - before["memory_bytes"] < 80 << 20
    assert len(kept) == 40 << 20


def test_a_status_without_the_field_counts_nothing() -> None:
    assert anonymous_bytes("Name:\tx\nRssAnon:\t   12 kB\n") == 12 << 10
    assert anonymous_bytes("Name:\tx\n") == 0
