"""The life of a pool on a recording disk, and what it notes down for the time after a crash. Used by `crash_points`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pgz.core.digest import Digest
from p2pgz.core.model import ChunkKind
from p2pgz.errors import PoolFull
from p2pgz.pool.catalog import ImageRecord, MountRecord, TagRecord
from p2pgz.pool.evictor import Evictor
from p2pgz.pool.pool import Pool, Segment, SegmentMeta
from p2pgz.pool.removal import Acknowledge
from p2pgz.testing.conformance_pool import Layer
from p2pgz.testing.crash_disk import RecordingDisk

FULL_AT_START = 0.3
CHECKPOINT_PAGES = 24  # SQLite's 1000 are never reached here

Chunk = tuple[int, int]
"""number of the layer, number of the chunk"""


@dataclass(slots=True)
class World:
    """The truth: layers, the domain of each, and documents."""

    layers: list[Layer]
    domains: list[str]
    documents: dict[Digest, bytes]
    objects: list[Digest]

    @classmethod
    def make(cls, seed: int) -> World:
        """Layers with chunks and files in common, one of them in a domain of its own, one with chunks of zeros."""
        rng = random.Random(seed)
        common = [rng.randbytes(rng.randint(1, 24_000) | 1) for _ in range(6)]
        whole = [rng.randbytes(9_000), rng.randbytes(5_001)]

        def parts() -> list[bytes]:
            return [
                rng.choice(common) if rng.random() < 0.4 else rng.randbytes(rng.randint(1, 24_000) | 1)
                for _ in range(rng.randint(1, 3))
            ]

        layers = [Layer([whole, *(parts() for _ in range(6))], name=b"%d" % n) for n in range(3)]
        layers.append(Layer([[b"x" * 5000, bytes(30_000), b"y" * 17], parts()], zeros=(1,), name=b"zeros"))
        documents = {}
        for size in (2, 3_000, 30_000, 90_000):
            data = rng.randbytes(size)
            documents[Digest.of(data)] = data
        return cls(layers, ["shared", "shared", "secret", "shared"], documents, list(documents))

    def meta(self, which: int) -> SegmentMeta:
        return SegmentMeta(domain=self.domains[which])

    def size(self, chunk: Chunk) -> int:
        """What losing it costs; holes cost nothing."""
        which, n = chunk
        kinds = [c.kind for entry in self.layers[which].toc.entries for c in entry.chunks]
        return 0 if kinds[n] == ChunkKind.ZEROS else len(self.layers[which].chunks[n])


@dataclass(frozen=True, slots=True)
class Added:
    """Chunks were written; whether they were synced is the pool's own business, which it has a second for."""

    chunks: frozenset[Chunk]


@dataclass(frozen=True, slots=True)
class Kept:
    """Chunks were found after a crash: they are durable as they are."""

    chunks: frozenset[Chunk]


@dataclass(frozen=True, slots=True)
class Removing:
    """Whatever becomes of these chunks is right from now on."""

    chunks: frozenset[Chunk]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Something of the catalog was written down; `value` None: taken out, or about to be."""

    key: str
    value: Any


class ToldPool(Pool):
    """Says what it is about to remove, whoever decided so."""

    on_removing: Callable[[Segment, Iterable[int]], None]

    async def remove_chunks(self, segment: Segment, chunks: Iterable[int], acknowledge: Acknowledge) -> int:
        chosen = list(chunks)
        self.on_removing(segment, chosen)
        return await super().remove_chunks(segment, chosen, acknowledge)

    async def renew_segment(self, segment: Segment, is_unused: Callable[[], bool]) -> int:
        self.on_removing(segment, range(segment.table.chunk_count))
        return await super().renew_segment(segment, is_unused)


class Nobody:
    """No process reads the pool's files."""

    def mounted(self) -> tuple[Segment, ...]:
        return ()

    def is_mapped(self, segment: Segment) -> bool:
        return False

    def may_punch(self) -> bool:
        return True

    async def acknowledge(self, segment: Segment) -> None:
        await acknowledge()


