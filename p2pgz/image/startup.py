"""An open image and its start-up list: which of its chunks the list means, and which files those are part of.

The tree of an image may refer to segments of other images that hold the same files; which ones is this host's own affair. A
list names chunks by the image's own layers, so it means the same everywhere. Called by `mount.startup` and the node.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from typing import Final

from p2pgz.core.startup import Spot
from p2pgz.image.opened import OpenImage
from p2pgz.image.treefile import ROOT_INO, TreeFile
from p2pgz.pool.pool import Pool, Segment

# As PATH_MAX of Linux; what lies deeper starts nothing
PATH_BYTES_MAX: Final = 4096


def chunk_counts(image: OpenImage) -> dict[bytes, int]:
    """How many chunks each of the image's own layers has."""
    return {layer.id.raw: layer.table.chunk_count for layer in image.layers}


def spots_of(image: OpenImage, read: Iterable[tuple[int, int]]) -> list[Spot]:
    """Chunks by (segment of the tree, number) as ones of the image's own layers. Takes milliseconds: in a thread."""
    own = {layer.id.raw for layer in image.layers}
    by_digest: dict[bytes, Spot] | None = None
    spots: list[Spot] = []
    for index, n in read:
        segment = image.segments[index]
        if segment.id.raw in own:
            spots.append((segment.id.raw, n))
            continue
        if by_digest is None:
            by_digest = {
                layer.table.digest(m): (layer.id.raw, m)
                for layer in reversed(image.layers)
                for m in range(layer.table.chunk_count)
            }
        spot = by_digest.get(segment.table.digest(n))
        if spot is not None:
            spots.append(spot)
    return list(dict.fromkeys(spots))


def wanted(image: OpenImage, spots: Iterable[Spot], pool: Pool) -> list[tuple[Segment, int]]:
    """The chunks of a list that the image has, without those that this host's tree takes from another image's segment."""
    layers = {layer.id.raw: layer for layer in image.layers}
    foreign = {segment for segment in image.segments if segment.id.raw not in layers}
    found: list[tuple[Segment, int]] = []
    for toc, n in spots:
        layer = layers.get(toc)
        if layer is None or n >= layer.table.chunk_count:
            continue
        if foreign and not layer.presence.has(n):
            place = pool.find(layer.domain, layer.table.digest(n))
            if place is not None and place[0] in foreign:
                continue
        found.append((layer, n))
    return found


def paths_of(image: OpenImage, spots: Sequence[Spot]) -> list[bytes]:
    """The files that the chunks of a list are part of, in its order. Walks the whole tree: in a thread."""
    layers = {layer.id.raw: layer for layer in image.layers}
    ranks: dict[bytes, int] = {}
    for rank, (toc, n) in enumerate(spots):
        layer = layers.get(toc)
        if layer is not None and n < layer.table.chunk_count:
            ranks.setdefault(layer.table.digest(n), rank)
    found: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    stack = [(ROOT_INO, b"")]
    while stack and ranks:
        directory, prefix = stack.pop()
        for name, ino, _ in image.tree.entries(directory):
            path = prefix + name
            if stat.S_ISDIR(image.tree.inode(ino).mode):
                if len(path) < PATH_BYTES_MAX:
                    stack.append((ino, path + b"/"))
            elif ino not in seen:
                seen.add(ino)
                first = _first_rank(image.tree, image.segments, ino, ranks)
                if first is not None:
                    found.append((first, path))
    return [path for _, path in sorted(found)]


def _first_rank(tree: TreeFile, segments: Sequence[Segment], ino: int, ranks: dict[bytes, int]) -> int | None:
    extent = tree.extent(ino)
    if extent is None:
        return None
    table = segments[extent.segment].table
    numbers = range(extent.first_chunk, extent.first_chunk + extent.chunk_count)
    return min((ranks[digest] for n in numbers if (digest := table.digest(n)) in ranks), default=None)
