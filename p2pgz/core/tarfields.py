"""The fixed header block of tar archives: its fields, numbers and checksum.

For `core.tar` and the writer in `convert`. POSIX.1-2017 pax, "ustar Interchange Format"; base-256 numbers are
GNU's.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

BLOCK_BYTES = 512
HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
"""name mode uid gid size mtime checksum type link magic user group dev_major dev_minor prefix"""
GNU_MAGIC = b"ustar  \0"
POSIX_MAGIC = b"ustar\x0000"
CHECKSUM_FIELD = slice(148, 156)
_ADLER_MODULUS = 65521  # zlib's adler32 carries the plain sum of the bytes modulo this in its low half


def clean_name(raw: bytes) -> bytes:
    """The name inside the root file system; b"" is the root.

    No slash at either end, no empty, `.` or `..` component; what would climb above the root stays in it.
    """
    if b"/." not in raw and b"//" not in raw and raw[:1] not in b"/.":
        return raw[:-1] if raw.endswith(b"/") else raw
    parts: list[bytes] = []
    for part in raw.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def cut(field: bytes) -> bytes:
    """A text field up to its NUL."""
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


@lru_cache(4096)
def number(field: bytes) -> int:
    """An octal or base-256 number field; raises ValueError."""
    if field[0] & 0x80:  # big-endian two's complement; the top bit only marks the notation
        bits = len(field) * 8 - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        value = value - (1 << bits) if field[0] & 0x40 else value
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("beyond 64 bits")
        return value
    digits = cut(field.strip(b" \0")).rstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError("not octal")
    return int(digits, 8)


def checksum_fits(block: bytes, stated: int) -> bool:
    """Whether a header block has the checksum that it states (which counts its own field as blanks)."""
    blanks = 8 * 32 - sum(block[CHECKSUM_FIELD])
    # adler32 sums 512 bytes ten times as fast as sum() does; sums are below 2^17, so the modulus hides next
    # to nothing
    if ((zlib.adler32(block) & 0xFFFF) - 1 + blanks - stated) % _ADLER_MODULUS == 0:
        return True
    signed: int = sum(struct.unpack(f"{BLOCK_BYTES}b", block[:148] + b" " * 8 + block[156:]))
    return signed == stated  # historic writers summed signed bytes
