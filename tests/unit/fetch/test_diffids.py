"""Which TOC may stand for a diff id: the first one unchecked, every other one only when its whole blob says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.errors import ImageInvalid, SourceUnreachable
from p2pgz.fetch.diffids import TOCS_MAX, DiffIds

DIFF, FIRST, SECOND = (Digest.of(text) for text in (b"diff", b"first", b"second"))
pytestmark = pytest.mark.trio


class Blob:
    """A layer whose blob can be read; counts how often it is."""

    def __init__(self, diff_id: Digest | None = DIFF) -> None:
        self.diff_id = diff_id
        self.reads = 0

    async def check(self) -> Digest:
        self.reads += 1
        if self.diff_id is None:
            raise SourceUnreachable("away")
        return self.diff_id


async def admit(
    ids: DiffIds,
    toc: Digest,
    check: Callable[[], Awaitable[Digest]],
    *,
    checked: bool = False,
    require: bool = False,
) -> None:
    await ids.admit(DIFF, toc, check, checked=checked, require=require, reference="app:1")


async def test_the_first_one_is_taken_unread(tmp_path: Path) -> None:
    blob, ids = Blob(), DiffIds(tmp_path)
    await admit(ids, FIRST, blob.check)
    await admit(ids, FIRST, blob.check)
    assert (blob.reads, ids.status()) == (0, [])


async def test_it_is_read_once_where_that_is_required(tmp_path: Path) -> None:
    blob = Blob()
    for ids in (DiffIds(tmp_path), DiffIds(tmp_path)):
        await admit(ids, FIRST, blob.check, require=True)
        await admit(ids, FIRST, blob.check, require=True)
    assert blob.reads == 1


async def test_what_was_checked_while_it_was_read_is_not_read_again(tmp_path: Path) -> None:
    blob = Blob()
    await admit(DiffIds(tmp_path), FIRST, blob.check, checked=True)
    await admit(DiffIds(tmp_path), FIRST, blob.check, require=True)
    assert blob.reads == 0


async def test_a_second_one_is_read_and_the_conflict_announced(tmp_path: Path) -> None:
    blob, ids = Blob(), DiffIds(tmp_path)
    await admit(ids, FIRST, blob.check)
    await admit(ids, SECOND, blob.check)
    assert blob.reads == 1
    (conflict,) = ids.status()
    assert conflict["tocs"] == {str(FIRST): "unchecked", str(SECOND): "right"}
    await admit(ids, SECOND, blob.check)
    assert len(ids.status()) == 1


async def test_a_liar_is_refused_then_and_later_without_harm_to_the_first(tmp_path: Path) -> None:
    liar, honest, ids = Blob(Digest.of(b"other")), Blob(), DiffIds(tmp_path)
    await admit(ids, FIRST, honest.check)
    with pytest.raises(ImageInvalid):
        await admit(ids, SECOND, liar.check)
    for again in (ids, DiffIds(tmp_path)):
        with pytest.raises(ImageInvalid, match="found before"):
            await admit(again, SECOND, liar.check)
    assert liar.reads == 1
    assert ids.status()[0]["effect"] == "this one is refused"
    await admit(ids, FIRST, honest.check)


async def test_a_source_that_is_away_decides_nothing(tmp_path: Path) -> None:
    blob, ids = Blob(None), DiffIds(tmp_path)
    with pytest.raises(SourceUnreachable):
        await admit(ids, FIRST, blob.check, require=True)
    blob.diff_id = DIFF
    await admit(ids, FIRST, blob.check, require=True)
    assert blob.reads == 2


async def test_a_damaged_record_and_a_full_disk_cost_a_check(tmp_path: Path) -> None:
    blob = Blob()
    (tmp_path / "diffids").mkdir()
    (tmp_path / "diffids" / f"{DIFF.hex}.json").write_bytes(b"{")
    await admit(DiffIds(tmp_path), FIRST, blob.check, require=True)
    (tmp_path / "file").write_bytes(b"")
    await admit(DiffIds(tmp_path / "file"), FIRST, blob.check, require=True)
    assert blob.reads == 2


async def test_nobody_can_fill_the_table(tmp_path: Path) -> None:
    ids, blob = DiffIds(tmp_path), Blob()
    for number in range(TOCS_MAX):
        await admit(ids, Digest.of(bytes([number])), blob.check)
    with pytest.raises(ImageInvalid):
        await admit(ids, FIRST, blob.check)
