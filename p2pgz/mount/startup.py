"""The start of each mounted image: records which chunks are read first, and fetches what earlier starts have read.

Called by `servers` and `mounts`. A recording begins with the first read and ends when nothing new has been read for a while;
a mount that ends before that has started something, too. Whatever goes wrong here costs time, never a read.
"""

from __future__ import annotations

import os
from typing import Any, Final

import structlog
import trio

from p2pgz.core import startup
from p2pgz.core.peerid import PeerId
from p2pgz.core.startup import Recording, Spot
from p2pgz.errors import ImageNotFound, P2pgzError
from p2pgz.fetch.background import prefetch
from p2pgz.fetch.prefetch import Prefetch
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.startup import StartUpLists
from p2pgz.image.opened import OpenImage
from p2pgz.image.startup import chunk_counts, paths_of, spots_of, wanted
from p2pgz.pool.pool import Pool, Segment

log = structlog.get_logger(component="mount")

# When peers are asked for their lists after a mount: those that are connected later, too
ASK_AFTER_SECONDS: Final = (0.0, 0.2, 0.5, 1.0, 2.0)
# A mount's end, and the node's, wait this long for the recording to be written
SAVE_SECONDS: Final = 2.0


def _is_complete(segment: Segment) -> bool:
    return segment.presence.present_count() == segment.table.chunk_count


class StartUps:
    """What the starts of all mounts share. `lists` None: nothing is recorded, and only the authors' own marks are heeded."""

    def __init__(self, fetcher: ChunkFetcher, pool: Pool, lists: StartUpLists | None) -> None:
        self.fetcher = fetcher
        self.pool = pool
        self.lists = lists

    def begin(self, image: OpenImage, *, record: bool) -> ImageStartUp:
        """For a new mount, or with `record` false for one that has been there for a while."""
        return ImageStartUp(self, image, record=record)


