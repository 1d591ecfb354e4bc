"""Cyclic garbage and free memory of a node do not gather for ever, and looking for them does not take the node's time."""

from __future__ import annotations

import ctypes
import gc
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from p2pgz.node import cycles
from p2pgz.telemetry.process import anonymous_bytes

pytestmark = pytest.mark.trio


class Connection:
    """Something that refers to itself, as closed connections do."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _as_in_the_daemon() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


async def test_a_closed_connection_is_gone_within_a_minute_or_two(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cycles.collect_cycles)
        await trio.sleep(1)
        closed = weakref.ref(Connection())
        gc.collect(1)  # old by now: only a full collection finds it
        await trio.sleep(2 * cycles.EVERY_SECONDS)
        assert closed() is None
        nursery.cancel_scope.cancel()


async def test_what_takes_long_is_done_rarely(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[float] = []

    def slow() -> None:
        at.append(trio.current_time())
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    monkeypatch.setattr(cycles, "_give_back", lambda: None)  # the clock would jump while a thread works
    monkeypatch.setattr(gc, "collect", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cycles.collect_cycles)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    first, *pauses = [b - a for a, b in pairwise(at)]
    assert first < 2 * cycles.EVERY_SECONDS  # what that one found slow is not looked at again
    assert pauses
    assert all(pause >= 0.05 / cycles.SHARE for pause in pauses)


async def test_a_slow_machine_is_no_reason_to_look_rarely(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[float] = []

    def waiting_for_the_processor() -> None:
        at.append(trio.current_time())
        time.sleep(0.05)

    monkeypatch.setattr(cycles, "_give_back", lambda: None)  # the clock would jump while a thread works
    monkeypatch.setattr(gc, "collect", waiting_for_the_processor)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cycles.collect_cycles)
        await trio.sleep(10 * cycles.EVERY_SECONDS)
        nursery.cancel_scope.cancel()
    assert len(at) >= 9


async def test_memory_that_is_free_goes_back_to_the_system(autojump_clock: MockClock) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library gives nothing back")
    # small enough for the heap, and one of two stays: no end of the heap is free
    buffers = [bytearray(60_000) for _ in range(1000)]
    del buffers[::2]
    before = anonymous_bytes(Path("/proc/self/status").read_text())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cycles.collect_cycles)
        await trio.sleep(cycles.EVERY_SECONDS + 1)
        nursery.cancel_scope.cancel()
    after = anonymous_bytes(Path("/proc/self/status").read_text())
    assert before - after > 10 << 20
    assert len(buffers) == 500
