"""What the swarm has is known to the evictor: the last known copy of a chunk goes last."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2pgz.core.media import Descriptor
from p2pgz.core.ports import Holder
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.pool.evictor import Evictor
from p2pgz.pool.pool import Pool
from p2pgz.testing.conformance_pool import Layer
from p2pgz.testing.memory_source import MemorySource
from tests.unit.fetch.racing import FakePeers

pytestmark = pytest.mark.trio

CHUNK = 10_000
CHUNKS = 8


class Swarms(FakePeers):
    """Two peers; what they have depends on the swarm."""

    def __init__(self, layer: Layer, chunks: dict[bytes, list[set[int]]]) -> None:
        super().__init__(layer)
        self.chunks = chunks

    def swarm_holders(self, swarm: bytes) -> list[Holder]:
        def holding(has: set[int]) -> Callable[[int], bool]:
            return lambda n: n in has

        return [
            Holder(self.id(str(i)), holding(has), 0.0, 0.0)
            for i, has in enumerate(self.chunks.get(swarm, []))
        ]


async def test_chunks_that_peers_have_go_before_those_that_nobody_else_is_known_to_have(
    tmp_path: Path,
) -> None:
    rng = random.Random(1)
    shared, private, ours = (
        Layer([[rng.randbytes(CHUNK)] for _ in range(CHUNKS)], name=bytes([i])) for i in range(3)
    )
    peers = Swarms(shared, {shared.toc.digest.raw: [{0, 1, 2, 5}, {5, 6}], private.toc.digest.raw: [{0}]})
    async with Pool.open(tmp_path, boot_id="boot") as pool, trio.open_nursery() as nursery:
        fetcher = ChunkFetcher(
            pool, nursery, connections=1, fill_bytes_per_second=0, read_deadline_seconds=5, peers=peers
        )
        segments = []
        for layer in (shared, private, ours):
            segment = await pool.open_segment(layer.layout)
            descriptor = Descriptor(media_type="", digest=layer.toc.digest, size=1)
            fetcher.add_origin(
                Origin(
                    segment=segment, source=MemorySource(), descriptor=descriptor, peers=layer is not private
                )
            )
            await pool.add_many(segment, layer.all_verified())
            segments.append(segment)
        await pool.flush()
        assert fetcher.copies(segments[1]) is None  # not shared, so nobody is asked about it
        copies = fetcher.copies(segments[0])
        assert copies is not None
        assert [copies(n) for n in range(CHUNKS)] == [1, 1, 1, 0, 0, 2, 1, 0]
        evictor = Evictor(pool, rarity=fetcher.copies)

        def left() -> list[list[int]]:
            return [[n for n in range(CHUNKS) if segment.presence.has(n)] for segment in segments]

        assert await evictor.evict((5 + CHUNKS) * CHUNK) == (5 + CHUNKS) * CHUNK
        assert left() == [[3, 4, 7], [], list(range(CHUNKS))]
        assert await evictor.evict(1 << 40) == (3 + CHUNKS) * CHUNK
        assert left() == [[], [], []]
        nursery.cancel_scope.cancel()
