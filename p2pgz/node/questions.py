"""What people ask a node about bytes: who provides these, where did those come from. `web.questions.Questions`.

Made by `node.run`. Looks and asks, changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Any, Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.errors import ImageInvalid, ImageNotFound, UsageError
from p2pgz.fetch.find import find
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.why import Why, is_complete
from p2pgz.image.treefile import Extent, TreeFile
from p2pgz.mount.mounts import Mounts
from p2pgz.node.peering import Peering
from p2pgz.web.questions import FindRequest, WhyRequest
from p2pgz.web.streaming import Progress

FIND_SECONDS_MAX: Final = 600.0
# some microseconds each
NAMES_BETWEEN_CHECKPOINTS: Final = 500


class Questions:
    """The answers of one node. `peering` is None where it has no peers."""

    def __init__(
        self, fetcher: ChunkFetcher, mounts: Mounts, peering: Peering | None, *, has_dht: bool
    ) -> None:
        self._fetcher = fetcher
        self._mounts = mounts
        self._peering = peering
        self._has_dht = has_dht

    async def find(self, request: FindRequest, progress: Progress) -> dict[str, Any]:
        """Each provider as an event, then how many there are."""
        try:
            digest = Digest.parse_any(request.digest)
        except ImageInvalid as error:
            raise UsageError(
                error.what, hint="write sha256:…, its 64 hexadecimal digits, or a CID such as bafkrei…"
            ) from None
        if not 0 < request.timeout_seconds <= FIND_SECONDS_MAX:
            raise UsageError(
                f"a time-out of {request.timeout_seconds:g} s", hint=f"up to {FIND_SECONDS_MAX:g} s"
            )
        peering = self._peering
        if peering is None:
            raise ImageNotFound(
                f"{digest}: this node has no peers", hint="peers.enabled says whether it is to have some"
            )

        async def told(provider: dict[str, Any]) -> None:
            await progress({"event": "provider", **provider})

        return await find(
            peering.discovery,
            digest,
            own=Contact(peering.peer_id.raw, tuple(address.to_bytes() for address in peering.own.current)),
            seconds=request.timeout_seconds,
            has_dht=self._has_dht,
            told=told,
        )

    async def why(self, request: WhyRequest, progress: Progress) -> dict[str, Any]:
        """A file's chunks as events, some at a time, then a summary; of a directory only the summary."""
        directory = self._mount_of(request.path)
        image = self._mounts.image_at(directory)
        inside = os.fsencode(request.path)[len(os.fsencode(directory.rstrip("/"))) :] or b"/"
        ino = image.tree.walk(inside)
        is_directory = stat.S_ISDIR(image.tree.inode(ino).mode)
        why = Why(self._fetcher)
        files = 0
        async for extent in _extents(image.tree, ino):
            files += 1
            for batch in why.batches(image.segments[extent.segment], extent.first_chunk, extent.chunk_count):
                if not is_directory:
                    await progress({"event": "chunks", "chunks": batch})
                await trio.lowlevel.checkpoint()
        return {
            "path": request.path,
            "mount": directory,
            "reference": image.reference,
            "digest": str(image.digest),
            "bytes": None if is_directory else image.tree.inode(ino).size,
            "files": files,
            "summary": why.summary,
            "complete": is_complete(why.summary),
        }

    def _mount_of(self, path: str) -> str:
        """The directory of the mount that a path is in."""
        pure = PurePosixPath(path)
        if not pure.is_absolute():
            raise UsageError(f"{path}: not an absolute path")
        for directory in (str(each) for each in (pure, *pure.parents)):
            if self._mounts.has(directory):
                return directory
        raise ImageNotFound(
            f"{path}: is in no image that this node has mounted", hint="`p2pgz status` lists the mounts"
        )


async def _extents(tree: TreeFile, top: int) -> AsyncIterator[Extent]:
    """The bytes of a file, or of all files below a directory, each once."""
    todo = [top]
    seen: set[Extent] = set()
    steps = 0
    while todo:
        ino = todo.pop()
        extent = tree.extent(ino)
        if extent is not None and extent not in seen:
            seen.add(extent)
            yield extent
        for _, child, _ in tree.entries(ino):
            todo.append(child)
        steps += 1
        if steps % NAMES_BETWEEN_CHECKPOINTS == 0:
            await trio.lowlevel.checkpoint()
