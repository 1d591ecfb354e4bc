"""What eviction and the scrub ask of `fs`: its word, to ask again for what went meanwhile, and to have the kernel forget."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treebuild import build_tree
from p2pgz.image.treefile import TreeFile
from p2pgz.mount.channel import Kind, Record, decode, encode
from p2pgz.mount.link import NodeLink
from p2pgz.mount.roster import Roster
from p2pgz.mount.stale import ChunkRun, ranges_of
from p2pgz.pool.presence import Presence

pytestmark = pytest.mark.trio


class Session:
    """A process that has some files of the pool; `answers` is what it takes until it says a word."""

    def __init__(self, *names: str) -> None:
        self.options: Any = SimpleNamespace(
            segments=[SimpleNamespace(data_path=Path("/pool") / name) for name in names]
        )
        self.stats: Any = SimpleNamespace(reads=0)
        self.invalid: list[tuple[int, int, int]] = []
        self.pings = 0
        self.answered, self.ended = trio.Event(), trio.Event()

    async def ping(self) -> None:
        self.pings += 1
        await self.answered.wait()

    async def wait_closed(self) -> None:
        await self.ended.wait()

    def invalidate(self, segment_index: int, first: int, count: int) -> None:
        self.invalid.append((segment_index, first, count))


async def test_word_of_everybody_with_the_file_is_waited_for_also_of_who_is_just_starting() -> None:
    roster, one, two, other = Roster(), Session("a", "b"), Session("b"), Session("c")
    for session in (one, two, other):
        roster.enter(session)
    done = trio.Event()

    async def quiesce() -> None:
        await roster.quiesce(Path("/pool/b"))
        done.set()

    late = Session("b")
    async with trio.open_nursery() as nursery:
        with roster.starting():
            assert roster.is_mapped(Path("/pool/nobody's"))  # it may be the new one's
            nursery.start_soon(quiesce)
            await trio.testing.wait_all_tasks_blocked()
            assert (one.pings, two.pings) == (0, 0)
            roster.enter(late)
        await trio.testing.wait_all_tasks_blocked()
        assert [s.pings for s in (one, two, other, late)] == [1, 1, 0, 1]
        one.answered.set()
        late.answered.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        two.ended.set()  # a process that is gone replies nothing
    assert done.is_set()
    assert not roster.is_mapped(Path("/pool/nobody's"))


async def test_kernels_of_all_mounts_of_a_file_forget_runs_of_wrong_chunks() -> None:
    roster, one, two, other = Roster(), Session("a", "b"), Session("b"), Session("c")
    for session in (one, two, other):
        roster.enter(session)
    roster.invalidate(Path("/pool/b"), [3, 4, 5, 9])
    assert one.invalid == [(1, 3, 3), (1, 9, 1)]
    assert two.invalid == [(0, 3, 3), (0, 9, 1)]
    assert other.invalid == []
    one.stats.reads, two.stats.reads = 4, 5
    assert roster.reads == 9


@asynccontextmanager
async def linked(deadline: float, **options: Any) -> AsyncIterator[tuple[NodeLink, socket.socket, Presence]]:
    """A link, the node's end of its channel, and the bits that the node writes."""
    presence = Presence.create(8)
    link = NodeLink([presence], read_deadline_seconds=deadline, set_read_ahead=lambda _: None, **options)
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    ours.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run, theirs)
        try:
            yield link, ours, presence
        finally:
            nursery.cancel_scope.cancel()
            ours.close()
    presence.close()


async def node_that_says_present(
    node: socket.socket, requests: list[Record], lies: int, presence: Presence
) -> None:
    """Every answer is "present"; the first ones are about chunks that were evicted before anybody could look."""
    while True:
        await trio.lowlevel.wait_readable(node)
        for record in decode(node.recv(4096))[0]:
            if record.kind is Kind.REQUEST:
                requests.append(record)
                if len(requests) > lies:
                    presence.set(record.first)
                node.send(encode([Record(Kind.REPLY, id=record.id)]))


