"""tar-split: the tar stream of a layer without its files' bytes, so that the stream can be put together again from files.

Written by `containers_writer`, read by podman's storage library, which gives a layer's stream back bit for bit from
what it staged. A line of JSON for each run of header bytes and each file, in the order of the stream; headers of one
entry, and the padding of the one before, are one run. Files carry a CRC-64. Format: tar-split's `tar/storage`.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode

import zstandard

from p2pgz.core.digest import Digest

_CRC_ONES = (1 << 64) - 1
_BATCH_BYTES = 1 << 18  # lines that go to the compressor at once


def crc64(data: bytes, crc: int = 0) -> int:
    """CRC-64 of ISO 3309 (Go's crc64.ISO) of `data`, after bytes whose CRC is `crc`.

    Python has no such function, and a loop over bytes makes 10 MB/s. But the polynomial, x^64 + x^4 + x^3 + x + 1, is
    sparse, and squaring keeps it so: x^(64q) = x^(4q) + x^(3q) + x^q + 1 for every power of two q. So the message, one large
    number with its highest power in bit 0, is folded upon itself with shifts until 64 bits are left: 250 MB/s.
    """
    value = int.from_bytes(data, "little") ^ crc ^ _CRC_ONES
    bits = 8 * len(data) + 64
    while bits > 64:
        power = 1 << (bits // 64).bit_length() - 1  # the largest q with 64q < bits
        if 64 * power == bits:
            power >>= 1
        width = 64 * power
        # The terms of what is folded away must land behind it, hence at most 60q bits at a time
        folded = min(bits - width, width - 4 * power)
        high = value & (1 << folded) - 1
        high ^= high << power ^ high << 3 * power ^ high << 4 * power
        value = value >> folded ^ high << width - 4 * power - folded
        bits -= folded
    return value ^ _CRC_ONES


class TarSplit:
    """Takes the stream in order: `segment` for header bytes and padding, `file` for each entry behind its headers."""

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level).compressobj()
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._packed: list[bytes] = []
        self._position = 0
        self.raw_bytes = 0

    def segment(self, data: bytes) -> None:
        """Bytes of the stream that are no file's."""
        self._add(b'{"type":2,"payload":"%b","position":%d}\n' % (b64encode(data), self._position))

    def file(self, name: str, size: int, crc: int) -> None:
        """An entry; directories and links have one, too. `crc` is of no matter where `size` is 0."""
        fields = json.dumps(name, ensure_ascii=False).encode()
        if size:
            checksum = b64encode(crc.to_bytes(8, "big"))
            line = b'{"type":1,"name":%b,"size":%d,"payload":"%b","position":%d}\n'
            self._add(line % (fields, size, checksum, self._position))
        else:
            self._add(b'{"type":1,"name":%b,"payload":null,"position":%d}\n' % (fields, self._position))

    def _add(self, line: bytes) -> None:
        self._position += 1
        self._lines.append(line)
        self._line_bytes += len(line)
        if self._line_bytes >= _BATCH_BYTES:
            self._pack()

    def _pack(self) -> None:
        self._packed.append(self._compressor.compress(b"".join(self._lines)))
        self.raw_bytes += self._line_bytes
        self._lines.clear()
        self._line_bytes = 0

    def finish(self) -> tuple[bytes, Digest]:
        """The compressed lines and their digest, which the TOC states."""
        self._pack()
        self._packed.append(self._compressor.flush())
        packed = b"".join(self._packed)
        return packed, Digest(hashlib.sha256(packed).digest())
