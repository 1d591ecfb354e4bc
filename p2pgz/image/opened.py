"""An image that can be mounted and read, and the tree file that remembers it under its manifest's digest.

Made by `image.open`; everybody who reads an image has an `OpenImage` in hand.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from p2pgz.core.digest import Digest
from p2pgz.errors import PoolFull, StateError
from p2pgz.image.layer_records import LayerRecord
from p2pgz.image.treefile import TreeFile
from p2pgz.pool.disk import write_durably
from p2pgz.pool.segment import Segment


class ImageRecord(msgspec.Struct, frozen=True):
    """What the tree file remembers about its image, as JSON in its `info`."""

    layers: list[LayerRecord]
    warnings: list[str]


@dataclass(slots=True, kw_only=True, eq=False)
class OpenImage:
    """An image that can be mounted and read: its tree, and the segments that the tree refers to, in its order."""

    reference: str
    digest: Digest
    tree: TreeFile
    tree_path: Path
    segments: list[Segment]
    layers: list[Segment] = field(default_factory=list)
    """those of its own layers whose TOC the manifest vouches for: what may be shared; the tree may refer to others, too"""
    prefetch: list[tuple[Segment, int]] = field(default_factory=list)
    """segments whose author recorded start-up files, and the blob offset where those end"""
    warnings: list[str] = field(default_factory=list)
    stale_since: float | None = None
    """when the tag was last asked for, seconds since 1970, if its registry could not be reached just now"""

    @property
    def staleness(self) -> list[str]:
        """The warning that its tag may mean something else by now; the others were said when it was opened first."""
        return self.warnings[-1:] if self.stale_since is not None else []

    @property
    def all_segments(self) -> list[Segment]:
        """What somebody needs who has the whole image: those of its layers, and those that its tree refers to."""
        return [*self.segments, *(segment for segment in self.layers if segment not in self.segments)]

    @property
    def chunk_bytes(self) -> int:
        """Uncompressed bytes of all chunks."""
        return sum(segment.all_bytes for segment in self.segments)

    @property
    def present_bytes(self) -> int:
        """How many of them are here."""
        return sum(segment.present_bytes() for segment in self.segments)


def write_tree(path: Path, data: bytes) -> None:
    """Write a tree file, whole or not at all. Blocks; raises PoolFull."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, data)
    except OSError as error:
        raise PoolFull(f"{path}: {error.strerror}", hint="free some space in the state directory") from error


def map_tree(path: Path) -> TreeFile:
    """Map a tree file; raises FileNotFoundError when there is none, StateError when it is damaged or of another version."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not os.fstat(descriptor).st_size:
            raise StateError(f"{path} is empty", hint="it is made again")
        return TreeFile(mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ))
    finally:
        os.close(descriptor)
