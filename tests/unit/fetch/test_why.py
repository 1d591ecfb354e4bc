"""Where chunks came from, and who would be asked: a real pool and fetcher, a source in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from p2pgz.core.layout import SegmentTable
from p2pgz.core.schedule import Priority
from p2pgz.fetch import trace as trace_module
from p2pgz.fetch.flights import Flight
from p2pgz.fetch.trace import POOL, Kind, Source, Trace
from p2pgz.fetch.why import Why, is_complete
from p2pgz.testing.conformance_pool import Layer
from p2pgz.testing.memory_source import Fault
from tests.unit.fetch.test_service import bench, no_progress_needed

pytestmark = pytest.mark.trio


def rows(why: Why, segment: Any) -> list[dict[str, Any]]:
    return [row for batch in why.batches(segment, 0, segment.table.chunk_count) for row in batch]


async def test_missing_then_fetching_then_here(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        count = b.table.chunk_count
        why = Why(b.fetcher)
        missing = rows(why, b.segment)
        assert [row["n"] for row in missing] == list(range(count))
        assert {row["state"] for row in missing} == {"missing"}
        assert missing[0]["next"] == {"peers": [], "registry": b.source.name}
        assert not is_complete(why.summary)

        b.source.faults.append(Fault(0, None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.fetcher.ensure, b.segment, 0, 1, Priority.BLOCKED_READ)
            await wait_all_tasks_blocked(0.05)
            first = rows(Why(b.fetcher), b.segment)[0]
            assert (first["state"], first["asked"], first["hedges"]) == ("fetching", ["registry"], 0)
            nursery.cancel_scope.cancel()

    async with bench(tmp_path / "again") as b:
        await b.fetcher.ensure(b.segment, 0, count, Priority.BLOCKED_READ)
        why = Why(b.fetcher)
        here = rows(why, b.segment)
        assert {(row["state"], row["source"], row["from"]) for row in here} == {
            ("here", "registry", b.source.name)
        }
        assert all(row["seconds"] >= 0 for row in here)
        assert why.summary["here"]["registry"]["chunks"] == count
        assert is_complete(why.summary)
        other = Why(b.fetcher)
        b.fetcher.trace._segments.clear()
        assert {row["source"] for row in rows(other, b.segment)} == {"before"}


async def test_plain_layers_are_told_of_whole_passes_too(tmp_path: Path) -> None:
    async with bench(tmp_path, "basic.gz", keep_harvest=True) as b:
        assert {row["source"] for row in rows(Why(b.fetcher), b.segment)} == {"registry"}
        everything = range(b.table.chunk_count)
        await b.pool.remove_chunks(b.segment, everything, no_progress_needed)
        b.fetcher.trace._segments.clear()
        await b.fetcher.ensure(b.segment, 0, 1, Priority.BLOCKED_READ)
        again = rows(Why(b.fetcher), b.segment)
        assert {row.get("source") for row in again if row["state"] == "here"} == {"registry"}


async def test_what_came_with_a_request_for_something_else_is_told_too(tmp_path: Path) -> None:
    async with bench(tmp_path, keep_harvest=True) as b:
        here = [row for row in rows(Why(b.fetcher), b.segment) if row["state"] == "here"]
        assert here
        assert {(row["source"], row["from"]) for row in here} == {("registry", b.source.name)}


class TestTrace:
    TABLE = SegmentTable(Layer.random(1).layout.to_bytes())

    async def test_domains_are_apart(self) -> None:
        found = Trace()
        found.note("shared", self.TABLE, [0, 1], Source(Kind.PEER, "p"), 0.5, hedges=300)
        flight = Flight(2, Priority.BLOCKED_READ, 0.0)
        segment: Any = type("S", (), {"domain": "private", "id": self.TABLE.id, "table": self.TABLE})
        found.landed(segment, flight, POOL)
        assert found.came(segment, 2).source == POOL
        assert found.came(segment, 0).source.kind is Kind.BEFORE
        segment.domain = "shared"
        assert found.came(segment, 1) == (Source(Kind.PEER, "p"), 0.5, 255)
        assert found.came(segment, 2).source.kind is Kind.BEFORE

    async def test_it_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace_module, "SEGMENTS_MAX", 2)
        monkeypatch.setattr(trace_module, "SOURCES_MAX", 3)
        found = Trace()
        for number in range(10):
            found.note(f"d{number}", self.TABLE, [0], Source(Kind.PEER, f"p{number}"), 1.0)
        assert len(found._segments) == 2
        assert len(found._sources) <= 4
