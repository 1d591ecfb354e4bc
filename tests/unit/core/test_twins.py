"""An epoch that comes back shows two processes with one identity; restarts alone never do."""

from __future__ import annotations

import pytest

from p2pgz.core import twins
from p2pgz.core.twins import EPOCHS_KEPT, Twins


def epochs(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def test_restarts_are_no_twins() -> None:
    seen = Twins()
    assert not any(seen.note(b"peer", epoch) for epoch in epochs("aaabbbcddefgh"))
    assert seen.found == set()


@pytest.mark.parametrize("greetings", ["aba", "aabba", "abca", "abcdb"])
def test_an_epoch_that_comes_back_is_a_twin_and_said_once(greetings: str) -> None:
    seen = Twins()
    *before, last = epochs(greetings)
    assert not any(seen.note(b"peer", epoch) for epoch in before)
    assert not seen.note(b"other", last)
    assert seen.note(b"peer", last)
    assert not any(seen.note(b"peer", epoch) for epoch in epochs("babab"))
    assert seen.found == {b"peer"}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "PEERS_MAX", 3)
    seen = Twins()
    for epoch in epochs("aba"):
        seen.note(b"first", epoch)
    for number in range(3):
        for epoch in range(9):
            seen.note(b"%d" % number, b"%d" % epoch)
    assert len(seen._epochs) == 3
    assert max(map(len, seen._epochs.values())) == EPOCHS_KEPT
    assert seen.found == set()
