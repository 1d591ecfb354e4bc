"""Amounts of disk as people write them."""

from __future__ import annotations

import pytest

from p2pgz.core.size import MAX_BYTES, Amount, parse_amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (0, Amount(0)),
        (1_000_000, Amount(1_000_000)),
        ("1000", Amount(1000)),
        ("200GB", Amount(200 * 1000**3)),
        (" 64 GiB ", Amount(64 << 30)),
        ("1.5kb", Amount(1500)),
        ("80%", Amount(0, 0.8)),
    ],
)
def test_amounts(text: int | str, amount: Amount) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    "text", [-1, MAX_BYTES + 1, "much", "12 parsecs", "0%", "101%", f"{MAX_BYTES + 1}", ""]
)
def test_nonsense_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"out of range|number of bytes|not between|not a unit"):
        parse_amount(text)


def test_share_is_of_the_file_system() -> None:
    assert parse_amount("50%").of(1000) == 500
    assert parse_amount("7").of(1000) == 7
