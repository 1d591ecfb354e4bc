"""What of an image would be lost if its registry were gone now: `web.drills.Drills`.

Made by `node.run`. It goes by the bitmaps of the peers that this node is connected to, after a look for more of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import PeerSource
from p2pgz.core.schedule import Priority
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.image.opened import OpenImage
from p2pgz.pool.segment import Segment
from p2pgz.web.api import MountRequest
from p2pgz.web.drills import DrillRequest
from p2pgz.web.streaming import Progress

# All layers together; a walk through the DHT takes a second or two
SEARCH_SECONDS: Final = 5.0
# Bitmaps come within a round trip of JOIN
BITMAPS_SECONDS: Final = 0.5
STEP_CHUNKS: Final = 256

Open = Callable[[MountRequest, Progress], Awaitable[OpenImage]]


class Drills:
    """Asks about images. `peers` is None where there are none."""

    def __init__(self, fetcher: ChunkFetcher, open_image: Open, peers: PeerSource | None) -> None:
        self._fetcher = fetcher
        self._open = open_image
        self._peers = peers

    async def drill(self, request: DrillRequest, progress: Progress) -> dict[str, Any]:
        """Count the chunks by how many nodes have them; with `fix` fetch those that none has."""
        fields: dict[str, Any] = msgspec.to_builtins(request)
        fix = bool(fields.pop("fix"))
        image = await self._open(MountRequest(**fields), progress)
        await self._look(image)
        found = {"chunks": 0, "here_chunks": 0, "once_chunks": 0, "lost_chunks": 0, "lost_bytes": 0}
        fixed = 0
        for segment in image.all_segments:
            lost = await self._count(segment, found)
            for at in range(0, len(lost) if fix else 0, STEP_CHUNKS):
                step = lost[at : at + STEP_CHUNKS]
                await self._fetcher.ensure_chunks(segment, step, Priority.START_UP)
                fixed += len(step)
                await progress(
                    {"event": "progress", "text": f"fetched {fixed} chunks that nobody had", "done": fixed}
                )
        return {
            "reference": image.reference,
            "digest": str(image.digest),
            "peers": self._holders(image),
            **found,
            "fixed_chunks": fixed,
            "warnings": image.warnings,
        }

    async def _look(self, image: OpenImage) -> None:
        peers = self._peers
        if peers is None:
            return
        with trio.move_on_after(SEARCH_SECONDS):
            async with trio.open_nursery() as nursery:
                for segment in image.all_segments:
                    nursery.start_soon(peers.search, segment.id.raw)
        await trio.sleep(BITMAPS_SECONDS)

    async def _count(self, segment: Segment, found: dict[str, int]) -> list[int]:
        """Add a segment's chunks to the counts; those that nobody has."""
        copies = self._fetcher.copies(segment) or (lambda n: 0)
        lost = []
        for n in range(segment.table.chunk_count):
            if n % STEP_CHUNKS == 0:
                await trio.lowlevel.checkpoint()
            here = segment.presence.has(n)
            count = here + copies(n)
            found["chunks"] += 1
            found["here_chunks"] += here
            found["once_chunks"] += count == 1
            if count == 0:
                lost.append(n)
                found["lost_chunks"] += 1
                found["lost_bytes"] += segment.table.size[n]
        return lost

    def _holders(self, image: OpenImage) -> int:
        """How many peers have anything of it."""
        peers: set[PeerId] = set()
        for segment in image.all_segments:
            origin = self._fetcher.origin(segment)
            if origin is not None:
                peers.update(holder.peer for holder in self._fetcher.holders(origin))
        return len(peers)
