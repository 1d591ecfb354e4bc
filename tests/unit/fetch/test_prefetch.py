"""Start-up lists spent: few requests, in the order of need, behind readers; and lists of peers that lie."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio

from p2pgz.core import startup
from p2pgz.core.digest import Digest
from p2pgz.core.peerid import PeerId
from p2pgz.core.schedule import Priority
from p2pgz.core.sharing import Mode, Policy, Rule, document_name, image_secret
from p2pgz.core.startplan import SPARE_SHARE
from p2pgz.errors import P2pgzError, SourceUnavailable
from p2pgz.fetch import prefetch
from p2pgz.fetch import startup as lists_module
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.prefetch import Prefetch
from p2pgz.fetch.shares import Shares
from p2pgz.fetch.startup import FILES_MAX, StartUpLists
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import SHARED_DOMAIN
from p2pgz.testing.memory_source import Fault
from tests.unit.fetch.test_service import Bench, bench

pytestmark = pytest.mark.trio
MANIFEST = Digest.of(b"manifest")
TOC = Digest.of(b"toc").raw
PEERS = [PeerId.of_ed25519(bytes([n]) * 32) for n in range(3)]


def wanted(b: Bench, *chunks: int):
    return [(b.segment, n) for n in chunks]


def here(b: Bench) -> set[int]:
    return {n for n in range(b.table.chunk_count) if b.segment.presence.has(n)}


def far_apart(b: Bench) -> tuple[int, int]:
    """Two chunks that have more than a request's worth of others between them, the later one first."""
    return b.table.chunk_count - 2, 1


async def test_listed_chunks_come_in_the_lists_order_and_hardly_anything_else(tmp_path):
    async with bench(tmp_path, connections=2) as b:
        late, early = far_apart(b)
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, late, early))
        assert {late, early} <= here(b)
        starts = [start for _, start, _ in b.source.requests]
        assert starts == [b.table.blob_offset[late], b.table.blob_offset[early]]
        listed = sum(b.table.blob_end[n] - b.table.blob_offset[n] for n in (late, early))
        assert sum(end - start for _, start, end in b.source.requests) <= listed * (1 + SPARE_SHARE)
        assert work.bytes == sum(b.table.size[n] for n in here(b))
        assert (work.listed_chunks, work.chunks) == (2, len(here(b)))


async def test_whole_list_is_one_request_where_its_chunks_are_neighbours(tmp_path):
    async with bench(tmp_path) as b:
        order = list(range(b.table.chunk_count))
        await Prefetch(b.fetcher).run(wanted(b, *reversed(order)))
        assert b.everything_is_right()
        assert len(b.source.requests) == 1


async def test_what_is_here_is_not_fetched_again(tmp_path):
    async with bench(tmp_path) as b:
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.START_UP)
        b.source.requests.clear()
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, *range(b.table.chunk_count)))
        assert b.source.requests == []
        assert (work.listed_chunks, work.chunks) == (b.table.chunk_count, 0)


async def test_second_list_adds_what_the_first_one_had_not(tmp_path):
    async with bench(tmp_path) as b:
        late, early = far_apart(b)
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, early))
        await work.run(wanted(b, early, late))
        assert work.listed_chunks == 2
        assert work.names(b.segment, late)
        assert not work.names(b.segment, late - 1)


async def test_reader_of_a_listed_chunk_takes_no_unlisted_neighbours_along_until_the_start_is_over(tmp_path):
    async with bench(tmp_path, connections=1) as b:
        late, early = far_apart(b)
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, late))
        assert here(b) == {late}
        origin = b.fetcher.origin(b.segment)
        assert origin.listed == {late}
        origin.listed.add(early)
        await b.fetcher.ensure_chunks(b.segment, [early], Priority.BLOCKED_READ)
        assert here(b) == {late, early}
        work.close()
        assert late not in origin.listed
        await b.fetcher.ensure_chunks(b.segment, [early + 3], Priority.BLOCKED_READ)
        assert len(here(b)) > 3