class ImageStartUp:
    """The start of one mounted image."""

    def __init__(self, shared: StartUps, image: OpenImage, *, record: bool) -> None:
        self._lists = shared.lists if image.layers else None
        self._fetcher = shared.fetcher
        self._pool = shared.pool
        self._image = image
        self._recording = Recording() if record and self._lists is not None else None
        self._prefetch = Prefetch(shared.fetcher)
        self._noted = trio.Event()
        self._recordings = self._peer_lists = 0
        self._read_chunks = self._hit_chunks = 0
        self._over = False

    @property
    def records(self) -> bool:
        """Whether the reads of its `fs` process are wanted."""
        return self._recording is not None

    def observe(self, segment: int, first: int, count: int) -> bool:
        """Chunks are read for the first time; false when enough was heard."""
        if self._recording is None:
            return False
        new = self._recording.note(segment, first, count, trio.current_time())
        self._read_chunks += len(new)
        names, layer = self._prefetch.names, self._image.segments[segment]
        self._hit_chunks += sum(names(layer, n) for n in new)
        self._noted.set()
        return not self._recording.full

    async def run(self) -> None:
        """As long as the mount is there; cancelled at its end. An aid only: no fault of it may end the mount."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fetch)
                await self._record()
        except Exception:
            log.exception("startup.failed", reference=self._image.reference)
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    # --- fetching

    async def _fetch(self) -> None:
        lists, image = self._lists, self._image
        if lists is None:
            await self._fetch_marked()
            return
        known = lists.known(image.digest, image.layers[0].domain)
        self._recordings = known.recordings
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch_own, known.spots)
            nursery.start_soon(self._fetch_from_peers_lists, lists)

    async def _fetch_own(self, spots: list[Spot]) -> None:
        if spots:
            await self._prefetch.run(wanted(self._image, spots, self._pool))
        else:
            await self._fetch_marked()

    async def _fetch_marked(self) -> None:
        """What the image's author put first; what was seen on this host says more."""
        for segment, end in self._image.prefetch:
            await prefetch(self._fetcher, segment, end)

    async def _fetch_from_peers_lists(self, lists: StartUpLists) -> None:
        """All that peers say, as soon as they say it; those that are connected later come behind."""
        origin = self._fetcher.origin(self._image.layers[0])
        if origin is None or not origin.peers or all(map(_is_complete, self._image.segments)):
            return
        counts = chunk_counts(self._image)
        asked: set[PeerId] = set()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for after in ASK_AFTER_SECONDS:
                await trio.sleep_until(began + after)
                found = await lists.ask(self._image.digest, origin.secret, counts, asked)
                self._peer_lists += len(found)
                spots = startup.agreed(found, counts)
                if spots:
                    nursery.start_soon(self._prefetch.run, wanted(self._image, spots, self._pool))

    # --- recording

    async def _record(self) -> None:
        """Until the image has started; saves what was read."""
        recording = self._recording
        if recording is None:
            return
        while (ends_at := recording.ends_at()) is None or trio.current_time() < ends_at:
            if recording.full:
                break
            self._noted = trio.Event()
            with trio.move_on_at(float("inf") if ends_at is None else ends_at):
                await self._noted.wait()
        await self._save()

    async def _save(self) -> None:
        """Once, whatever comes; what cannot be written in time the next mount records again."""
        recording, lists, image = self._recording, self._lists, self._image
        was_over, self._over = self._over, True
        self._recording = None  # a mount may last for months
        self._prefetch.close()
        if was_over or recording is None or lists is None or not recording.read:
            return
        with trio.CancelScope(deadline=trio.current_time() + SAVE_SECONDS, shield=True):
            try:
                spots = await trio.to_thread.run_sync(spots_of, image, list(recording.read))
                await lists.add(image.digest, image.layers[0].domain, spots)
            except P2pgzError as error:  # a full disk
                log.warning("startup.not_kept", reference=image.reference, reason=str(error))
                return
            self._recordings = lists.known(image.digest, image.layers[0].domain).recordings
            log.info(
                "startup.recorded",
                reference=image.reference,
                chunks=len(spots),
                listed=self._hit_chunks,
                prefetched_bytes=self._prefetch.bytes,
            )

    async def files(self) -> dict[str, Any]:
        """The files that start the image, as this host or its peers have seen it; raises ImageNotFound when nobody has."""
        lists, image = self._lists, self._image
        spots: list[Spot] = []
        if lists is not None:
            known = lists.known(image.digest, image.layers[0].domain)
            self._recordings, spots = known.recordings, known.spots
            origin = self._fetcher.origin(image.layers[0])
            if not spots and origin is not None and origin.peers:
                counts = chunk_counts(image)
                found = await lists.ask(image.digest, origin.secret, counts, set())
                self._peer_lists = len(found)
                spots = startup.agreed(found, counts)
        paths = await trio.to_thread.run_sync(paths_of, image, spots)
        if not paths:
            raise ImageNotFound(
                f"{image.reference}: nothing is known of how it starts",
                hint="mount it, start in it what it is for, wait ten seconds, and unmount it"
                if lists is not None or not image.layers
                else "fetch.startup_list is off, so nothing is recorded",
            )
        return {
            "reference": image.reference,
            "digest": str(image.digest),
            "recordings": self._recordings,
            "peer_lists": self._peer_lists,
            "chunks": len(spots),
            "paths": [os.fsdecode(path) for path in paths],
        }

    def status(self) -> dict[str, Any]:
        """What `p2pgz status` says of the start of a mount."""
        if self._lists is None:
            state = "off"
        elif self._recording is None:
            state = "over"
        else:
            state = "recording" if self._read_chunks else "waiting"
        return {
            "state": state,
            "recordings": self._recordings,
            "peer_lists": self._peer_lists,
            "listed_chunks": self._prefetch.listed_chunks,
            "listed_bytes": self._prefetch.listed_bytes,
            "prefetched_chunks": self._prefetch.chunks,
            "prefetched_bytes": self._prefetch.bytes,
            "read_chunks": self._read_chunks,
            "hit_chunks": self._hit_chunks,
        }
