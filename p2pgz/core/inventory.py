"""What a pool has, as a file to carry: the other side's export leaves these chunks out.

Text: a first line that says what it is, one digest (64 hex digits) a line, ascending, and a last line with their number, so
that a copy that was cut short is noticed. Written and read by the node for `p2pgz inventory` and `p2pgz export`.
docs/reference/export-format.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from p2pgz.core.digest import SHA256_BYTES
from p2pgz.errors import ExportInvalid

FIRST_LINE: Final = b"p2pgz-inventory 1\n"
_LINE_BYTES: Final = 2 * SHA256_BYTES + 1
# 7 million chunks: 7 TB of them
INVENTORY_MAX_BYTES: Final = 512 << 20
_PIECE_LINES: Final = 4096
_HINT: Final = "make it with `p2pgz inventory` on the other side, and copy it whole"


def write_inventory(digests: Iterable[bytes]) -> Iterator[bytes]:
    """The file, in pieces; every digest once."""
    ordered = sorted(set(digests))
    yield FIRST_LINE
    for start in range(0, len(ordered), _PIECE_LINES):
        yield b"".join(digest.hex().encode() + b"\n" for digest in ordered[start : start + _PIECE_LINES])
    yield b"end %d\n" % len(ordered)


def read_inventory(data: bytes, *, name: str) -> frozenset[bytes]:
    """The digests in a file; raises ExportInvalid, which calls it `name`."""
    if not data.startswith(FIRST_LINE):
        raise ExportInvalid(f"{name}: not an inventory of p2pgz", hint=_HINT)
    body, _, last = data[len(FIRST_LINE) :].rstrip(b"\n").rpartition(b"end ")
    try:
        lines = body.splitlines()
        found = frozenset(bytes.fromhex(line.decode("ascii")) for line in lines)
        count = int(last)
    except ValueError:
        raise ExportInvalid(f"{name}: a damaged inventory", hint=_HINT) from None
    if len(body) != count * _LINE_BYTES or len(found) != count or any(len(d) != SHA256_BYTES for d in found):
        raise ExportInvalid(f"{name}: a damaged inventory: {len(found)} of {count} digests", hint=_HINT)
    return found
