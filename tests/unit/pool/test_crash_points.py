"""The short version of `make crash-points`, and that it notices what it is there for."""

from __future__ import annotations

import json
from functools import partial

import pytest

from p2pgz.testing.crash_disk import RecordingDisk, recording
from tests.unit.pool.crash_points import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [2, 5])
def test_every_crash_of_a_life_is_recovered_from(seed: int) -> None:
    figures = run(seed)
    print(json.dumps(figures))
    assert figures["faults"] == []
    assert figures["states"] > 100


@pytest.mark.parametrize("seed", range(20, 24))
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
