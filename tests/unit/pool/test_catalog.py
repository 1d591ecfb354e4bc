"""Records of the index: tags for each platform, pins with owners, seeds; and those that an older version wrote."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from p2pgz.core.digest import Digest
from p2pgz.pool.catalog import SeedRecord, TagRecord
from p2pgz.pool.index import SCHEMA_VERSION
from p2pgz.pool.pool import Pool

pytestmark = pytest.mark.trio
ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


def opened(state: Path):
    return Pool.open(state, boot_id="boot", check_filesystem=False)


async def test_a_pin_lasts_until_its_last_owner_lets_go(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as pool:
        catalog = pool.catalog
        await catalog.pin(ONE, "app:1", 1.0)
        await catalog.pin(ONE, "app:1", 2.0, owner="seed app:1")
        await catalog.pin(ONE, "other name", 3.0)  # the first name stays
        assert [(pin.owner, pin.reference) for pin in catalog.pins()] == [
            ("user", "app:1"),
            ("seed app:1", "app:1"),
        ]
        await catalog.unpin(ONE, owner="seed app:1")
        assert [pin.owner for pin in catalog.pins()] == ["user"]
        await catalog.unpin(ONE)
        assert catalog.pins() == []


async def test_seeds_are_remembered(tmp_path: Path) -> None:
    seed = SeedRecord(reference="app:1", platform="linux/amd64", origin="command", request="{}", since=1.0)
    async with opened(tmp_path / "state") as pool:
        await pool.catalog.put_seed(seed)
    async with opened(tmp_path / "state") as pool:
        assert pool.catalog.seeds() == [seed]
        await pool.catalog.remove_seed("app:1", "linux/arm64")
        assert pool.catalog.seeds() == [seed]
        await pool.catalog.remove_seed("app:1", "linux/amd64")
        assert pool.catalog.seeds() == []


async def test_index_of_version_1_is_taken_over(tmp_path: Path) -> None:
    async with opened(tmp_path / "state") as pool:
        await pool.put_object(TWO, b"two")
    connection = apsw.Connection(str(tmp_path / "state" / "index.db"))
    for statement in (
        "DROP TABLE seeds", "DROP TABLE tags", "DROP TABLE pins",
        "CREATE TABLE tags(reference TEXT PRIMARY KEY, digest BLOB NOT NULL, resolved REAL NOT NULL) WITHOUT ROWID",
        "CREATE TABLE pins(manifest BLOB PRIMARY KEY, reference TEXT NOT NULL, since REAL NOT NULL) WITHOUT ROWID",
        "INSERT INTO tags VALUES('app:1', x'00', 1.0)",
        "PRAGMA user_version = 1",
    ):  # fmt: skip
        connection.execute(statement)
    connection.execute("INSERT INTO pins VALUES(?, 'app:1', 1.0)", (ONE.raw,))
    connection.close()
    async with opened(tmp_path / "state") as pool:
        catalog = pool.catalog
        assert [(pin.manifest, pin.owner, pin.reference) for pin in catalog.pins()] == [
            (ONE, "user", "app:1")
        ]
        assert catalog.tag("app:1", "linux/amd64") is None
        tag = TagRecord(reference="app:1", platform="linux/amd64", digest=ONE, resolved=2.0)
        await catalog.set_tag(tag)
        assert catalog.tag("app:1", "linux/amd64") == tag
        assert catalog.seeds() == []
        assert await pool.get_object(TWO) == b"two"
    connection = apsw.Connection(str(tmp_path / "state" / "index.db"))
    assert connection.pragma("user_version") == SCHEMA_VERSION
    connection.close()
