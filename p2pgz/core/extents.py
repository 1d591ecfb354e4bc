"""Extents: the runs of adjacent compressed chunks that leases are about. A pure function of the TOC: all nodes agree.

A chunk is too small for a lease (the median is 8 KB: thousands of questions, and no adjacent ones in one request), a
layer too large (one node would fetch all of it). docs/reference/wire.md, "Leases".
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from p2pgz.core.schedule import BlobOrder

# An extent is closed once it has this many compressed bytes: 80 ms at 100 Mbit/s, several round trips to a registry
EXTENT_BYTES: Final = 1 << 20
# and never grows beyond this by the next chunk, unless that chunk alone does
EXTENT_MAX_BYTES: Final = 4 << 20


class Extents:
    """The extents of one layer. `of[n]` is the extent of chunk n; `chunks(e)` are those of an extent, in blob order."""

    __slots__ = ("_order", "_starts", "of")

    def __init__(self, order: BlobOrder, blob_offset: Sequence[int], blob_end: Sequence[int]) -> None:
        self._order = order.chunk_at
        self._starts: list[int] = []  # ranks where extents start
        self.of = array("I", bytes(4 * len(self._order)))
        start = end = 0
        for rank, n in enumerate(self._order):
            same_member = rank > 0 and blob_offset[n] == blob_offset[self._order[rank - 1]]
            full = end - start >= EXTENT_BYTES or max(end, blob_end[n]) - start > EXTENT_MAX_BYTES
            if rank == 0 or (full and not same_member):
                self._starts.append(rank)
                start = end = blob_offset[n]
            end = max(end, blob_end[n])
            self.of[n] = len(self._starts) - 1

    def __len__(self) -> int:
        return len(self._starts)

    def chunks(self, extent: int) -> Sequence[int]:
        """The chunks of an extent."""
        first = self._starts[extent]
        behind = self._starts[extent + 1] if extent + 1 < len(self._starts) else len(self._order)
        return self._order[first:behind]
