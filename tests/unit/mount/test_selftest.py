"""The self-test of EROFS must see a single zero byte; files stand in for what a bad kernel shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pgz.mount.selftest import FILE_BYTES, FILL, _is_right, _never_zero

GOOD = bytes([FILL]) * FILE_BYTES


@pytest.mark.parametrize("place", [0, FILE_BYTES // 2, FILE_BYTES - 1])
def test_one_zero_byte_is_seen(place: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(GOOD)
    assert _never_zero(str(path))
    assert _is_right(str(path))
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\0")
    assert not _never_zero(str(path))
    assert not _is_right(str(path))


def test_missing_bytes_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(GOOD[:-4096])
    assert not _is_right(str(path))
