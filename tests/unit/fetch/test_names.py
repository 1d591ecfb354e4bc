"""The table of chunk names: finds what was added, nothing of what is gone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.layout import SegmentTable
from p2pgz.fetch import names
from p2pgz.fetch.names import ChunkNames, Place
from p2pgz.testing.conformance_pool import Layer


def table_of(layer: Layer) -> SegmentTable:
    return SegmentTable(layer.layout.to_bytes())


TABLES = [table_of(Layer.random(seed, files=12, name=b"%d" % seed)) for seed in range(6)]


def added(found: ChunkNames, table: SegmentTable) -> None:
    for _ in found.add(table):
        pass


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, len(TABLES) - 1)), max_size=20))
def test_it_finds_what_a_search_of_all_tables_would(steps: list[tuple[bool, int]]) -> None:
    found, model = ChunkNames(), set[int]()
    for add, number in steps:
        if add and number not in model:
            added(found, TABLES[number])
            model.add(number)
        elif not add:
            found.remove(TABLES[number].id)
            model.discard(number)
    for table in TABLES:
        for n in range(table.chunk_count):
            digest = table.digest(n)
            expected = {
                Place(TABLES[other].id, m)
                for other in model
                for m in range(TABLES[other].chunk_count)
                if TABLES[other].digest(m) == digest
            }
            assert set(found.find(digest)) == expected
    assert found.find(b"\0" * 32) == []


def test_a_chunk_of_every_image_is_found_in_some_of_them() -> None:
    found = ChunkNames()
    tables = [
        table_of(Layer([[b"the same"], [b"%d" % number]], name=b"%d" % number))
        for number in range(3 * names.PLACES_MAX)
    ]
    for table in tables:
        added(found, table)
    assert len(found.find(tables[0].digest(0))) == names.PLACES_MAX


def test_what_is_gone_gives_its_memory_back() -> None:
    found = ChunkNames()
    names_min = names.STALE_MIN
    layer = table_of(Layer([[b"%d" % number] for number in range(2000)], name=b"large"))
    while not found.wants_rebuilding:
        added(found, layer)
        found.remove(layer.id)
    added(found, TABLES[0])
    assert found._entries > names_min
    for _ in found.rebuild():
        pass
    assert found._entries == TABLES[0].chunk_count
    assert found.find(TABLES[0].digest(0))