class Life:
    """A pool and what is done to it, on a disk that records."""

    def __init__(self, world: World, disk: RecordingDisk, rng: random.Random, clock: MockClock) -> None:
        self.world = world
        self.disk = disk
        self.rng = rng
        self.clock = clock
        self.checkpoint_pages = rng.choice((CHECKPOINT_PAGES, 1000))
        self.pool: ToldPool
        self.steps: dict[str, tuple[int, Callable[[], Any]]] = {
            "add": (8, self.add),
            "add while syncing": (2, self.add_while_syncing),
            "copy": (2, self.copy),
            "remove": (2, self.remove),
            "remove on a full disk": (1, self.remove_on_a_full_disk),
            "evict": (2, self.evict),
            "drop": (1, self.drop),
            "flush": (2, self.flush),
            "flush on a full disk": (1, self.flush_on_a_full_disk),
            "tick": (7, self.tick),
            "document": (2, self.document),
            "record": (3, self.record),
            "unrecord": (1, self.unrecord),
            "native": (1, self.native),
        }

    async def run(self, steps: int) -> None:
        """Some opens and clean stops, with steps in between."""
        names, weights = list(self.steps), [weight for weight, _ in self.steps.values()]
        left = steps
        while left > 0:
            async with opened(self.disk, ToldPool) as self.pool:
                self.pool.on_removing = self.note_removing
                self.pool._index._writer.wal_autocheckpoint(self.checkpoint_pages)
                if self.rng.random() < FULL_AT_START:  # nothing else has made anything durable in this run
                    await self.remove_on_a_full_disk()
                for which in range(len(self.world.layers)):
                    await self.revive(which)
                for _ in range(min(left, self.rng.randint(steps // 3, steps))):
                    left -= 1
                    await self.steps[self.rng.choices(names, weights)[0]][1]()
            self.disk.log.note()

    async def segment(self, which: int) -> Segment:
        return await self.pool.open_segment(self.world.layers[which].layout, self.world.meta(which))

    def some_layer(self) -> int:
        return self.rng.randrange(len(self.world.layers))

    def some_chunks(self, which: int, most: int) -> list[int]:
        count = len(self.world.layers[which].chunks)
        return self.rng.sample(range(count), self.rng.randint(1, min(most, count)))

    def noted(self, which: int, chunks: Iterable[int]) -> None:
        self.disk.log.note(Added(frozenset((which, n) for n in chunks)))

    async def revive(self, which: int) -> None:
        segment = await self.segment(which)
        alive = await self.pool.revive(segment, range(segment.table.chunk_count))
        self.disk.log.note(Kept(frozenset((which, n) for n in alive if not segment.adopted)))

    async def add(self) -> None:
        which = self.some_layer()
        segment, chunks = await self.segment(which), self.some_chunks(which, 6)
        fresh = [n for n in chunks if not segment.presence.has(n)]
        await self.pool.add_many(segment, [(n, self.world.layers[which].verified(n)) for n in chunks])
        self.noted(which, fresh)

    async def add_while_syncing(self) -> None:
        """A chunk arrives between the begin of a sync and its end."""
        await self.add()

        def meanwhile() -> None:
            self.disk.during_sync = lambda: None
            trio.from_thread.run(self.add)

        self.disk.during_sync = meanwhile
        await self.pool.flush()
        self.disk.during_sync = lambda: None

    async def copy(self) -> None:
        which = self.some_layer()
        segment = await self.segment(which)
        for n in self.some_chunks(which, 8):
            if not segment.presence.has(n) and await self.pool.copy_from(segment, n):
                self.noted(which, [n])

    async def remove(self) -> None:
        which = self.some_layer()
        segment, chunks = await self.segment(which), self.some_chunks(which, 4)
        if not segment.native_served:
            await self.pool.remove_chunks(segment, chunks, acknowledge)

    def note_removing(self, segment: Segment, chunks: Iterable[int]) -> None:
        [which] = [n for n, layer in enumerate(self.world.layers) if layer.toc.digest == segment.id]
        self.disk.log.note(Removing(frozenset((which, n) for n in chunks)))

    async def remove_on_a_full_disk(self) -> None:
        """The index cannot say what goes before the space of it is free."""
        segments = [await self.segment(which) for which in range(len(self.world.layers))]
        there = [
            (segment, n)
            for segment in segments
            for n in range(segment.table.chunk_count)
            if segment.presence.has(n) and not segment.native_served
        ]
        if there:
            segment, n = self.rng.choice(there)
            self.disk.is_full = True
            await self.pool.remove_chunks(segment, [n], acknowledge)
            await self.room_again()

    async def evict(self) -> None:
        """Cold chunks go; whole files of segments that a kernel may have read by itself."""
        for segment in self.pool.segments():
            for n in range(segment.table.chunk_count):
                segment.used_at[n] = self.rng.randrange(100)  # by chance, not by how fast this machine is
        await Evictor(self.pool, users=Nobody()).evict(self.rng.choice((1, 20_000, 100_000)))

    async def drop(self) -> None:
        which = self.some_layer()
        segment = await self.segment(which)
        self.note_removing(segment, range(segment.table.chunk_count))
        await self.pool.drop_segment(segment, acknowledge)

    async def flush(self) -> None:
        await self.pool.flush()

    async def flush_on_a_full_disk(self) -> None:
        """Synced chunks that cannot be written down wait for room."""
        await self.add()
        self.disk.is_full = True
        with suppress(PoolFull):
            await self.pool.flush()
        await self.room_again()

    async def room_again(self) -> None:
        """Nothing is kept before the evictor, which looks once a second, has reserved room for the index."""
        self.disk.is_full = False
        await self.pool.take_reserve()

    async def tick(self) -> None:
        """Time passes, and what the pool does once a second is done."""
        for _ in range(self.rng.choice((1, 1, 2, 8))):
            await wait_all_tasks_blocked()
            self.clock.jump(1.1)
            self.disk.log.now += 1.1
            await wait_all_tasks_blocked()
            async with self.pool._committer._flushing:
                pass
        self.disk.log.note()

    async def document(self) -> None:
        digest = self.rng.choice(self.world.objects)
        await self.pool.put_object(digest, self.world.documents[digest])
        self.disk.log.note(Recorded(f"object {digest}", digest))

    async def record(self) -> None:
        catalog, digest = self.pool.catalog, self.rng.choice(self.world.objects)
        stamp = self.rng.random()
        match self.rng.choice(["image", "tag", "pin", "mount", "heat"]):
            case "image":
                image = ImageRecord(
                    manifest=digest, reference="r", tree_path="t", segments=(digest,), created=stamp
                )
                self.about(f"image {digest}")
                await catalog.put_image(image)
                self.disk.log.note(Recorded(f"image {digest}", image))
            case "tag":
                tag = TagRecord(
                    reference=f"tag-{digest.hex[:2]}", platform="linux/amd64", digest=digest, resolved=stamp
                )
                self.about(f"tag {tag.reference}")
                await catalog.set_tag(tag)
                self.disk.log.note(Recorded(f"tag {tag.reference}", tag))
            case "pin":
                await catalog.pin(digest, "r", stamp)
                self.disk.log.note(Recorded(f"pin {digest}", "r"))
            case "mount":
                mount = MountRecord(
                    id=digest.hex[:4], directory="/d", manifest=digest, options="{}", since=stamp
                )
                self.about(f"mount {mount.id}")
                await catalog.put_mount(mount)
                self.disk.log.note(Recorded(f"mount {mount.id}", mount))
            case "heat":
                which = self.some_layer()
                await catalog.note_reads(await self.segment(which), {0: 1}, stamp)

    async def unrecord(self) -> None:
        digest = self.rng.choice(self.world.objects)
        for key in (f"pin {digest}", f"image {digest}"):
            self.about(key)
        await self.pool.catalog.unpin(digest)
        await self.pool.catalog.remove_image(digest)

    def about(self, key: str) -> None:
        """This record changes now: what a crash leaves of it may be either way, until it is noted again."""
        self.disk.log.note(Recorded(key, None))

    async def native(self) -> None:
        if self.rng.random() < 0.3:
            which = self.some_layer()
            await self.pool.mark_native(await self.segment(which))


async def acknowledge() -> None:
    await trio.lowlevel.checkpoint()


def opened(disk: RecordingDisk, kind: type[Pool] = Pool) -> Any:
    return kind.open(disk.root, boot_id="boot", check_filesystem=False, disk=disk)
