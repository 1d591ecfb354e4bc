"""`p2pgz node` in this process, without the node."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.cli import run


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.enable()
    gc.unfreeze()


def test_collector_rests_during_the_start_only_and_looks_rarely_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []

    def run_node(*_: Any, **__: Any) -> bool:
        seen.append((gc.isenabled(), gc.get_threshold()[0]))
        return False

    monkeypatch.setattr(trio, "run", run_node)
    assert run(["--state-dir", str(tmp_path), "node", "--no-peers"]) == 0
    assert seen == [(True, 100_000)]
