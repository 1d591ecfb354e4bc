"""The maps of sparse files in tar archives: where the stored bytes belong, and what is a hole.

For `core.tar` only. Four notations: the blocks of GNU's type S, and PAX records of GNU.sparse 0.0, 0.1 and
1.0 (in the payload). A map that overlaps, goes backwards or disagrees with the stored size raises
ImageInvalid: a guess would put bytes at the wrong place. GNU tar manual, "Sparse Formats".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from p2pgz.core.tarfields import number
from p2pgz.errors import ImageInvalid

if TYPE_CHECKING:
    from p2pgz.core.tar import Header

MAX_SPARSE_RUNS = (
    200_000  # Go's archive/tar ends near 40 000 (1 MiB of text); a map in memory takes 100 bytes a run
)
_GNU_RUN_BYTES = 24
_GNU_NUMBER_BYTES = 12
_BLOCK_BYTES = 512
_GNU_EXTENSION_FLAG = 504  # byte of an extension block: whether another follows


def _bad(what: str) -> ImageInvalid:
    return ImageInvalid(f"tar stream: a sparse file {what}", hint="the layer is damaged or not a tar archive")


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise _bad("has a map that is not made of numbers")
    return int(text)


def _gnu_number(field: bytes) -> int:
    try:
        value = number(field)
    except ValueError:
        raise _bad("has a map that is not made of numbers") from None
    if value < 0:
        raise _bad("has a map with negative numbers")
    return value


class SparseFile:
    """A sparse file whose map is being collected. `header.size` is its real size, `stored_bytes` what the
    archive holds.
    """

    def __init__(self, *, header: Header, stored_bytes: int) -> None:
        self.header = header
        self.stored_bytes = stored_bytes
        self._runs: list[tuple[int, int]] = []
        self._blocks: list[bytes] = []
        self._text: bytearray | None = None  # PAX 1.0: the map so far
        self._lines = 0
        self._lines_wanted = 0

    def add_gnu_header(self, block: bytes) -> bool:
        """Take what a type S header says; false when extension blocks follow."""
        self.header.size = _gnu_number(block[483:495])
        return self.add_gnu(block[386:482], more=block[482] != 0)

    def add_gnu(self, field: bytes, *, more: bool) -> bool:
        """Take the runs of a header or an extension block; true when that was the last."""
        for at in range(0, len(field), _GNU_RUN_BYTES):
            offset = _gnu_number(field[at : at + _GNU_NUMBER_BYTES])
            size = _gnu_number(field[at + _GNU_NUMBER_BYTES : at + _GNU_RUN_BYTES])
            if size or offset:
                self._add(offset, size)
        return not more

    def add_records(self, records: dict[bytes, bytes], runs: Sequence[bytes]) -> bool:
        """Take what PAX records say; false when the map is in the payload (1.0)."""
        self.header.name = records.get(b"GNU.sparse.name") or self.header.name
        if b"\0" in self.header.name:
            raise _bad("has a name with a NUL byte")
        size = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size", b""))
        self.header.size = _decimal(size)
        version = (records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0"))
        if version == (b"1", b"0"):
            self._text = bytearray()
            if self.stored_bytes < _BLOCK_BYTES:
                raise _bad("has no map")
            return False
        if version[0] != b"0":
            raise _bad("is of an unknown version")
        if b"GNU.sparse.map" in records:
            text = records[b"GNU.sparse.map"]
            runs = text.split(b",") if text else []
        if len(runs) % 2:
            raise _bad("has a map of odd length")
        for index in range(0, len(runs), 2):
            self._add(_decimal(runs[index]), _decimal(runs[index + 1]))
        return True

    def add_block(self, block: bytes) -> bool:
        """Take one more block of the map; true when it is complete. It counts to the entry's headers."""
        self._blocks.append(block)
        if self._text is None:
            return self.add_gnu(block[:_GNU_EXTENSION_FLAG], more=block[_GNU_EXTENSION_FLAG] != 0)
        self.stored_bytes -= _BLOCK_BYTES
        self._text += block
        self._lines += block.count(b"\n")
        if not self._lines_wanted and self._lines:
            count = _decimal(bytes(self._text[: self._text.index(b"\n")]))
            if count > MAX_SPARSE_RUNS:
                raise _bad(f"has more than {MAX_SPARSE_RUNS} runs")
            self._lines_wanted = 1 + 2 * count
        if self._lines_wanted and self._lines >= self._lines_wanted:
            numbers = self._text.split(b"\n", self._lines_wanted)
            for index in range(1, self._lines_wanted, 2):
                self._add(_decimal(bytes(numbers[index])), _decimal(bytes(numbers[index + 1])))
            return True
        if self.stored_bytes < _BLOCK_BYTES or not self._lines:
            raise _bad("has a map that is cut short")
        return False

    def _add(self, offset: int, size: int) -> None:
        self._runs.append((offset, size))
        if len(self._runs) > MAX_SPARSE_RUNS:
            raise _bad(f"has more than {MAX_SPARSE_RUNS} runs")

    def steps(self) -> Iterator[tuple[bool, int]]:
        """(is a hole, size) for the whole file, in order, none of them empty; completes `header`."""
        self.header.raw += b"".join(self._blocks)
        steps: list[tuple[bool, int]] = []
        at = stored = 0
        for offset, size in self._runs:
            if offset < at:
                raise _bad("has a map that overlaps itself")
            if size:
                if offset > at:
                    steps.append((True, offset - at))
                steps.append((False, size))
                stored += size
                at = offset + size
        if at > self.header.size or stored != self.stored_bytes:
            raise _bad("has a map that disagrees with its size")
        if at < self.header.size:
            steps.append((True, self.header.size - at))
        return iter(steps)
