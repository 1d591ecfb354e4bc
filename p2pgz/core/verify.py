"""The only door through which chunk bytes enter p2pgz.

Pool, peers' server and mount accept `VerifiedChunk` and nothing else, and only `verify()` can make one. So no code path can
forget the check (parse, don't validate).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, final

from p2pgz.core.digest import Digest
from p2pgz.errors import ChunkCorrupt

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DOOR: Final = object()


@final
class VerifiedChunk:
    """Chunk bytes whose sha256 is `digest` (32 raw bytes). `data` is not copied and must not change afterwards."""

    __slots__ = ("data", "digest")

    def __init__(self, digest: bytes, data: Buffer, *, door: object) -> None:
        if door is not _DOOR:
            raise TypeError("a VerifiedChunk is made by core.verify.verify() only")
        self.digest = digest
        self.data = data

    def __len__(self) -> int:
        return memoryview(self.data).nbytes


def verify(digest: bytes, data: Buffer, *, source: str) -> VerifiedChunk:
    """Hash `data` and return it as a verified chunk; raises ChunkCorrupt naming `source` when it is something else."""
    found = hashlib.sha256(data).digest()
    if found != digest:
        raise ChunkCorrupt(
            f"{source}: chunk {Digest(digest)} has other bytes: sha256 {found.hex()}",
            hint="the source or its copy is damaged; another source is asked",
        )
    return VerifiedChunk(digest, data, door=_DOOR)
