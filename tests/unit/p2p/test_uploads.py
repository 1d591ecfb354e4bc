"""The queue of what a peer has asked for, against a model: every chunk gets exactly one final answer."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.messages import Data, DataFlag, Missing, Want, chunks_of, runs_of
from p2pgz.p2p.downloads import REQUEST_BYTES_MAX, Downloads, Fetch, batches
from p2pgz.p2p.uploads import (
    QUEUED_CHUNKS_MAX,
    REQUESTS_MAX,
    RETRY_MS,
    WAITING_MAX,
    UploadQueue,
    Uploads,
)

PART = 100


class Stock:
    """An offer: even chunks are there; chunk n has 50 n bytes."""

    chunk_count = 40
    ratio = 0.5

    def size(self, n: int) -> int:
        return 50 * n + 1

    def has(self, n: int) -> bool:
        return n % 2 == 0


@given(st.integers(0, 2**32))
def test_every_chunk_gets_one_final_answer(seed: int) -> None:
    rng = random.Random(seed)
    stock, queue = Stock(), UploadQueue()
    asked: dict[tuple[int, int], int] = {}
    offsets: dict[tuple[int, int], int] = {}
    in_flight: list[tuple[int, int, int]] = []

    def answer(request: int, n: int) -> None:
        assert asked[request, n] == 0
        asked[request, n] += 1

    def send_one() -> bool:
        if rng.random() < 0.5 or not in_flight:
            taken = queue.take()
            if taken is None and not in_flight:
                return False
            if taken is not None:
                request, n, _, offset = taken
                assert offsets.get((request, n), 0) == offset
                in_flight.append((request, n, offset))
                return True
        request, n, offset = in_flight.pop(rng.randrange(len(in_flight)))
        if rng.random() < 0.1:  # the chunk went away
            queue.sent(request, n, None)
            answer(request, n)
            return True
        end = offset + PART
        offsets[request, n] = end
        done = end >= stock.size(n)
        if queue.sent(request, n, None if done else end) or done:
            answer(request, n)
        return True

    for request in range(rng.randint(1, 8)):
        chunks = sorted(rng.sample(range(50), rng.randint(1, 20)))
        want = Want(request, rng.randrange(4), bytes(32), runs_of(chunks))
        assert queue.has_room(want)
        asked |= {(request, n): 0 for n in chunks}
        for n in queue.add(want, stock):  # type: ignore[arg-type]
            answer(request, n)
        for _ in range(rng.randrange(10)):
            send_one()
        if rng.random() < 0.5:
            about = rng.randrange(request + 1)
            some = None if rng.random() < 0.5 else set(rng.sample(range(50), 10))
            for n in queue.forget(about, some):
                answer(about, n)
    while send_one():
        pass
    assert set(asked.values()) == {1}
    assert not queue
    assert len(queue) == 0
    assert queue.take() is None
    assert queue.class_bytes == [0, 0, 0, 0]


def test_urgent_chunks_go_first_and_begun_ones_before_others_of_their_class() -> None:
    stock, queue = Stock(), UploadQueue()
    queue.add(Want(1, 3, bytes(32), ((2, 3),)), stock)  # type: ignore[arg-type]
    queue.add(Want(2, 0, bytes(32), ((6, 1),)), stock)  # type: ignore[arg-type]
    first = queue.take()
    assert first is not None
    assert first[:2] == (2, 6)
    queue.sent(2, 6, 50)
    queue.add(Want(3, 0, bytes(32), ((8, 1),)), stock)  # type: ignore[arg-type]
    order = []
    while (taken := queue.take()) is not None:
        order.append(taken[:2])
        queue.sent(*taken[:2], None)
    assert order == [(2, 6), (3, 8), (1, 2), (1, 4)]


def test_queue_has_limits() -> None:
    stock, queue = Stock(), UploadQueue()
    for request in range(REQUESTS_MAX):
        want = Want(request, 0, bytes(32), ((0, 1),))
        assert queue.has_room(want)
        queue.add(want, stock)  # type: ignore[arg-type]
    assert not queue.has_room(Want(99, 0, bytes(32), ((0, 1),)))
    assert not UploadQueue().has_room(Want(1, 0, bytes(32), ((0, QUEUED_CHUNKS_MAX + 1),)))
    assert queue.knows(0)
    assert not queue.knows(99)


class Sizes:
    def __init__(self, size: list[int]) -> None:
        self.size = size

    def digest(self, n: int) -> bytes:
        return bytes(32)


@given(
    st.lists(st.integers(1, 2 * REQUEST_BYTES_MAX), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 10),
    st.integers(0, 2**32),
)
def test_requests_keep_to_all_limits_and_ask_for_everything(
    sizes: list[int], chunks_max: int, runs_max: int, seed: int
) -> None:
    rng = random.Random(seed)
    chunks = sorted(rng.sample(range(len(sizes)), rng.randint(1, len(sizes))))
    found = batches(Sizes(sizes), chunks, chunks_max=chunks_max, runs_max=runs_max)
    assert [n for batch in found for n in batch] == chunks
    for batch in found:
        assert len(batch) <= chunks_max
        assert len(runs_of(batch)) <= runs_max
        assert list(chunks_of(runs_of(batch))) == batch
        assert len(batch) == 1 or sum(sizes[n] for n in batch) <= REQUEST_BYTES_MAX


def backlog(queue: UploadQueue) -> int:
    return sum(queue.class_bytes)


def test_backlog_is_what_has_not_gone_out() -> None:
    stock, queue = Stock(), UploadQueue()
    queue.add(Want(1, 3, bytes(32), ((2, 3),)), stock)  # type: ignore[arg-type]
    queue.add(Want(2, 0, bytes(32), ((6, 1),)), stock)  # type: ignore[arg-type]
    assert queue.class_bytes == [301, 0, 0, 101 + 201]
    assert queue.head_priority() == 0
    queue.take()
    queue.sent(2, 6, 100)
    assert queue.class_bytes[0] == 201
    queue.take()
    queue.sent(2, 6, None)
    assert queue.head_priority() == 3
    queue.take()
    queue.forget(1, None)  # one of the two is being sent
    assert queue.class_bytes == [0, 0, 0, 101]
    queue.sent(1, 2, 50)
    assert backlog(queue) == 0
    assert queue.head_priority() == 3  # nothing is there


@pytest.mark.trio
async def test_peers_go_elsewhere_when_the_rate_would_keep_them_waiting(autojump_clock: object) -> None:
    stock, queue = Stock(), UploadQueue()
    uploads = Uploads(bytes_per_second=300)
    assert uploads.busy_ms(3) == 0
    uploads.join(queue)
    queue.add(Want(1, 2, bytes(32), ((6, 3),)), stock)  # type: ignore[arg-type]
    assert backlog(queue) == 301 + 401
    assert uploads.busy_ms(2) == uploads.busy_ms(3) == int(1000 * (702 / 300 - 0.5))
    assert uploads.busy_ms(1) == 0  # goes before them
    uploads.spend(600, 0)
    assert uploads.busy_ms(0) > 0
    uploads.spend(-600, 0)
    assert uploads.busy_ms(0) == 0
    uploads.leave(queue)
    await trio.sleep(2)
    assert uploads.busy_ms(3) == 0


@pytest.mark.trio
async def test_peers_go_elsewhere_when_too_many_wait_for_a_slot(autojump_clock: object) -> None:
    uploads = Uploads(slots=1)

    async def hold() -> None:
        async with uploads.slot():
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(1 + WAITING_MAX):
            assert uploads.busy_ms(0) == 0
            nursery.start_soon(hold)
            await trio.testing.wait_all_tasks_blocked()
        assert uploads.busy_ms(0) == RETRY_MS
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_bytes_that_come_for_nobody_are_counted() -> None:
    downloads = Downloads(zstd=False)
    request = downloads.ask(bytes(32), Sizes([10, 10]), [0, 1], Fetch())
    number = request.number
    downloads.on_data(Data(number, 0, DataFlag.RAW, 0, 10, bytes(4)))
    assert downloads.dropped_bytes == 0
    assert downloads.forget(request)
    downloads.on_data(Data(number, 0, DataFlag.RAW, 4, 10, bytes(6)))
    downloads.on_missing(Missing(number))
    assert downloads.dropped_bytes == 10
    assert not downloads.waiting
