"""Which chunks of a segment may be read: one bit each, in TOC order, in memory that processes share.

The node creates it and is its only writer; `fs` and the holder attach by descriptor and only look. A set bit
means that the chunk's bytes are in the segment file and were *verified in this boot* (design, section 3).
The same bytes are the bitmap that peers exchange: bit n is bit `n % 8`, least significant first, of
byte `n // 8`; bits past the last chunk are zero.

Memory order: the writer sets a bit after the pwrite that put the bytes in the page cache has returned, and
readers learn of it by the bit or by a message sent later, so a set bit never runs ahead of its bytes. This
module must not import apsw or trio.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import ClassVar

from p2pgz.errors import StateError

# A layer has some hundred thousand chunks at most; the TOC parser's own limit is far below. 16 MiB of bits
MAX_CHUNKS = 1 << 27
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# all bits of a byte from bit `i` on, and all before bit `i`
_FROM = tuple((0xFF << i) & 0xFF for i in range(8))
_BEFORE = tuple((1 << i) - 1 for i in range(8))


class Presence:
    """A fixed number of bits in a memfd. Made by `create()`, `attach()`, or, for one process, `private()`."""

    __slots__ = ("_bits", "_map", "_writable", "bitmap_bytes", "count", "fd")

    changes: ClassVar[int] = 0
    """grows whenever this process changes a bit of any bitmap, makes one or closes one"""

    def __init__(self, fd: int, count: int, *, writable: bool) -> None:
        self.fd = fd
        self.count = count
        self.bitmap_bytes = (count + 7) // 8
        self._writable = writable
        Presence.changes += 1
        self._map: mmap.mmap | None = None
        if fd < 0:
            self._bits = memoryview(bytearray(self.bitmap_bytes))
            return
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, max(1, self.bitmap_bytes), mmap.MAP_SHARED, protection)
        self._bits = memoryview(self._map)

    @classmethod
    def create(cls, count: int) -> Presence:
        """An empty bitmap in a new memfd; its size is sealed so that no reader can meet SIGBUS."""
        if not 0 <= count <= MAX_CHUNKS:
            raise ValueError(f"a presence bitmap has 0 to {MAX_CHUNKS} bits, not {count}")
        fd = os.memfd_create("p2pgz-presence", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, max(1, (count + 7) // 8))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, count, writable=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def private(cls, count: int) -> Presence:
        """An empty bitmap in this process's own memory; `fd` is -1."""
        return cls(-1, count, writable=True)

    @classmethod
    def attach(cls, fd: int, count: int) -> Presence:
        """The read side in another process; owns `fd` from now on. Raises StateError when it is too small."""
        size = os.fstat(fd).st_size
        if not 0 <= count <= MAX_CHUNKS or size < (count + 7) // 8:
            raise StateError(f"a presence bitmap of {size} bytes cannot hold {count} chunks")
        return cls(fd, count, writable=False)

    def has(self, n: int) -> bool:
        """Whether chunk `n` may be read."""
        if not 0 <= n < self.count:
            raise IndexError(f"chunk {n} of {self.count}")
        return bool(self._bits[n >> 3] >> (n & 7) & 1)

    def has_range(self, first: int, count: int) -> bool:
        """Whether all of `count` chunks from `first` on may be read; true for none."""
        if first < 0 or count < 0 or first + count > self.count:
            raise IndexError(f"chunks {first}+{count} of {self.count}")
        if count == 0:
            return True
        bits, end = self._bits, first + count
        low, high = first >> 3, end >> 3
        if low == high:
            mask = _FROM[first & 7] & _BEFORE[end & 7]
            return bits[low] & mask == mask
        mask = _FROM[first & 7]
        if bits[low] & mask != mask:
            return False
        mask = _BEFORE[end & 7]
        if mask and bits[high] & mask != mask:
            return False
        return bits[low + 1 : high] == b"\xff" * (high - low - 1)

    def missing(self, first: int, count: int) -> list[int]:
        """The chunks among `count` from `first` on that may not be read, ascending."""
        if self.has_range(first, count):
            return []
        bits = self._bits
        return [n for n in range(first, first + count) if not bits[n >> 3] >> (n & 7) & 1]

    def set(self, n: int) -> None:
        """Chunk `n` may be read from now on."""
        self._check(n)
        self._bits[n >> 3] |= 1 << (n & 7)
        Presence.changes += 1

    def clear(self, n: int) -> None:
        """Chunk `n` may not be read from now on; replies already being sent are the caller's concern."""
        self._check(n)
        self._bits[n >> 3] &= ~(1 << (n & 7)) & 0xFF
        Presence.changes += 1

    def set_many(self, chunks: Iterable[int]) -> None:
        """`set()` for each."""
        for n in chunks:
            self.set(n)

    def to_bytes(self) -> bytes:
        """The bitmap as peers and the index keep it."""
        return bytes(self._bits[: self.bitmap_bytes])

    def load(self, bitmap: bytes) -> None:
        """Replace all bits; raises StateError for another length or bits past the last chunk."""
        if not self._writable:
            raise PermissionError("only the node writes a presence bitmap")
        if not is_bitmap(bitmap, self.count):
            raise StateError(f"a bitmap of {len(bitmap)} bytes is not one of {self.count} chunks")
        self._bits[: self.bitmap_bytes] = bitmap
        Presence.changes += 1

    def present_count(self) -> int:
        """How many chunks may be read."""
        return int.from_bytes(self._bits[: self.bitmap_bytes], "little").bit_count()

    def close(self) -> None:
        """Release memory and descriptor; other processes keep theirs. May be called twice."""
        Presence.changes += 1
        if self._map is not None:
            self._bits.release()
            self._map.close()
            self._map = None
            os.close(self.fd)
            self.fd = -1

    def _check(self, n: int) -> None:
        if not self._writable:
            raise PermissionError("only the node writes a presence bitmap")
        if not 0 <= n < self.count:
            raise IndexError(f"chunk {n} of {self.count}")


def is_bitmap(bitmap: bytes, count: int) -> bool:
    """Whether `bitmap` is well-formed for `count` chunks: right length, no bit past the last chunk."""
    if len(bitmap) != (count + 7) // 8:
        return False
    return not (count % 8 and bitmap[-1] & _FROM[count % 8])


def iterate_bits(bitmap: bytes) -> Iterable[int]:
    """The numbers of the set bits, ascending."""
    for index, byte in enumerate(bitmap):
        while byte:
            low = byte & -byte
            yield index * 8 + low.bit_length() - 1
            byte ^= low