@pytest.mark.parametrize(("lies", "code"), [(2, 0), (30, 0), (1 << 30, errno.EIO)])
async def test_reader_of_chunks_that_are_evicted_at_once_goes_on_until_its_deadline(
    autojump_clock: trio.testing.MockClock, lies: int, code: int
) -> None:
    autojump_clock.autojump_threshold = 0.02  # the socket's other end is a task, too
    requests: list[Record] = []
    begin = trio.current_time()
    async with linked(20.0) as (link, node, presence), trio.open_nursery() as nursery:
        nursery.start_soon(node_that_says_present, node, requests, lies, presence)
        assert await link.ensure(0, 3, 1, {}) == code
        nursery.cancel_scope.cancel()
    if code:
        assert trio.current_time() - begin == pytest.approx(20.0, abs=0.01)
        assert len(requests) < 100
    else:
        assert len(requests) == lies + 1


async def test_word_of_wrong_chunks_reaches_the_one_who_invalidates() -> None:
    told: list[tuple[int, int, int]] = []
    arrived = trio.Event()

    def invalidate(*run: int) -> None:
        told.append(run)  # type: ignore[arg-type]  # three of them
        arrived.set()

    async with linked(1.0, invalidate=invalidate) as (link, node, _):
        node.send(encode([Record(Kind.INVALIDATE, segment=7, first=1, amount=1)]))  # no such segment
        node.send(encode([Record(Kind.INVALIDATE, segment=0, first=2, amount=3)]))
        with trio.fail_after(5):
            await arrived.wait()
        assert told == [(0, 2, 3)]
        assert link.garbage == 1


def layer(name: bytes, *files: tuple[bytes, list[bytes]]) -> tuple[LayerInput, SegmentTable]:
    entries, n = [], 0
    for path, pieces in files:
        chunks, at = [], 0
        for piece in pieces:
            chunks.append(Chunk(Digest.of(piece).raw, at, len(piece), n * 100, n * 100 + 100, 0))
            n, at = n + 1, at + len(piece)
        entries.append(Entry(name=path, kind="reg", size=at, chunks=tuple(chunks), mode=0o644))
    toc = Toc(Digest.of(name), entries)
    layout = SegmentLayout.build(toc, compression="none")
    return LayerInput(toc, layout.extents, toc.digest), SegmentTable(layout.to_bytes())


async def test_every_file_with_bytes_in_a_wrong_chunk_is_found_and_no_other() -> None:
    big = [bytes([n]) * 10_000 for n in range(4)]
    lower, lower_table = layer(b"lower", (b"big", big), (b"small", [b"s" * 300]), (b"hidden", [b"h" * 300]))
    upper, upper_table = layer(b"upper", (b"other", [b"o" * 5000, b"p" * 50]), (b"hidden", [b"new"]))
    tree = TreeFile(build_tree(merge_layers([lower, upper])))
    tables = {lower.toc.digest: lower_table, upper.toc.digest: upper_table}
    ordered = [tables[digest] for digest in tree.segments]
    at_lower, at_upper = tree.segments.index(lower.toc.digest), tree.segments.index(upper.toc.digest)
    ino = {name: tree.lookup(1, name) for name in (b"big", b"small", b"other", b"hidden")}

    def found(*runs: ChunkRun) -> set[tuple[int, int, int]]:
        return set(ranges_of(tree, ordered, runs))

    assert found(ChunkRun(at_lower, 1, 2)) == {(ino[b"big"], 10_000, 20_000)}
    assert found(ChunkRun(at_lower, 3, 2)) == {(ino[b"big"], 30_000, 10_000), (ino[b"small"], 0, 300)}
    assert found(ChunkRun(at_upper, 0, 99)) == {(ino[b"other"], 0, 5050), (ino[b"hidden"], 0, 3)}
    assert found(ChunkRun(at_lower, 5, 1)) == set()  # the lower layer's hidden file is nobody's
    assert found(ChunkRun(at_lower, 0, 1), ChunkRun(at_upper, 1, 1)) == {
        (ino[b"big"], 0, 10_000),
        (ino[b"other"], 5000, 50),
    }