async def test_pool_that_is_partly_filled_is_completed(tmp_path):
    async with bench(tmp_path) as b:
        count = b.table.chunk_count
        await b.fetcher.ensure_chunks(b.segment, range(0, count, 2), Priority.START_UP)
        before = b.source.requests.copy()
        b.source.requests.clear()
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, *range(count)))
        assert before
        assert b.everything_is_right()
        assert (work.listed_chunks, work.chunks) == (count, count // 2)


async def test_failures_are_left_to_readers(tmp_path, autojump_clock):
    async with bench(tmp_path) as b:
        b.source.faults.extend([Fault(0, SourceUnavailable("down"))] * 50)
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, *far_apart(b)))
        assert work.chunks == 0
        b.source.faults.clear()
        await b.fetcher.ensure(b.segment, 0, b.table.chunk_count, Priority.BLOCKED_READ)
        assert b.everything_is_right()


async def test_list_fetches_no_more_than_its_limit(tmp_path, monkeypatch):
    async with bench(tmp_path) as b:
        late, early = far_apart(b)
        monkeypatch.setattr(prefetch, "LIST_MAX_BYTES", b.table.size[late])
        work = Prefetch(b.fetcher)
        await work.run(wanted(b, late, early))
        assert here(b) == {late}


async def test_streamed_layer_is_not_read_for_a_list(tmp_path):
    async with bench(tmp_path, "basic.gz") as b:
        await Prefetch(b.fetcher).run(wanted(b, 0, 1))
        assert b.source.requests == []


# --- what is kept, and what peers say


