"""The short version of `make crashpoints`, and that it notices what it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.pool.index import Index
from p2pgz.testing.crash_disk import RecordingDisk, recording
from p2pgz.testing.crash_log import CrashLog, Synced
from tests.unit.pool import crash_life
from tests.unit.pool.crash_points import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [2])
def test_every_crash_of_a_life_is_recovered_from(seed: int) -> None:
    figures = run(seed)
    print(json.dumps(figures))
    assert figures["faults"] == []
    assert figures["states"] > 100


@pytest.mark.parametrize("seed", range(20, 23))
def test_crashes_of_other_lives_are_recovered_from(seed: int) -> None:
    figures = run(seed, share=0.1)
    print(json.dumps(figures))
    assert figures["faults"] == []


class Forgetful(RecordingDisk):
    """Says that a file is durable and does nothing about it."""

    def fdatasync(self, fd: int) -> None:
        """Not recorded."""


def test_a_disk_that_does_not_sync_is_noticed() -> None:
    figures = run(1, share=0.3, most_faults=40, make_disk=partial(recording, kind=Forgetful))
    assert any("bytes are lost" in fault for fault in figures["faults"])
    assert any("check_content" in fault for fault in figures["faults"])  # wrong bytes after a "clean" stop


def test_a_flag_that_is_not_durable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any later removal carries the flag along, since the log is synced as a whole: the one that cannot is the first of a
    run, on a disk so full that its space has to be freed before the index can say so."""
    write = Index.write

    async def hasty(self: Index, change: Callable[..., Any], *, durable: bool = False) -> Any:
        begins = change.__qualname__.startswith("_begin.")
        return await write(self, change, durable=durable and not begins)

    monkeypatch.setattr(Index, "write", hasty)
    monkeypatch.setattr(crash_life, "FULL_AT_START", 1.0)
    faults = (fault for seed in range(4, 20) for fault in run(seed, share=0.3, most_faults=1)["faults"])
    assert "check_content" in next(faults)


def test_a_durable_change_that_comes_to_nothing_takes_earlier_ones_along(tmp_path: Path) -> None:
    """SQLite writes and syncs nothing for it, so the tag before it was lost although the index said it was durable."""
    log = CrashLog()

    async def live(disk: RecordingDisk) -> None:
        index = Index.open(tmp_path / "index.db", disk)
        await index.write(lambda connection: connection.execute("INSERT INTO facts VALUES('a', 1)"))
        at = len(log.entries)
        assert index.unsynced
        await index.write(lambda connection: connection.execute("UPDATE facts SET value = 1"), durable=True)
        assert not index.unsynced
        assert any(isinstance(entry, Synced) for entry in log.entries[at:])
        index.close()

    with recording(tmp_path, log) as disk:
        trio.run(live, disk)
