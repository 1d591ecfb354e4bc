"""What peers may be sending at a time: bounded over all connections, and given back whatever becomes of a fetch."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.media import Descriptor
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import SourceUnavailable
from p2pgz.fetch.counters import Counters
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.race import Race
from p2pgz.fetch.trace import Trace
from p2pgz.p2p.arriving import ARRIVING_MAX_BYTES, Arriving
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.plane import open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool, Segment
from p2pgz.testing.conformance_pool import Layer, check_content
from p2pgz.testing.faulty_disk import FaultyDisk, StuckDisk
from p2pgz.testing.memory_source import MemorySource
from p2pgz.testing.peers import Peer, open_peer, peer_layer

pytestmark = pytest.mark.trio

GIVERS = 3
LIMIT = 1 << 20
REQUEST = 128 << 10
SECONDS = 30


class Woken:
    """A waiter that counts."""

    def __init__(self) -> None:
        self.times = 0

    def wake(self) -> None:
        self.times += 1


async def test_room_goes_to_the_most_urgent_and_background_leaves_some() -> None:
    arriving = Arriving(100)
    assert arriving.admits(1000, Priority.FILL)  # alone, whatever its size
    arriving.take(70)
    assert not arriving.admits(10, Priority.FILL)
    assert arriving.admits(30, Priority.READ_AHEAD)
    arriving.take(30)
    fill, reader, other = Woken(), Woken(), Woken()
    arriving.wait(fill, 20, Priority.FILL)
    arriving.wait(reader, 30, Priority.BLOCKED_READ)
    arriving.wait(other, 80, Priority.BLOCKED_READ)
    arriving.give(20)
    assert (reader.times, other.times, fill.times) == (0, 0, 0)
    arriving.give(10)
    assert (reader.times, other.times, fill.times) == (1, 0, 0)
    arriving.pass_on()  # the reader had no use for it, and nobody else fits
    arriving.leave(other)
    arriving.give(30)
    assert (reader.times, other.times, fill.times) == (1, 0, 1)
    assert arriving.waiting == 0
    arriving.give(40)
    arriving.wait(other, 1000, Priority.FILL)
    arriving.pass_on()  # nothing is on its way: nobody would wake it later
    assert (other.times, arriving.bytes) == (1, 0)


@asynccontextmanager
async def taker_of(
    state: Path, disk: FaultyDisk, givers: list[Peer]
) -> AsyncIterator[tuple[Peer, list[Segment]]]:
    """A peer with nothing on a disk of ours, connected to the others; its segments are in their order."""
    async with Pool.open(state, boot_id="test", check_filesystem=False, disk=disk) as pool:
        segments = [await pool.open_segment(giver.layer.layout) for giver in givers]
        credentials = Credentials.make(Identity.new(), Admission())
        async with open_plane(credentials, PoolOffers(pool), Uploads(), host="127.0.0.1") as plane:
            plane.exchange.arriving.limit_bytes = LIMIT
            for giver in givers:
                await plane.exchange.connect("127.0.0.1", giver.port)
            yield Peer(pool, segments[0], givers[0].layer, plane.exchange, plane.port), segments


async def test_disk_that_hangs_stops_the_asking_and_everything_comes_once_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pgz.p2p.downloads.REQUEST_BYTES_MAX", REQUEST)
    # larger than what the pool writes without a thread
    layers = [
        Layer([[random.Random(i).randbytes(100_000 + i)] for i in range(16 * seed, 16 * seed + 16)])
        for seed in range(GIVERS)
    ]
    total = sum(len(chunk) for layer in layers for chunk in layer.chunks)
    assert total > 3 * LIMIT
    disk = StuckDisk()
    async with AsyncExitStack() as stack:
        givers = [
            await stack.enter_async_context(open_peer(tmp_path / str(i), layer))
            for i, layer in enumerate(layers)
        ]
        taker, segments = await stack.enter_async_context(taker_of(tmp_path / "taker", disk, givers))
        arriving = taker.exchange.arriving
        held = most = 0

        async def fetch(giver: Peer, segment: Segment, chunks: list[int], priority: Priority) -> None:
            async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
                nonlocal held, most
                size = sum(len(chunk) for _, chunk in good)
                held += size
                most = max(most, held)
                await taker.pool.add_many(segment, good)
                held -= size

            answer = await taker.exchange.fetch(
                giver.id, giver.swarm, segment.table, chunks, priority=priority, landed=landed
            )
            assert answer.missing == answer.busy == []

        disk.gate.clear()
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for giver, segment in zip(givers, segments, strict=True):
                    count = segment.table.chunk_count
                    for first in range(0, count, 6):
                        chunks = list(range(first, min(count, first + 6)))
                        priority = Priority.BLOCKED_READ if first % 12 else Priority.FILL
                        nursery.start_soon(fetch, giver, segment, chunks, priority)
                quiet = 0
                while quiet < 5:  # all that may come has come
                    before = held
                    await trio.sleep(0.05)
                    quiet = quiet + 1 if held == before and arriving.waiting else 0
                assert 0 < held <= arriving.bytes <= LIMIT
                assert arriving.waiting > 0
                disk.gate.set()
        assert most <= LIMIT
        assert (arriving.bytes, arriving.waiting) == (0, 0)
        for segment, layer in zip(segments, layers, strict=True):
            assert check_content(segment, layer) == len(layer.chunks)


async def test_race_on_a_disk_that_hangs_is_bounded_and_goes_on(tmp_path: Path) -> None:
    """Chases lose patience then: they ask further peers and the source as well, for bytes that the disk does not take."""
    layer = Layer([[random.Random(i).randbytes(200_000)] for i in range(32)])
    disk = StuckDisk()
    async with AsyncExitStack() as stack:
        givers = [await stack.enter_async_context(open_peer(tmp_path / str(i), layer)) for i in range(GIVERS)]
        taker, segments = await stack.enter_async_context(taker_of(tmp_path / "taker", disk, givers))
        arriving, segment = taker.exchange.arriving, segments[0]
        taker.exchange.follow(taker.swarm)
        given: set[int] = set()

        def to_source(origin: Origin, chunks: Sequence[int]) -> None:
            for n in chunks:
                origin.flights[n].at_source = True
            given.update(chunks)

        with trio.fail_after(SECONDS):
            while len(taker.exchange.swarm_holders(taker.swarm)) < GIVERS:
                await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                descriptor = Descriptor(media_type="", digest=segment.id, size=1)
                origin = Origin(segment=segment, source=MemorySource(), descriptor=descriptor)
                race = Race(taker.exchange, taker.pool, nursery, Counters(), Trace(), to_source)
                disk.gate.clear()
                for n in range(len(layer.chunks)):
                    race.start(origin, [n], Priority.BLOCKED_READ, trio.current_time() + SECONDS)
                flights = list(origin.flights.values())
                assert len(flights) == len(layer.chunks)
                most = 0
                while len(given) < len(layer.chunks):
                    await trio.sleep(0.01)
                    most = max(most, arriving.bytes)
                assert LIMIT // 2 < most <= LIMIT
                assert segment.presence.present_count() == 0
                disk.gate.set()
                while not all(flight.done for flight in flights):
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert (arriving.bytes, arriving.waiting) == (0, 0)
        assert check_content(segment, layer) == len(layer.chunks)


@pytest.mark.parametrize("end", ["cancelled", "connection lost", "missing"])
async def test_room_comes_back_however_a_fetch_ends(tmp_path: Path, end: str) -> None:
    layer = peer_layer(4)
    disk = StuckDisk()
    has = range(0, len(layer.chunks), 2) if end == "missing" else None
    async with (
        open_peer(tmp_path / "giver", layer, chunks=has) as giver,
        taker_of(tmp_path / "taker", disk, [giver]) as (taker, [segment]),
    ):
        arriving = taker.exchange.arriving
        arriving.limit_bytes = ARRIVING_MAX_BYTES
        came = trio.Event()

        async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
            assert arriving.bytes >= sum(len(chunk) for _, chunk in good)
            came.set()
            if end == "cancelled":
                await trio.sleep_forever()
            if end == "connection lost":
                connection = taker.exchange.connection(giver.id)
                assert connection is not None
                await connection.close()

        async def fetch() -> None:
            try:
                answer = await taker.exchange.fetch(
                    giver.id, giver.swarm, segment.table, range(len(layer.chunks)), priority=0, landed=landed
                )
                assert len(answer.missing) == len(layer.chunks) // 2
                assert end == "missing"
            except SourceUnavailable:
                assert end == "connection lost"

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch)
                await came.wait()
                if end == "cancelled":
                    assert arriving.bytes
                    nursery.cancel_scope.cancel()
        assert (arriving.bytes, arriving.waiting) == (0, 0)
