"""A giver that cannot keep up says so, and when to ask again; nobody takes that for "I have it not"."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.standing import Fault
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p import exchange as exchange_module
from p2pgz.p2p.connection import DOCUMENTS_AT_ONCE, STALL_SECONDS
from p2pgz.p2p.uploads import Uploads
from p2pgz.testing.conformance_pool import Layer
from p2pgz.testing.peers import Peer, open_peer

# 4 MB that do not compress, in chunks of 100 kB
LAYER = Layer([[random.Random(n).randbytes(100_000)] for n in range(40)], name=b"busy")
RATE = 1_000_000
pytestmark = pytest.mark.trio


async def test_rate_limited_giver_is_busy_for_the_background_and_not_for_blocked_reads(
    tmp_path: Path,
) -> None:
    async with (
        open_peer(tmp_path / "giver", LAYER, uploads=Uploads(bytes_per_second=RATE)) as giver,
        open_peer(tmp_path / "filling", LAYER, chunks=()) as filling,
        open_peer(tmp_path / "reading", LAYER, chunks=()) as reading,
        trio.open_nursery() as nursery,
    ):
        for peer in (filling, reading):
            await peer.exchange.connect("127.0.0.1", giver.port, expected=giver.id)

        async def fill() -> None:
            await filling.exchange.fetch(
                giver.id, filling.swarm, filling.segment.table, range(40), priority=3, landed=filling.landed
            )

        nursery.start_soon(fill)
        with trio.fail_after(5):
            while len(filling.missing()) > 35:
                await trio.sleep(0.01)
        answer = await reading.exchange.fetch(
            giver.id, reading.swarm, reading.segment.table, [1, 2], priority=3, landed=reading.landed
        )
        assert answer.busy == [1, 2]
        assert 0.5 < answer.retry_seconds <= 4.0
        before = trio.current_time()
        answer = await reading.exchange.fetch(
            giver.id, reading.swarm, reading.segment.table, [1, 2], priority=0, landed=reading.landed
        )
        assert not answer.busy
        assert not {1, 2} & set(reading.missing())
        # a batch of the other's that was on its way, and this machine's pauses; not the 3 s that are queued
        assert trio.current_time() - before < 1.0
        nursery.cancel_scope.cancel()


async def test_backlog_of_a_peer_that_has_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    uploads = Uploads(bytes_per_second=RATE)
    async with (
        open_peer(tmp_path / "giver", LAYER, uploads=uploads) as giver,
        open_peer(tmp_path / "taker", LAYER, chunks=()) as taker,
    ):
        connection = await taker.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
        async with trio.open_nursery() as nursery:

            async def fill() -> None:
                await taker.exchange.fetch(
                    giver.id, taker.swarm, taker.segment.table, range(40), priority=3, landed=taker.landed
                )

            nursery.start_soon(fill)
            with trio.fail_after(5):
                while not uploads.busy_ms(3):
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        await connection.close()
        with trio.fail_after(5):
            while uploads._queues:
                await trio.sleep(0.01)


async def test_documents_that_a_busy_peer_cannot_send_now_come_a_little_later(tmp_path: Path) -> None:
    documents = [bytes([n]) * 1000 for n in range(3 * DOCUMENTS_AT_ONCE)]
    async with (
        open_peer(tmp_path / "a", LAYER) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        for document in documents:
            await a.pool.put_object(Digest.of(document), document)
        offers = a.exchange._offers
        read = offers.document

        async def slow(digest: bytes) -> bytes | None:
            await trio.sleep(0.05)
            return await read(digest)

        offers.document = slow  # type: ignore[method-assign]
        await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        found: list[bytes | None] = []

        async def get(document: bytes) -> None:
            found.append(await b.exchange.document(Digest.of(document).raw, limit_bytes=2000))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for document in documents:
                    nursery.start_soon(get, document)
        assert sorted(item for item in found if item) == documents
        assert a.exchange.uploads.busy > 0
        assert not b.exchange.standing.counts


async def test_document_of_a_peer_that_stays_busy_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pgz.p2p.connection.DOCUMENTS_AT_ONCE", 0)
    monkeypatch.setattr(exchange_module, "DOCUMENT_BUSY_ASKS", 3)
    monkeypatch.setattr(exchange_module, "DOCUMENT_BUSY_MAX_SECONDS", 0.01)
    document = b"a document"
    async with (
        open_peer(tmp_path / "a", LAYER) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        await a.pool.put_object(Digest.of(document), document)
        await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        assert await b.exchange.document(Digest.of(document).raw, limit_bytes=100) is None
        assert a.exchange.uploads.busy == 3


async def test_our_own_pause_is_not_the_peers_fault(tmp_path: Path) -> None:
    uploads = Uploads(slots=1)
    async with (
        open_peer(tmp_path / "giver", LAYER, uploads=uploads) as giver,
        open_peer(tmp_path / "taker", LAYER, chunks=()) as taker,
        trio.open_nursery() as nursery,
    ):
        connection = await taker.exchange.connect("127.0.0.1", giver.port, expected=giver.id)
        async with uploads.slot():  # it owes us an answer, and does not give it
            nursery.start_soon(_ask, taker, giver)
            with trio.fail_after(5):
                while not connection.downloads.waiting:
                    await trio.sleep(0.01)
            after_a_pause = trio.current_time() + 3600
            connection.look(after_a_pause, lagged=True)
            connection.look(after_a_pause + STALL_SECONDS - 0.1, lagged=False)
            assert not connection.ended
            connection.look(after_a_pause + STALL_SECONDS, lagged=False)
            assert connection.fault is Fault.SLOW
        nursery.cancel_scope.cancel()


async def _ask(taker: Peer, giver: Peer) -> None:
    with contextlib.suppress(SourceUnavailable):
        await taker.exchange.fetch(
            giver.id, taker.swarm, taker.segment.table, [1], priority=0, landed=taker.landed
        )
