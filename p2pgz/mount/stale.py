"""Which parts of which files lie in chunks that turned out wrong: what the kernel has to forget. For `fs`, in a thread.

It happens when a disk fails, so it is a pass over all inodes, some 2 us each, and no index is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from p2pgz.core.layout import SegmentTable
from p2pgz.image.treefile import TreeFile


class ChunkRun(NamedTuple):
    """Chunks in a row; `segment` counts in the order of the tree."""

    segment: int
    first: int
    chunks: int


def ranges_of(
    tree: TreeFile, tables: Sequence[SegmentTable], runs: Sequence[ChunkRun]
) -> list[tuple[int, int, int]]:
    """(inode, offset, bytes) of every file that has bytes in these chunks."""
    return list(_ranges(tree, tables, runs))


def _ranges(
    tree: TreeFile, tables: Sequence[SegmentTable], runs: Sequence[ChunkRun]
) -> Iterator[tuple[int, int, int]]:
    for ino in range(1, tree.inode_count + 1):
        extent = tree.extent(ino)
        if extent is None:
            continue
        table = tables[extent.segment]
        for segment, first, chunks in runs:
            low = max(first, extent.first_chunk)
            high = min(first + chunks, extent.first_chunk + extent.chunk_count, table.chunk_count)
            if segment != extent.segment or low >= high:
                continue
            start = table.segment_offset[low]
            yield (
                ino,
                start - extent.segment_offset,
                table.segment_offset[high - 1] + table.size[high - 1] - start,
            )
