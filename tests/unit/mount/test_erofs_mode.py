"""Whether a host may use erofs mode: which answers are remembered, and for how long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from p2pgz.errors import MountUnavailable
from p2pgz.mount.erofs_mode import NO_RESEND, NOT_ROOT, ErofsMode
from p2pgz.mount.hosting import SelfTested
from p2pgz.mount.roster import Roster

pytestmark = pytest.mark.trio


class Client:
    """A segment client that gives these answers in turn."""

    def __init__(self, *answers: SelfTested) -> None:
        self.roster = Roster()
        self.answers = list(answers)
        self.prepared = 0

    async def self_test(self, folder: Path) -> SelfTested:
        return self.answers.pop(0)

    async def prepare(self) -> None:
        self.prepared += 1


def mode(client: Client, folder: Path, boot: str = "boot", *, resend: bool = True) -> ErofsMode:
    unused: Any = None
    return ErofsMode(client, unused, folder, folder / "trees", boot, resend=resend)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


async def test_answer_holds_for_a_boot_and_for_later_nodes(tmp_path: Path) -> None:
    bad = SelfTested(False, "this kernel shows zeros")
    first = mode(Client(bad), tmp_path)
    assert (await first.decide("auto")) == (False, bad.reason)
    assert (await first.decide("auto")) == (False, bad.reason)
    second = mode(Client(), tmp_path)
    assert (await second.decide("auto")) == (False, bad.reason)
    with pytest.raises(MountUnavailable, match="shows zeros"):
        await second.decide("erofs")
    third = mode(Client(SelfTested(True, "")), tmp_path, "another boot")
    assert (await third.decide("auto")) == (True, "")


async def test_test_that_could_not_be_made_is_made_again(tmp_path: Path) -> None:
    client = Client(SelfTested(False, "no space left", False), SelfTested(True, ""))
    tried = mode(client, tmp_path)
    assert (await tried.decide("auto")) == (False, "no space left")
    assert not list(tmp_path.glob("*.json"))
    assert (await tried.decide("auto")) == (True, "")
    assert client.answers == []


async def test_auto_is_tree_where_erofs_could_not_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await mode(Client(), tmp_path, resend=False).decide("auto")) == (False, NO_RESEND)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (await mode(Client(), tmp_path).decide("auto")) == (False, NOT_ROOT)


async def test_preparing_starts_a_host_for_erofs_only_and_raises_nothing(tmp_path: Path) -> None:
    client = Client(SelfTested(True, ""))
    await mode(client, tmp_path).prepare("tree")
    assert client.prepared == 0
    await mode(client, tmp_path).prepare("auto")
    assert client.prepared == 1
    await mode(Client(SelfTested(False, "zeros")), tmp_path, "another").prepare("erofs")
