"""What a pool has, as a file: read as it was written, or refused."""

from __future__ import annotations

import hashlib

import pytest

from p2pgz.core.inventory import FIRST_LINE, read_inventory, write_inventory
from p2pgz.errors import ExportInvalid

DIGESTS = [hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(5000)]


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_what_is_written_is_read_again(count: int) -> None:
    data = b"".join(write_inventory(DIGESTS[:count] * 2))
    assert read_inventory(data, name="file") == frozenset(DIGESTS[:count])
    assert data.splitlines()[1:-1] == sorted(data.splitlines()[1:-1])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"p2pgz-inventory 2\nend 0\n",
        FIRST_LINE,
        FIRST_LINE + b"end 1\n",
        FIRST_LINE + b"end x\n",
        FIRST_LINE + b"zz\nend 1\n",
        FIRST_LINE + b"\xff\nend 1\n",
        FIRST_LINE + b"00\nend 1\n",
        FIRST_LINE + b"0" * 62 + b"\n\nend 1\n",
        FIRST_LINE + (b"0" * 64 + b"\n") * 2 + b"end 2\n",
        b"".join(write_inventory(DIGESTS[:3]))[:-8],
        b"".join(write_inventory(DIGESTS[:3]))[:-2],
    ],
)
def test_what_is_damaged_is_refused(data: bytes) -> None:
    with pytest.raises(ExportInvalid, match="inventory"):
        read_inventory(data, name="file")
