"""The short version of `make kills`."""

from __future__ import annotations

import json

import pytest

from tests.e2e.restart.kills import run

SEED = 20
COUNT = 20

pytestmark = [pytest.mark.root, pytest.mark.registry]


def test_twenty_random_kills_harm_no_reader() -> None:
    figures = run(COUNT, SEED, stop_fs=False, files=48)
    print(json.dumps(figures))
    assert figures["faults"] == []
    assert figures["kills"] == COUNT
