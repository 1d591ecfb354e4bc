"""The short version of `make kills`."""

from __future__ import annotations

import json

import pytest

from tests.e2e.restart.kills import run

SEED = 20
COUNT = 16
SLACK = 3.0  # a process starts as fast as the machine, which has other things to do, lets it

pytestmark = [pytest.mark.root, pytest.mark.registry]


def test_some_random_kills_harm_no_reader() -> None:
    figures = run(COUNT, SEED, stop_fs=False, files=48, slack=SLACK)
    print(json.dumps(figures))
    assert figures["faults"] == []
    assert figures["kills"] == COUNT
