"""The tests that the page about faults names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "faults.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="documentation is not part of what is installed")
def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)", PAGE.read_text("utf-8")))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    assert len(named) > 20
    assert sorted(named - there) == []
