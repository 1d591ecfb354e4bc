"""One seed as the node knows it: an image that is to be here whole, and how far it is. Used by `node.seeding`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.reference import Reference
from p2pgz.core.seeding import Rate, SeedKey
from p2pgz.errors import P2pgzError
from p2pgz.image.opened import OpenImage
from p2pgz.pool.segment import Segment
from p2pgz.web.seeds import SeedRequest

LOOKING: Final = "looking"
FETCHING: Final = "fetching"
COMPLETE: Final = "complete"
WAITING: Final = "waiting"
"""for a source that is away, or for room"""


@dataclass(slots=True)
class LayerProgress:
    """How much of one layer is here."""

    segment: Segment
    total_bytes: int
    done_bytes: int = 0

    def status(self) -> dict[str, Any]:
        """For progress and status."""
        return {"digest": str(self.segment.id), "bytes": self.total_bytes, "present_bytes": self.done_bytes}


@dataclass(slots=True, eq=False)
class Seed:
    """One image that is to be here whole."""

    key: SeedKey
    reference: Reference
    request: SeedRequest
    origin: str
    follows: bool
    state: str = LOOKING
    digest: Digest | None = None
    stale_since: float | None = None
    layers: list[LayerProgress] = field(default_factory=list)
    error: P2pgzError | None = None
    again_seconds: float = 0.0
    changed: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    warnings: list[str] = field(default_factory=list)

    def becomes(self, state: str) -> None:
        """Note the state and tell those who watch."""
        self.state = state
        self.tell()

    def tell(self) -> None:
        """Something has changed."""
        self.changed.set()
        self.changed = trio.Event()

    @property
    def total_bytes(self) -> int:
        """Uncompressed bytes of its layers."""
        return sum(layer.total_bytes for layer in self.layers)

    @property
    def done_bytes(self) -> int:
        """How many of them are here."""
        return sum(layer.done_bytes for layer in self.layers)

    def status(self) -> dict[str, Any]:
        """A row of `p2pgz seed --list --json`."""
        return {
            "ref": self.key.reference,
            "platform": self.key.platform,
            "digest": None if self.digest is None else str(self.digest),
            "state": self.state,
            "origin": self.origin,
            "watch": self.follows,
            "bytes": self.total_bytes,
            "present_bytes": self.done_bytes,
            "layers": [layer.status() for layer in self.layers],
            "stale_since": self.stale_since,
            "error": None if self.error is None else str(self.error),
        }


def whole_segments(image: OpenImage) -> Iterator[Segment]:
    """What is fetched whole: its own layers. The tree may refer to files of other images' layers, which are complete."""
    own = image.layers or image.segments
    yield from own
    domains = {segment.domain for segment in own}
    # layers that nothing vouches for are in domains of their own
    yield from (segment for segment in image.segments if segment.domain not in domains)


def is_whole(segment: Segment) -> bool:
    """Whether all of its chunks are here and verified."""
    return segment.presence.present_count() == segment.table.chunk_count


def measured(segments: list[Segment]) -> list[LayerProgress]:
    """In a worker thread: a large layer has a hundred thousand chunks."""
    return [
        LayerProgress(
            segment,
            segment.all_bytes,
            segment.present_bytes(),
        )
        for segment in segments
    ]


def progress_event(seed: Seed, rate: Rate, done_layers: set[Digest]) -> dict[str, Any]:
    """What a command shows; layers that have become complete are told once."""
    done, total = seed.done_bytes, seed.total_bytes
    bytes_per_second = rate.sample(trio.current_time(), done)
    complete = [layer for layer in seed.layers if layer.done_bytes >= layer.total_bytes]
    new = [layer for layer in complete if layer.segment.id not in done_layers]
    done_layers.update(layer.segment.id for layer in new)
    text = (
        f"{seed.key.reference}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {bytes_per_second / 1e6:.1f} MB/s, "
        f"{len(complete)} of {len(seed.layers)} layers"
    )
    if seed.state == WAITING:
        text = f"{seed.key.reference}: {seed.error}; again in {seed.again_seconds:.0f} s"
    return {
        "event": "progress",
        "text": text,
        "state": seed.state,
        "done": done,
        "total": total,
        "bytes_per_second": bytes_per_second,
        "layers_done": len(complete),
        "layers": len(seed.layers),
        "new_layers": [layer.status() for layer in new],
    }
