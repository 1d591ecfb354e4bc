"""Reading files of a merged tree: which chunks a read needs, and the bytes once they are there.

Called by `ls`, `cat` and `verify` in the node, and by whoever serves a tree. Knows neither FUSE nor the pool:
chunks are made present and bytes are looked at through two callbacks.
"""

from __future__ import annotations

import mmap
import stat
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, NamedTuple

from p2pgz.core.layout import SegmentTable
from p2pgz.core.schedule import Priority
from p2pgz.errors import ImageNotFound, StateError
from p2pgz.image.treefile import TreeFile

# One step of a sequential read: a request or two at most, little to hold, and progress to show.
STEP_BYTES: Final = 4 << 20

TableFor = Callable[[int], SegmentTable]
"""the table of a segment, by its index in `TreeFile.segments`"""
Ensure = Callable[[int, int, int, Priority], Awaitable[None]]
"""(segment index, first chunk, count, priority): returns when all of them are present and verified, or raises"""
View = Callable[[int, int, int], memoryview]
"""(segment index, segment offset, size): those bytes of the segment, not copied"""


class ReadPlan(NamedTuple):
    """A read in terms of one segment: the bytes, and the chunks that cover them."""

    segment: int
    segment_offset: int
    size: int
    first_chunk: int
    chunk_count: int


def plan_read(tree: TreeFile, table_for: TableFor, ino: int, offset: int, size: int) -> ReadPlan | None:
    """What a read of a regular file needs, cut at the end of the file; None if that is nothing."""
    size = min(size, tree.inode(ino).size - offset)
    extent = tree.extent(ino)
    if extent is None or size <= 0 or offset < 0:
        return None
    table = table_for(extent.segment)
    first, end = extent.first_chunk, extent.first_chunk + extent.chunk_count
    start = extent.segment_offset + offset
    if end > table.chunk_count or start + size > table.segment_bytes:
        raise StateError(
            f"inode {ino} of a tree refers to what segment {table.id} does not have",
            hint="delete the tree file; it is built again from the image's TOCs",
        )
    # chunks of a file lie in order, without holes between them
    low = bisect_right(table.segment_offset, start, first, end) - 1
    high = bisect_left(table.segment_offset, start + size, first, end)
    return ReadPlan(extent.segment, start, size, max(low, first), high - max(low, first))


def patched(piece: memoryview, start: int, table: SegmentTable, unkept: dict[int, bytes]) -> bytes:
    """Bytes of a segment from `start` on, with chunks put in that are not in its file."""
    if isinstance(piece.obj, mmap.mmap) and piece.obj.size() < start + len(piece):
        raise ValueError("the segment's file was cut short")  # touching it would be the end of this process
    answer = bytearray(piece)
    for n, data in unkept.items():
        at = table.segment_offset[n] - start
        low, high = max(0, at), min(len(answer), at + len(data))
        if low < high and len(data) == table.size[n]:
            answer[low:high] = data[low - at : high - at]
    return bytes(answer)


async def read_file(
    tree: TreeFile,
    table_for: TableFor,
    ino: int,
    offset: int,
    size: int,
    ensure: Ensure,
    view: View,
    *,
    priority: Priority = Priority.BLOCKED_READ,
) -> memoryview:
    """Up to `size` bytes of a regular file at `offset`; fewer only at the end of the file."""
    plan = plan_read(tree, table_for, ino, offset, size)
    if plan is None:
        return memoryview(b"")
    await ensure(plan.segment, plan.first_chunk, plan.chunk_count, priority)
    return view(plan.segment, plan.segment_offset, plan.size)


async def read_whole(
    tree: TreeFile,
    table_for: TableFor,
    ino: int,
    ensure: Ensure,
    view: View,
    *,
    priority: Priority = Priority.BLOCKED_READ,
) -> AsyncIterator[memoryview]:
    """All bytes of a regular file, in steps of a few MiB. Raises ImageNotFound for what has no bytes to read."""
    inode = tree.inode(ino)
    if not stat.S_ISREG(inode.mode):
        raise ImageNotFound(f"inode {ino} is not a regular file")
    for offset in range(0, inode.size, STEP_BYTES):
        yield await read_file(tree, table_for, ino, offset, STEP_BYTES, ensure, view, priority=priority)