class Saying:
    """Peers that answer a question about a name, and lose their place."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = dict(zip(PEERS, answers, strict=False))
        self.blamed: dict[PeerId, str] = {}
        self.questions: list[tuple[bytes, bytes, int]] = []

    async def named(self, name, told, *, limit_bytes, secret, asked, peers_max):
        await trio.lowlevel.checkpoint()
        self.questions.append((name, secret, limit_bytes))
        for peer, answer in self.answers.items():
            if peer not in asked:
                asked.add(peer)
                told(peer, answer)

    def blame(self, peer: PeerId, error: P2pgzError) -> None:
        self.blamed[peer] = error.what


def lists_with(tmp_path: Path, *answers: bytes) -> tuple[StartUpLists, Saying]:
    lists, peers = StartUpLists(tmp_path), Saying(*answers)
    lists.peers = peers
    return lists, peers


async def test_liars_lose_their_place_and_the_others_are_heard(tmp_path):
    good = startup.to_bytes([(TOC, 4), (TOC, 2)])
    flood = msgspec.msgpack.encode([1, [TOC], [[0, 0, 10_000_000]]])
    beyond = startup.to_bytes([(TOC, 2), (TOC, 100)])
    lists, peers = lists_with(tmp_path, flood, good, beyond)
    asked: set[PeerId] = set()
    assert await lists.ask(MANIFEST, b"secret", {TOC: 100}, asked) == [[(TOC, 4), (TOC, 2)]]
    assert set(peers.blamed) == {PEERS[0], PEERS[2]}
    assert peers.questions == [(startup.name_of(MANIFEST).raw, b"secret", startup.LIST_MAX_BYTES)]
    assert await lists.ask(MANIFEST, b"", {TOC: 100}, asked) == []


async def test_peer_with_a_later_versions_list_or_an_empty_one_is_no_liar(tmp_path):
    lists, peers = lists_with(tmp_path, msgspec.msgpack.encode([9, "new"]), startup.to_bytes([]))
    assert await lists.ask(MANIFEST, b"", {TOC: 100}, set()) == []
    assert peers.blamed == {}


async def test_peers_that_do_not_answer_are_not_waited_for(tmp_path, autojump_clock):
    class Silent(Saying):
        async def named(self, *args, **options):
            await trio.sleep_forever()

    lists = StartUpLists(tmp_path)
    assert await lists.ask(MANIFEST, b"", {}, set()) == []
    lists.peers = Silent()
    assert await lists.ask(MANIFEST, b"", {}, set()) == []


async def test_recordings_survive_restarts_and_are_told_for_their_domain_only(tmp_path):
    lists = StartUpLists(tmp_path)
    assert lists.told(MANIFEST, SHARED_DOMAIN) is None
    await lists.add(MANIFEST, SHARED_DOMAIN, [(TOC, 3), (TOC, 1)])
    await lists.add(MANIFEST, SHARED_DOMAIN, [(TOC, 1)])
    again = StartUpLists(tmp_path)
    assert again.known(MANIFEST, SHARED_DOMAIN).spots == [(TOC, 3), (TOC, 1)]
    assert again.known(MANIFEST, SHARED_DOMAIN).recordings == 2
    assert startup.from_bytes(again.told(MANIFEST, SHARED_DOMAIN)) == [(TOC, 3), (TOC, 1)]
    assert again.told(MANIFEST, "private-x") is None
    assert again.told(Digest.of(b"other"), SHARED_DOMAIN) is None


async def test_damaged_list_is_set_aside_and_recorded_again(tmp_path):
    await StartUpLists(tmp_path).add(MANIFEST, SHARED_DOMAIN, [(TOC, 3)])
    [path] = (tmp_path / "startup").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    lists = StartUpLists(tmp_path)
    assert lists.known(MANIFEST, SHARED_DOMAIN) == startup.NOTHING
    assert [entry.name for entry in (tmp_path / "startup").iterdir()] == [path.name + ".damaged"]
    await lists.add(MANIFEST, SHARED_DOMAIN, [(TOC, 4)])
    assert StartUpLists(tmp_path).known(MANIFEST, SHARED_DOMAIN).spots == [(TOC, 4)]


async def test_number_of_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(lists_module, "FILES_MAX", 3)
    assert FILES_MAX == 1024
    lists = StartUpLists(tmp_path)
    for number in range(5):
        await lists.add(Digest.of(b"%d" % number), SHARED_DOMAIN, [(TOC, number)])
    assert len(list((tmp_path / "startup").iterdir())) == 3
    assert StartUpLists(tmp_path).known(Digest.of(b"4"), SHARED_DOMAIN).spots == [(TOC, 4)]


async def test_list_is_told_to_those_who_may_have_the_image_and_to_nobody_when_the_rules_change(tmp_path):
    document, name = b"manifest", startup.name_of(MANIFEST).raw
    rules = {mode: Policy([Rule("*", mode)]) for mode in Mode}
    async with Pool.open(tmp_path / "state", boot_id="boot", check_filesystem=False) as pool:
        await pool.put_object(MANIFEST, document)
        shares, lists = Shares(rules[Mode.CLUSTER]), StartUpLists(tmp_path)
        offers = PoolOffers(pool, shares, None, lists)
        await lists.add(MANIFEST, SHARED_DOMAIN, [(TOC, 3)])
        assert await offers.document(name) is None
        place = shares.place("registry.test/image", MANIFEST, document)
        await shares.add(place, segments=[], documents=[])
        assert startup.from_bytes(await offers.document(name)) == [(TOC, 3)]
        assert not offers.holds(name)
        for mode in (Mode.NONE, Mode.PROOF):
            await shares.adopt(rules[mode], pool)
            assert await offers.document(name) is None
        await shares.adopt(rules[Mode.CLUSTER], pool)
        assert startup.from_bytes(await offers.document(name)) == [(TOC, 3)]


async def test_list_of_an_image_for_provers_has_a_name_that_only_they_know(tmp_path):
    document, name = b"manifest", startup.name_of(MANIFEST).raw
    async with Pool.open(tmp_path / "state", boot_id="boot", check_filesystem=False) as pool:
        shares, lists = Shares(Policy([Rule("*", Mode.PROOF)])), StartUpLists(tmp_path)
        offers = PoolOffers(pool, shares, None, lists)
        place = shares.place("registry.test/image", MANIFEST, document)
        await shares.add(place, segments=[], documents=[])
        hidden = document_name(image_secret(document), name)
        assert await offers.proven_document(hidden) is None
        await lists.add(MANIFEST, place.domain, [(TOC, 3)])
        assert startup.from_bytes(await offers.proven_document(hidden)) == [(TOC, 3)]
        assert await offers.document(name) is None
        assert await offers.document(hidden) is None
