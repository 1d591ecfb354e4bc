"""Power failures of a pool: `make crashpoints`, or `python -m tests.unit.pool.crash_points --states 5000 --seed 1`.

Each seed lives one life of a pool on a recording disk: chunks added, copied, revived and removed in batches, segments made
and dropped, documents and records kept, clean stops in between. From the record come the states that a crash can leave,
and each is opened by a new pool: it has to open, to serve right bytes only, and to have what was durable for more than
LOSS_SECONDS. Recoveries are recorded too, and crash again. Prints one line of JSON; the status is 1 when a state failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pgz.pool.pool import Pool, Segment
from p2pgz.testing.conformance_pool import Layer, check_content
from p2pgz.testing.crash_disk import RecordingDisk, recording
from p2pgz.testing.crash_log import CrashLog, Entry, Note
from p2pgz.testing.crash_states import Crash, crashes, materialise
from tests.unit.pool.crash_life import (
    Added,
    Chunk,
    Kept,
    Life,
    Recorded,
    Removing,
    World,
    acknowledge,
    opened,
)

STEPS = 50
LOSS_SECONDS = 5.0
KEPT_SHARE = 0.99
RANDOM_PER_POINT = 2
AGAIN_SHARE = 0.05  # of the states, those whose recovery crashes too
THOROUGH_SHARE = 0.1
AGAIN_STATES_SHARE = 0.1
DEPTH = 3
MOST_FAULTS = 5

Recording = Callable[[Path, CrashLog], AbstractContextManager[RecordingDisk]]


@dataclass(slots=True)
class Expected:
    """What must be there after a crash, from the log up to it."""

    durable_since: dict[Chunk, float] = field(default_factory=dict)
    records: dict[str, tuple[float, Any]] = field(default_factory=dict)

    def advance(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            match entry:
                case Note(at, Added(chunks) | Kept(chunks)):
                    self.durable_since = dict.fromkeys(chunks, at) | self.durable_since
                case Note(_, Removing(gone)):
                    for chunk in gone:
                        self.durable_since.pop(chunk, None)
                case Note(at, Recorded(key, value)):
                    self.records[key] = at, value

    def chunks(self, now: float) -> set[Chunk]:
        return {chunk for chunk, since in self.durable_since.items() if now - since > LOSS_SECONDS}

    def old_records(self, now: float) -> dict[str, Any]:
        return {key: value for key, (at, value) in self.records.items() if now - at > LOSS_SECONDS}


class Wrong(AssertionError):
    """A state that a pool must not come to, or not lose so much from."""


async def check(
    world: World, disk: RecordingDisk, expected: Expected, now: float, *, thorough: bool
) -> float:
    """Open what a crash left; raises Wrong. Returns the share of the bytes that had to be there and are."""
    async with opened(disk) as pool:
        for which, layer in enumerate(world.layers):
            found = pool.segment(layer.toc.digest, world.domains[which])
            if found is not None:
                check_content(found, layer)  # what counts as verified without a look
        await check_files(world, pool)
        kept: set[Chunk] = set()
        for which, layer in enumerate(world.layers):
            segment = await pool.open_segment(layer.layout, world.meta(which))
            check_content(segment, layer)
            await pool.revive(segment, range(segment.table.chunk_count))
            check_content(segment, layer)
            check_padding(segment, layer)
            kept |= {(which, n) for n in range(len(layer.chunks)) if segment.presence.has(n)}
        disk.log.note(Kept(frozenset(kept)))
        await check_records(world, pool, expected.old_records(now))
        wanted = expected.chunks(now)
        wanted_bytes = sum(map(world.size, wanted))
        share = sum(map(world.size, wanted & kept)) / wanted_bytes if wanted_bytes else 1.0
        if share < KEPT_SHARE:
            raise Wrong(f"{1 - share:.1%} of the bytes are lost: {sorted(wanted - kept)}")
        if thorough:
            for which, layer in enumerate(world.layers):
                segment = await pool.open_segment(layer.layout, world.meta(which))
                for n in range(0, len(layer.chunks), 2):
                    await pool.copy_from(segment, n)
                check_content(segment, layer)
                await pool.add_many(segment, layer.all_verified())
                if not segment.native_served:
                    await pool.remove_chunks(segment, [0], acknowledge)
                    await pool.add_many(segment, [(0, layer.verified(0))])
                check_content(segment, layer)
    if thorough:
        async with opened(disk) as pool:
            for which, layer in enumerate(world.layers):
                segment = pool.segment(layer.toc.digest, world.domains[which])
                if segment is None or check_content(segment, layer) != len(layer.chunks):
                    raise Wrong(f"layer {which} is not whole after a clean stop")
            if pool.stats().bytes != sum(
                world.size((w, n)) for w, x in enumerate(world.layers) for n in range(len(x.chunks))
            ):
                raise Wrong(f"the index counts {pool.stats().bytes} bytes")
    return share


async def check_files(world: World, pool: Pool) -> None:
    """A file that the pool offers to other images has the right bytes, or none once they are looked at."""
    for domain in set(world.domains):
        truth = {}
        for layer in world.layers:
            for entry, key in zip(layer.toc.entries, layer.file_keys(), strict=True):
                data = {c.digest: d for c, d in zip(chunks_of(layer), layer.chunks, strict=True)}
                truth[key] = b"".join(data[c.digest] for c in entry.chunks)
        for key, place in pool.lookup_files(domain, truth).items():
            segment = pool.segment(place.segment, domain)
            if segment is None:
                raise Wrong(f"a file in a segment that is not there: {place}")
            chunks = range(place.first_chunk, place.first_chunk + place.chunk_count)
            await pool.revive(segment, chunks)
            if not segment.presence.has_range(place.first_chunk, place.chunk_count):
                continue
            if segment.file_view(place.segment_offset, len(truth[key])) != truth[key]:
                raise Wrong(f"wrong bytes in {place}")


def chunks_of(layer: Layer) -> list[Any]:
    return [chunk for entry in layer.toc.entries for chunk in entry.chunks]


def check_padding(segment: Segment, layer: Layer) -> None:
    """What follows a file up to the end of its page reads as zeros."""
    for index, extent in layer.layout.extents.items():
        end = extent.segment_offset + layer.toc.entries[index].size
        if any(segment.file_view(end, -end % 4096)):
            raise Wrong(f"file {index} of {segment.id} is not padded with zeros")


async def check_records(world: World, pool: Pool, old: dict[str, Any]) -> None:
    """The catalog can be read, and what was written long enough ago is in it."""
    catalog = pool.catalog
    for digest, data in world.documents.items():
        if await pool.get_object(digest) not in (None, data):
            raise Wrong(f"another document under {digest}")
    there: dict[str, Any] = {f"image {image.manifest}": image for image in catalog.images()}
    there |= {f"pin {pin.manifest}": pin.reference for pin in catalog.pins()}
    there |= {f"mount {mount.id}": mount for mount in catalog.mounts()}
    for key, value in old.items():
        kind, _, name = key.partition(" ")
        if kind == "object":
            there[key] = value if await pool.get_object(value) is not None else None
        elif kind == "tag":
            there[key] = catalog.tag(name, "linux/amd64")
        if value is not None and there.get(key) != value:
            raise Wrong(f"{key} is {there.get(key)}, not {value}")


@dataclass(slots=True)
class Figures:
    """What a campaign came to."""

    seeds: int = 0
    states: int = 0
    by_depth: Counter[int] = field(default_factory=Counter)
    thorough: int = 0
    operations: int = 0
    least_kept: float = 1.0
    faults: list[str] = field(default_factory=list)


class Campaign:
    """Lives and crashes in a directory."""

    def __init__(self, folder: Path, *, most_states: int, most_faults: int, make_disk: Recording) -> None:
        self.folder = folder
        self.most_faults = most_faults
        self.make_disk = make_disk
        self.most_states = most_states
        self.figures = Figures()

    @property
    def is_over(self) -> bool:
        return self.figures.states >= self.most_states or len(self.figures.faults) >= self.most_faults

    def run_seed(self, seed: int, *, share: float = 1.0) -> None:
        """One life and its crashes; `share` of them, by chance."""
        world, log = World.make(seed), CrashLog()
        rng, clock = random.Random(seed), MockClock()
        root = self.folder / f"life-{seed}"
        root.mkdir()
        with self.make_disk(root, log) as disk:
            trio.run(Life(world, disk, rng, clock).run, STEPS, clock=clock)
        shutil.rmtree(root)
        self.figures.seeds += 1
        self.figures.operations += len(log.entries)
        self.crash(world, log, rng, f"seed {seed}", depth=1, share=share)

    def crash(
        self, world: World, log: CrashLog, rng: random.Random, label: str, *, depth: int, share: float
    ) -> None:
        """All states after `log`."""
        expected, seen = Expected(), 0
        for number, crash in enumerate(crashes(log, rng, random_per_point=RANDOM_PER_POINT)):
            expected.advance(log.entries[seen : crash.position])
            seen = crash.position
            if self.is_over:
                return
            if rng.random() < share:
                self.recover(world, crash, expected, rng, f"{label}, crash {number}", depth=depth)

    def recover(
        self, world: World, crash: Crash, expected: Expected, rng: random.Random, label: str, *, depth: int
    ) -> None:
        """Open one state; perhaps crash while doing so."""
        root = self.folder / f"state-{self.figures.states}"
        self.figures.states += 1
        self.figures.by_depth[depth] += 1
        thorough = rng.random() < THOROUGH_SHARE
        self.figures.thorough += thorough
        log = CrashLog(materialise(crash.image, root, rng))
        log.now = crash.at
        try:
            with self.make_disk(root, log) as disk:
                kept = trio.run(
                    lambda: check(world, disk, expected, crash.at, thorough=thorough), clock=MockClock()
                )
        except Exception as error:
            text = (
                "".join(traceback.format_exception(error)[-3:])
                if not isinstance(error, Wrong)
                else str(error)
            )
            self.figures.faults.append(f"{label} (entry {crash.position}, {crash.label}): {text}")
        else:
            self.figures.least_kept = min(self.figures.least_kept, kept)
            if depth < DEPTH and rng.random() < AGAIN_SHARE:
                self.crash(world, log, rng, f"{label}, again", depth=depth + 1, share=AGAIN_STATES_SHARE)
        shutil.rmtree(root)


def run(
    seed: int,
    *,
    states: int | None = None,
    share: float = 1.0,
    most_faults: int = MOST_FAULTS,
    make_disk: Recording = recording,
) -> dict[str, Any]:
    """One seed, or seeds from this one on until there were so many states; the figures."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="p2pgz-crash-") as place:
        campaign = Campaign(
            Path(place), most_states=states or sys.maxsize, most_faults=most_faults, make_disk=make_disk
        )
        while not campaign.is_over:
            with capture_logs():  # recoveries complain, as they should
                campaign.run_seed(seed + campaign.figures.seeds, share=share)
            if states is None:
                break
    figures = campaign.figures
    return {
        "campaign": "crashpoints",
        "seed": seed,
        "seeds": figures.seeds,
        "states": figures.states,
        "states_after_several_crashes": figures.states - figures.by_depth[1],
        "disk_operations": figures.operations,
        "refilled": figures.thorough,
        "least_kept_share": round(figures.least_kept, 4),
        "faults": figures.faults,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    arguments = parser.parse_args()
    figures = run(arguments.seed, states=arguments.states)
    print(json.dumps(figures))
    return bool(figures["faults"])


if __name__ == "__main__":
    sys.exit(main())
