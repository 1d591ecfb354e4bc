"""The wall clock may jump by years at any moment: nothing that waits, expires or retries may depend on it."""

from __future__ import annotations

import ast
import itertools
import time
from pathlib import Path

import pytest
import trio

import p2pgz
from p2pgz.core.standing import Fault
from p2pgz.errors import ChunkCorrupt, SourceUnavailable
from p2pgz.testing.conformance_pool import check_content
from p2pgz.testing.peers import open_peer, peer_layer

PACKAGE = Path(p2pgz.__file__).parent
YEARS = 10 * 365 * 86_400.0
LAYER = peer_layer(9)

# Modules that ask the wall clock, and what for. A new one needs a reason that holds when the clock is wrong; everything that
# measures or waits uses trio.current_time() or time.monotonic().
WALL_CLOCK = {
    "cli/checkup.py": "what is checked is the clock itself",
    "fetch/diffids.py": "when a conflict was found, for people",
    "image/tags.py": "when a tag was resolved, for people and for not writing it down again each time",
    "mount/mounts.py": "when a segment was mounted last, kept over reboots: only the order counts",
    "mount/records.py": "since when a mount exists, for people",
    "node/exports.py": "since when an image is kept and pinned, for people",
    "node/layers.py": "when a layer was unpacked whole, for people",
    "node/peering.py": "when a remembered peer was seen, kept over reboots: the future counts as now; where this node's "
    "stamps of its member entry begin, half a day wrong is no harm",
    "node/seeding.py": "since when an image is kept, for people",
    "node/upkeep.py": "when an image was pinned, for people",
    "p2p/bootstrap.py": "the same as node/peering.py",
    "pool/scrub.py": "when the last pass ended, kept over reboots: the future counts as now",
    "registry/client.py": "Retry-After as a date: a registry's pause has a longest",
    "snapshotter/service.py": "when a snapshot was made and changed, for containerd to show",
}


def test_wall_clock_is_asked_only_where_a_date_is_meant() -> None:
    asking = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "testing" not in path.relative_to(PACKAGE).parts and asks_wall_clock(path)
    }
    assert sorted(asking - WALL_CLOCK.keys()) == [], "use a monotonic clock, or say above why not"
    assert sorted(WALL_CLOCK.keys() - asking) == [], "not there any more"


def asks_wall_clock(path: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr)
        in {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the wall clock is ten years away from the one before."""
    start = time.time()
    times = itertools.cycle([start + YEARS, start - YEARS, start, 0.0])
    monkeypatch.setattr(time, "time", lambda: next(times))


@pytest.mark.trio
async def test_peers_go_on_whatever_the_clock_says(tmp_path: Path, jumping_clock: None) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        for priority in (3, 0):
            missing = b.missing()[: len(LAYER.chunks) // 2 + 1]
            answer = await b.exchange.fetch(
                a.id, b.swarm, b.segment.table, missing, priority=priority, landed=b.landed
            )
            assert (answer.missing, answer.busy) == ([], [])
        assert check_content(b.segment, LAYER) == len(LAYER.chunks)
        assert not a.exchange.standing.counts
        assert not b.exchange.standing.counts
        # a ban is neither forgotten nor prolonged
        b.exchange.connections()[0].blame(ChunkCorrupt("a test"), Fault.CORRUPT)
        with pytest.raises(SourceUnavailable):
            await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        until = b.exchange.standing.out_until(a.id, trio.current_time())
        assert 590 < until - trio.current_time() <= 600
