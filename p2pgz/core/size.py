"""Amounts of disk as people write them: `1000000`, `"200GB"`, `"64GiB"`, `"80%"`. Used by the configuration."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
}
_TEXT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[A-Za-z]*)")
MAX_BYTES: Final = 1 << 62


class Amount(NamedTuple):
    """A number of bytes, or a share of the file system."""

    fixed_bytes: int
    share: float = 0.0

    def of(self, total_bytes: int) -> int:
        """In bytes, on a file system of this size."""
        return int(total_bytes * self.share) if self.share else self.fixed_bytes


def parse_amount(value: int | str) -> Amount:
    """Raises ValueError with what would be right."""
    if isinstance(value, int):
        if not 0 <= value <= MAX_BYTES:
            raise ValueError(f"{value} is out of range")
        return Amount(value)
    match = _TEXT.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a number of bytes, nor like 200GB, 64GiB or 80%")
    number, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError(f"{value!r} is not between 0% and 100%")
        return Amount(0, number / 100)
    if unit not in _UNITS:
        raise ValueError(
            f"{value!r}: {match[2]} is not a unit; use B, KB, MB, GB, TB, PB or KiB, MiB, GiB, TiB, PiB"
        )
    # whole numbers exactly: a float has 53 bits
    count = int(match[1]) * _UNITS[unit] if match[1].isdigit() else int(number * _UNITS[unit])
    if count > MAX_BYTES:
        raise ValueError(f"{value!r} is out of range")
    return Amount(count)
