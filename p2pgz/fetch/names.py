"""Which of the followed segments have a chunk of this digest: a table for questions from the DHT, small and quick.

Kept by `fetch.holdings`. A hash table of our own making, since a dict would take ten times the memory: 12 bytes a chunk
(a part of the digest, the segment's number, the chunk's), in buckets that are searched as bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentTable

# by 12 bits of the digest; with a million chunks a bucket has 3 KB, searched in a microsecond
_BUCKETS: Final = 1 << 12
_ENTRY: Final = struct.Struct("<4sII")
_NAME: Final = slice(2, 6)
# An empty or common file is in every image: these are enough to find holders
PLACES_MAX: Final = 16
# between two steps of `add`: half a millisecond
STEP_CHUNKS: Final = 500
# what is left of segments that are gone may take up to so many entries, or half of the table
STALE_MIN: Final = 20_000


class Place(NamedTuple):
    """Chunk n of a segment."""

    segment: Digest
    n: int


class ChunkNames:
    """The chunks of some segments by digest."""

    def __init__(self) -> None:
        self._buckets: dict[int, bytearray] = {}
        self._tables: dict[int, SegmentTable] = {}
        self._numbers: dict[Digest, int] = {}
        self._next = 0
        self._entries = 0
        self._stale = 0

    def __contains__(self, segment: Digest) -> bool:
        return segment in self._numbers

    def __iter__(self) -> Iterator[Digest]:
        return iter(tuple(self._numbers))

    @property
    def wants_rebuilding(self) -> bool:
        """Whether most of the table is about segments that are gone."""
        return self._stale > max(STALE_MIN, self._entries // 2)

    def add(self, table: SegmentTable) -> Iterator[None]:
        """Take a segment in; in steps, so that the caller can let others run between them."""
        self._next += 1
        number = self._next
        self._numbers[table.id] = number
        self._tables[number] = table
        for n in range(table.chunk_count):
            digest = table.digest(n)
            bucket = self._buckets.setdefault(_bucket(digest), bytearray())
            bucket += _ENTRY.pack(digest[_NAME], number, n)
            self._entries += 1
            if n % STEP_CHUNKS == STEP_CHUNKS - 1:
                yield

    def remove(self, segment: Digest) -> None:
        """Forget a segment; its entries go when the table is built anew."""
        number = self._numbers.pop(segment, None)
        if number is not None:
            self._stale += self._tables.pop(number).chunk_count

    def rebuild(self) -> Iterator[None]:
        """Get rid of what is left of segments that are gone, in steps; meanwhile not all is found."""
        tables = list(self._tables.values())
        self._buckets, self._tables, self._numbers = {}, {}, {}
        self._entries = self._stale = 0
        for table in tables:
            yield from self.add(table)

    def find(self, digest: bytes) -> list[Place]:
        """The places of a chunk, not all of them if there are many."""
        bucket = self._buckets.get(_bucket(digest))
        found: list[Place] = []
        if bucket is None:
            return found
        name = digest[_NAME]
        at = bucket.find(name)
        while at >= 0 and len(found) < PLACES_MAX:
            if at % _ENTRY.size:
                at = bucket.find(name, at + 1)
                continue
            _, number, n = _ENTRY.unpack_from(bucket, at)
            table = self._tables.get(number)
            if table is not None and table.digest(n) == digest:
                found.append(Place(table.id, n))
            at = bucket.find(name, at + _ENTRY.size)
        return found


def _bucket(digest: bytes) -> int:
    return (digest[0] << 8 | digest[1]) % _BUCKETS
