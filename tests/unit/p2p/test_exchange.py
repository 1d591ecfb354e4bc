"""Two exchanges in one process, over real sockets: what they give each other, and what a rude peer cannot do to them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import resource
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.frames import encode
from p2pgz.core.hello import FEATURES
from p2pgz.core.messages import (
    Alternative,
    Busy,
    Data,
    Doc,
    Feature,
    Forget,
    Frame,
    FrameType,
    Goodbye,
    GoodbyeReason,
    IndexWant,
    Join,
    Leave,
    Missing,
    Ping,
    Pong,
    Want,
    runs_of,
)
from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import Fault
from p2pgz.core.wire import HEADER
from p2pgz.errors import ImageInvalid, P2pgzError, SourceUnavailable
from p2pgz.fetch.shares import Shares
from p2pgz.p2p import budget as budget_module
from p2pgz.p2p import connection as connection_module
from p2pgz.p2p import dialling as dialling_module
from p2pgz.p2p import tending
from p2pgz.p2p import unasked as unasked_module
from p2pgz.p2p.budget import connections_within, raise_descriptor_limit
from p2pgz.p2p.connection import FRAMES_AT_ONCE
from p2pgz.p2p.handshake import Credentials, Handshaken, dial
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.serving import REFUSALS_MAX
from p2pgz.p2p.uploads import REQUESTS_MAX, Uploads
from p2pgz.testing.conformance_pool import Layer, check_content
from p2pgz.testing.peers import Peer, open_peer, peer_layer

LAYER = peer_layer(3)
COUNT = len(LAYER.chunks)
KEY = b"k" * 32
pytestmark = pytest.mark.trio


@asynccontextmanager
async def pair(tmp_path: Path, **giver: object) -> AsyncIterator[tuple[Peer, Peer]]:
    """A giver with all chunks and a taker without, connected."""
    async with (
        open_peer(tmp_path / "giver", LAYER, **giver) as a,  # type: ignore[arg-type]
        open_peer(tmp_path / "taker", LAYER, chunks=()) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        yield a, b


async def fetch(taker: Peer, giver: Peer, chunks: list[int] | None = None, priority: int = 3) -> None:
    answer = await taker.exchange.fetch(
        giver.id,
        taker.swarm,
        taker.segment.table,
        taker.missing() if chunks is None else chunks,
        priority=priority,
        landed=taker.landed,
    )
    assert (answer.missing, answer.busy) == ([], [])


async def settled(condition: object, seconds: float = 5.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


async def test_both_ends_of_one_connection_can_ask(tmp_path: Path) -> None:
    half = list(range(COUNT // 2))
    rest = list(range(COUNT // 2, COUNT))
    async with (
        open_peer(tmp_path / "a", LAYER, chunks=half) as a,
        open_peer(tmp_path / "b", LAYER, chunks=rest) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port)
        await settled(a.exchange.connections)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, a, b, rest)
            nursery.start_soon(fetch, b, a, half)
        for peer in (a, b):
            assert check_content(peer.segment, LAYER) == COUNT
            assert len(peer.exchange.connections()) == 1


async def test_urgent_chunk_overtakes_what_was_asked_for_before(tmp_path: Path) -> None:
    async with pair(tmp_path, uploads=Uploads(bytes_per_second=5_000_000)) as (a, b):
        order: list[int] = []

        async def landed(good: list[tuple[int, object]]) -> None:
            order.extend(n for n, _ in good)

        async def ask(chunks: list[int], priority: int) -> None:
            await b.exchange.fetch(a.id, b.swarm, b.segment.table, chunks, priority=priority, landed=landed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, list(range(COUNT - 1)), 3)
            await settled(lambda: order)
            nursery.start_soon(ask, [COUNT - 1], 0)
        assert sorted(order) == list(range(COUNT))
        assert order.index(COUNT - 1) < COUNT - 5


async def test_cancel_storm_leaves_a_connection_that_works(tmp_path: Path) -> None:
    rng = random.Random(5)
    async with pair(tmp_path) as (a, b):
        connection = b.exchange.connection(a.id)
        assert connection is not None

        async def impatient() -> None:
            for _ in range(40):
                chunks = sorted(rng.sample(range(COUNT), rng.randint(1, 30)))
                with trio.move_on_after(rng.uniform(0, 0.01)):
                    await fetch(b, a, chunks, rng.randrange(4))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(impatient)
        await settled(lambda: not connection.downloads.requests)
        assert connection.downloads.outstanding_bytes == 0
        await fetch(b, a)
        assert check_content(b.segment, LAYER) == COUNT
        assert b.exchange.connections() == [connection]
        assert not b.exchange.standing.counts
        assert not a.exchange.standing.counts


async def test_bitmaps_follow_what_comes_and_goes(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER, chunks=[0, 5]) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        b.exchange.follow(b.swarm)
        await b.exchange.connect("127.0.0.1", a.port)
        await settled(lambda: b.exchange.holders(b.swarm, 5))
        assert b.exchange.holders(b.swarm, 1) == []
        assert b.exchange.holders(bytes(32), 0) == []
        await a.pool.add(a.segment, 1, LAYER.verified(1))
        await settled(lambda: b.exchange.holders(b.swarm, 1) == [a.id])
        a.segment.presence.clear(5)
        await settled(lambda: not b.exchange.holders(b.swarm, 5))
        b.exchange.unfollow(b.swarm)
        assert b.exchange.holders(b.swarm, 1) == []
        await settled(lambda: not a.exchange.connections()[0].serving.joined)


async def test_what_the_peer_has_not_is_missing_not_an_error(tmp_path: Path) -> None:
    async with pair(tmp_path, chunks=[0, 2]) as (a, b):
        answer = await b.exchange.fetch(
            a.id, b.swarm, b.segment.table, [0, 1, 2, 3], priority=0, landed=b.landed
        )
        assert answer.missing == [1, 3]
        assert 0 not in b.missing()
        assert not b.exchange.standing.counts


async def test_unknown_and_forbidden_swarms_get_the_same_answer(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        a.exchange._offers._shares = Shares()  # type: ignore[attr-defined]  # knows of no image
        async with raw(a) as ends:
            answers = []
            for swarm in (bytes(32), b.swarm):
                await say(ends, Want(1, 0, swarm, ((0, 2),)), Join(swarm))
                answers.append([dataclass_free(frame) for frame in await hear(ends, 2)])
            assert answers[0][0] == answers[1][0] == encode(Missing(1))
            assert answers[0][1].replace(bytes(32), b.swarm) == answers[1][1]


def dataclass_free(frame: Frame) -> bytes:
    return encode(frame)


async def test_documents_come_from_peers_checked(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        document = random.Random(1).randbytes(3 << 20)
        digest = Digest.of(document)
        await a.pool.put_object(digest, document)
        assert await b.exchange.document(digest.raw, limit_bytes=4 << 20) == document
        assert await b.exchange.document(bytes(32), limit_bytes=4 << 20) is None
        assert not b.exchange.standing.counts

        async def lie(_: bytes) -> bytes:
            return b"something else"

        a.exchange._offers.document = lie  # type: ignore[method-assign]
        assert await b.exchange.document(digest.raw, limit_bytes=4 << 20) is None
        assert b.exchange.standing.counts == {Fault.CORRUPT: 1}


async def test_document_larger_than_expected_is_refused_before_it_is_held(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        document = bytes(100_000)
        await a.pool.put_object(Digest.of(document), document)
        assert await b.exchange.document(Digest.of(document).raw, limit_bytes=1000) is None
        assert b.exchange.standing.counts == {Fault.PROTOCOL: 1}


@pytest.mark.parametrize(
    ("claim", "fault"), [(bytes(2000), None), (bytes(2049), Fault.PROTOCOL), (None, None)], ids=str
)
async def test_claims_about_indexes_come_from_peers_as_they_are(
    tmp_path: Path, claim: bytes | None, fault: Fault | None
) -> None:
    async with pair(tmp_path) as (a, b):
        a.exchange._offers.index = lambda diff_id: claim if diff_id == bytes(32) else None  # type: ignore[method-assign]
        told: list[tuple[PeerId, bytes]] = []
        await b.exchange.index_claims(bytes(32), lambda peer, data: told.append((peer, data)))
        assert told == ([(a.id, claim)] if claim is not None and fault is None else [])
        assert list(b.exchange.standing.counts) == ([] if fault is None else [fault])


async def test_question_about_an_index_that_was_not_agreed_on_is_a_fault(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a, features=Feature.ZSTD) as ends:
        await settled(a.exchange.connections)
        await say(ends, IndexWant(1, bytes(32)))
        await settled(lambda: a.exchange.standing.counts == {Fault.PROTOCOL: 1})


async def test_peer_whose_lie_comes_out_later_loses_its_place(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        b.exchange.blame(a.id, ImageInvalid("it lied"))
        await settled(lambda: not b.exchange.connections())
        assert b.exchange.standing.counts == {Fault.LIE: 1}
        with pytest.raises(SourceUnavailable, match="lost its place"):
            await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
        stranger = Identity.new().peer_id
        b.exchange.blame(stranger, ImageInvalid("it lied, and has left"))
        assert b.exchange.standing.out_until(stranger, trio.current_time())


async def test_chunks_travel_compressed_where_both_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Uploads, "compresses", lambda *arguments: True)
    async with pair(tmp_path) as (a, b):
        await fetch(b, a)
        assert check_content(b.segment, LAYER) == COUNT
        assert a.exchange.uploads.compressed_chunks == 1  # the others are random bytes
        assert a.exchange.uploads.wire_bytes < a.exchange.uploads.raw_bytes


async def test_peer_without_zstd_gets_raw_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uploads, "compresses", lambda *arguments: True)
    plain = Credentials.make(Identity.new(), Admission(), Feature(0))
    async with pair(tmp_path, credentials=plain) as (a, b):
        await fetch(b, a)
        assert a.exchange.uploads.compressed_chunks == 0


@pytest.mark.parametrize("versions", [(1, 2), (1, 1)])
async def test_neighbouring_versions_understand_each_other(tmp_path: Path, versions: tuple[int, int]) -> None:
    later = dataclasses.replace(Credentials.make(Identity.new(), Admission()), versions=versions)
    async with pair(tmp_path, credentials=later) as (a, b):
        await fetch(b, a)
        (connection,) = b.exchange.connections()
        assert connection.version == 1


async def refused(tmp_path: Path, giver: dict[str, object], taker: dict[str, object]) -> str:
    """Why the two do not get together; nothing may have been exchanged."""
    async with (
        open_peer(tmp_path / "a", LAYER, **giver) as a,  # type: ignore[arg-type]
        open_peer(tmp_path / "b", LAYER, chunks=(), **taker) as b,  # type: ignore[arg-type]
    ):
        with pytest.raises(P2pgzError) as caught:  # noqa: PT012  # which end notices first is open
            await b.exchange.connect("127.0.0.1", a.port)
            await fetch(b, a)
        assert len(b.missing()) == COUNT
        await settled(lambda: not a.exchange.connections() and not b.exchange.connections())
        return str(caught.value)


async def test_version_from_another_time_is_refused(tmp_path: Path) -> None:
    later = dataclasses.replace(Credentials.make(Identity.new(), Admission()), versions=(2, 3))
    assert "versions" in await refused(tmp_path, {"credentials": later}, {})


async def test_wrong_cluster_key_is_refused(tmp_path: Path) -> None:
    mine, other = Admission(cluster_keys=[KEY]), Admission(cluster_keys=[b"x" * 32])
    assert "not admitted" in await refused(tmp_path / "1", {"admission": mine}, {"admission": other})
    assert "not_admitted" in await refused(tmp_path / "2", {"admission": mine}, {})


async def test_same_cluster_key_lets_in(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER, admission=Admission(cluster_keys=[KEY])) as a,
        open_peer(tmp_path / "b", LAYER, chunks=(), admission=Admission(cluster_keys=[b"n" * 32, KEY])) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port)
        await fetch(b, a)
        assert b.missing() == []


async def test_own_identity_on_another_host_is_refused(tmp_path: Path) -> None:
    identity = Identity.new()
    assert "our identity" in await refused(tmp_path, {"identity": identity}, {"identity": identity})


async def test_another_peer_than_expected_is_not_connected_to(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, open_peer(tmp_path / "b", LAYER, chunks=()) as b:
        expected = PeerId.of_ed25519(bytes(32))
        with pytest.raises(SourceUnavailable, match="should be"):
            await b.exchange.connect("127.0.0.1", a.port, expected=expected)
        assert b.exchange.connections() == []
        for innocent in (expected, a.id):
            assert not b.exchange.standing.banned(innocent, trio.current_time())


async def test_banned_peer_is_not_served(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, open_peer(tmp_path / "b", LAYER, chunks=()) as b:
        a.exchange.standing.fault(b.id, Fault.CORRUPT, trio.current_time())
        with pytest.raises(SourceUnavailable):  # noqa: PT012  # which end notices first is open
            await b.exchange.connect("127.0.0.1", a.port)
            await fetch(b, a)
        assert len(b.missing()) == COUNT


async def test_many_callers_dial_once(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, open_peer(tmp_path / "b", LAYER, chunks=()) as b:
        found = []

        async def connect() -> None:
            found.append(await b.exchange.connect("127.0.0.1", a.port, expected=a.id))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(connect)
        assert len(set(map(id, found))) == 1


async def test_dead_and_silent_addresses_fail_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialling_module, "DIAL_SECONDS", 0.3)
    async with open_peer(tmp_path / "b", LAYER, chunks=()) as b:
        (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with silent:
            port = silent.socket.getsockname()[1]
            with trio.fail_after(3), pytest.raises(SourceUnavailable, match="no answer"):
                await b.exchange.connect("127.0.0.1", port)
        with pytest.raises(SourceUnavailable):
            await b.exchange.connect("127.0.0.1", port)


async def test_leaving_peer_says_goodbye_and_is_not_blamed(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "b", LAYER, chunks=()) as b:
        async with open_peer(tmp_path / "a", LAYER) as a:
            connection = await b.exchange.connect("127.0.0.1", a.port, expected=a.id)
            await fetch(b, a, [0])
        await settled(lambda: connection.ended)
        assert connection.error is not None
        assert "leaving" in str(connection.error)
        assert not b.exchange.standing.counts


async def test_idle_connection_is_given_up_unless_bitmaps_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(tending, "WATCH_SECONDS", 0.05)
    async with pair(tmp_path) as (_, b):
        await settled(lambda: not b.exchange.connections())
        assert not b.exchange.standing.counts
    async with pair(tmp_path) as (_, b):
        b.exchange.follow(b.swarm)
        await trio.sleep(0.6)
        assert b.exchange.connections()


async def test_followers_are_told_after_a_quiet_time_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tending, "TELL_SECONDS", 0.01)
    monkeypatch.setattr(tending, "TELL_QUIET_SECONDS", 0.02)
    async with (
        open_peer(tmp_path / "a", LAYER, chunks=[0]) as a,
        open_peer(tmp_path / "b", LAYER, chunks=()) as b,
    ):
        b.exchange.follow(b.swarm)
        await b.exchange.connect("127.0.0.1", a.port)
        await settled(lambda: b.exchange.holders(b.swarm, 0))
        await trio.sleep(0.01 * tending.QUIET_ROUNDS + 0.1)
        await a.pool.add_many(a.segment, [(1, LAYER.verified(1))])
        await settled(lambda: b.exchange.holders(b.swarm, 1))


async def test_silence_is_asked_about_and_then_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "PING_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(connection_module, "PONG_WITHIN_SECONDS", 0.2)
    monkeypatch.setattr(tending, "WATCH_SECONDS", 0.02)
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a) as ends:
        (ping,) = await hear(ends, 1)
        assert isinstance(ping, Ping)
        await say(ends, Pong(ping.token))
        (ping,) = await hear(ends, 1)
        await settled(lambda: not a.exchange.connections())
        assert a.exchange.standing.counts == {Fault.LOST: 1}


# --- a rude peer: our own end is the raw stream


@asynccontextmanager
async def raw(peer: Peer, features: Feature = FEATURES) -> AsyncIterator[Handshaken]:
    """A connection to `peer` whose frames the test writes itself."""
    stream = await trio.open_tcp_stream("127.0.0.1", peer.port)
    async with stream:
        yield await dial(stream, Credentials.make(Identity.new(), Admission(), features))


async def say(ends: Handshaken, *frames: Frame | bytes) -> None:
    await ends.stream.send_all(b"".join(f if isinstance(f, bytes) else encode(f) for f in frames))


async def hear(ends: Handshaken, count: int) -> list[Frame]:
    """The next frames; their payloads are copied."""
    with trio.fail_after(10):
        while len(ends.frames) < count:
            data = await ends.stream.receive()
            if not data:
                raise EOFError
            ends.frames.extend(ends.reader.feed(data))
    heard, ends.frames[:] = ends.frames[:count], ends.frames[count:]
    return heard


async def test_ten_thousand_requests_are_answered_busy_and_end_the_connection(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER, uploads=Uploads(bytes_per_second=50_000)) as a,
        raw(a) as ends,
    ):
        for first in range(0, 10_000, 500):
            with trio.move_on_after(5):
                try:
                    await say(ends, *(Want(n, 3, a.swarm, ((1, 20),)) for n in range(first, first + 500)))
                except trio.BrokenResourceError:
                    break
        await settled(lambda: not a.exchange.connections())
        assert a.exchange.standing.counts == {Fault.PROTOCOL: 1}
        assert a.exchange.uploads.busy > REFUSALS_MAX - 100


@pytest.mark.parametrize("frame", [Ping(1), Pong(1), Join(bytes(32)), Leave(bytes(32)), Forget(5)])
async def test_flood_of_frames_that_nobody_asked_for_ends_the_connection(
    tmp_path: Path, frame: Frame
) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a) as ends, trio.open_nursery() as nursery:

        async def read_all() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while await ends.stream.receive():
                    pass

        nursery.start_soon(read_all)
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012  # the end comes when it comes
            for _ in range(100):
                await ends.stream.send_all(encode(frame) * 500)
        await settled(lambda: a.exchange.standing.counts)
        assert a.exchange.standing.counts == {Fault.PROTOCOL: 1}


async def test_many_small_frames_do_not_keep_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unasked_module, "UNASKED_MAX", 1 << 30)
    monkeypatch.setattr(unasked_module, "UNASKED_PER_SECOND", 0)
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a) as ends, trio.open_nursery() as nursery:
        turns = []

        def handled() -> float:
            return max((c._unasked.frames for c in a.exchange.connections()), default=0.0)

        async def others() -> None:
            while True:
                turns.append(handled())
                await trio.lowlevel.checkpoint()

        nursery.start_soon(others)
        await ends.stream.send_all(encode(Pong(1)) * 10_000)
        await settled(lambda: handled() >= 10_000)
        nursery.cancel_scope.cancel()
        assert max(later - before for before, later in itertools.pairwise(turns)) <= 4 * FRAMES_AT_ONCE


async def test_limits_are_those_of_the_specification(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER, uploads=Uploads(slots=1)) as a, raw(a) as ends:
        async with a.exchange.uploads.slot():  # nothing goes out
            await say(ends, *(Want(n, 3, a.swarm, ((1, 1),)) for n in range(REQUESTS_MAX + 1)))
            (frame,) = await hear(ends, 1)
        assert isinstance(frame, Busy)
        assert frame.request == REQUESTS_MAX
        assert all(isinstance(frame, Data) for frame in await hear(ends, REQUESTS_MAX))


async def test_every_chunk_of_a_forgotten_request_gets_one_answer(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a) as ends:
        answered: dict[int, int] = {}
        await say(
            ends, Want(1, 3, a.swarm, ((0, COUNT),)), Forget(1, ((3, 4),)), Forget(1), Forget(1), Forget(77)
        )
        await say(ends, Want(2, 0, a.swarm, ((0, 1),)))
        while sum(answered.values()) < COUNT + 1:
            (frame,) = await hear(ends, 1)
            if isinstance(frame, Data) and frame.offset + len(frame.payload) == frame.total:
                answered[frame.chunk] = answered.get(frame.chunk, 0) + 1
            elif isinstance(frame, Missing):
                for first, count in frame.runs:
                    for n in range(first, first + count):
                        answered[n] = answered.get(n, 0) + 1
        assert answered == {n: 2 if n == 0 else 1 for n in range(COUNT)}


async def test_peer_that_never_reads_is_dropped_and_holds_no_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SEND_SECONDS", 0.5)
    async with open_peer(tmp_path / "a", LAYER, uploads=Uploads(slots=1)) as a, raw(a) as ends:
        ends.stream.transport.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
        for n in range(40):
            await say(ends, Want(n, 3, a.swarm, ((1, COUNT - 1),)))
        await settled(lambda: a.exchange.standing.counts == {Fault.SLOW: 1}, 10)
        async with open_peer(tmp_path / "b", LAYER, chunks=()) as b:
            await b.exchange.connect("127.0.0.1", a.port)
            await fetch(b, a)
            assert b.missing() == []


@pytest.mark.parametrize(
    "rude",
    [
        HEADER.pack(0xFFFF_FFFF, FrameType.WANT),
        HEADER.pack(0xFFFF_FFFF, 0x90),
        HEADER.pack(0, 0x7E),
        encode(Want(1, 0, bytes(32), ((5, 1), (5, 1)))),
        encode(Data(9, 0, 0, 0, 1, b"x")),  # type: ignore[arg-type]
        encode(Doc(9, 0, 1, b"x")),
        encode(Missing(9, ((0, 1),))),
        encode(Busy(9, 1)),
    ],
    ids=["4 GB", "4 GB optional", "unknown", "overlapping runs", "data", "document", "missing", "busy"],
)
async def test_rude_frames_cost_the_connection_only(tmp_path: Path, rude: bytes) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a:
        async with raw(a) as ends:
            await settled(a.exchange.connections)  # what comes with the hello is of a peer not yet proven
            await say(ends, rude)
            await settled(lambda: a.exchange.standing.counts == {Fault.PROTOCOL: 1})
        async with open_peer(tmp_path / "b", LAYER, chunks=()) as b:
            await b.exchange.connect("127.0.0.1", a.port)
            await fetch(b, a, [0])


async def test_bug_in_answering_one_peer_is_that_peers_problem(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a:
        real = a.exchange._offers.swarm

        def broken(swarm: bytes) -> object:
            if swarm == bytes(32):
                raise RuntimeError("a bug")
            return real(swarm)

        a.exchange._offers.swarm = broken  # type: ignore[method-assign, assignment]
        async with raw(a) as ends:
            await say(ends, Want(1, 0, bytes(32), runs_of([0])))
            await settled(lambda: not a.exchange.connections())
        async with open_peer(tmp_path / "b", LAYER, chunks=()) as b:
            await b.exchange.connect("127.0.0.1", a.port)
            await fetch(b, a, [0])


async def test_client_of_another_protocol_is_turned_away(tmp_path: Path) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        raw_stream = await trio.open_tcp_stream("127.0.0.1", a.port)
        stream = trio.SSLStream(raw_stream, context, https_compatible=True)
        with trio.fail_after(5):
            try:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass
        await trio.aclose_forcefully(raw_stream)
        assert a.exchange.connections() == []


async def test_no_more_connections_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_peer(tmp_path / "a", LAYER) as a, raw(a) as first, raw(a) as second:
        a.exchange.budget.limit = 2
        await settled(lambda: len(a.exchange.connections()) == 2)
        async with raw(a) as third:  # the others have just come
            (frame,) = await hear(third, 1)
            assert isinstance(frame, Goodbye)
            assert frame.reason is GoodbyeReason.TOO_MANY
        assert (a.exchange.budget.refused, a.exchange.budget.closed) == (1, 0)
        monkeypatch.setattr(budget_module, "IDLE_FOR_OTHERS_SECONDS", 0.1)
        await trio.sleep(0.15)
        await say(second, Join(a.swarm), Want(1, 0, a.swarm, ((0, 1),)))
        await hear(second, 2)
        async with raw(a) as fourth:  # the one that is idle goes, the one that asks stays
            (frame,) = await hear(first, 1)
            assert isinstance(frame, Goodbye)
            assert frame.reason is GoodbyeReason.TOO_MANY
            await say(fourth, Want(1, 0, a.swarm, ((1, 1),)))
            assert isinstance((await hear(fourth, 1))[0], Data)
        assert (a.exchange.budget.refused, a.exchange.budget.closed) == (1, 1)


async def test_a_peer_that_has_what_we_read_is_the_last_to_go(tmp_path: Path) -> None:
    async with (
        open_peer(tmp_path / "a", LAYER, chunks=()) as a,
        open_peer(tmp_path / "b", LAYER) as useful,
        open_peer(tmp_path / "c", LAYER, chunks=()) as useless,
    ):
        a.exchange.follow(a.swarm)
        for peer in (useful, useless):
            await a.exchange.connect("127.0.0.1", peer.port)
        await settled(lambda: a.exchange.holders(a.swarm, 0))
        connections, later = a.exchange.connections(), trio.current_time() + 60
        victim = a.exchange.budget.victim(connections, later, for_ourselves=True)
        assert victim is not None
        assert victim.peer == useless.id


async def test_connections_leave_descriptors_to_the_rest() -> None:
    assert connections_within(20_000, 128) == 128
    assert connections_within(700, 128) == 60
    assert connections_within(256, 128) == 8
    most = raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most


async def test_busy_peer_names_others_and_says_when_to_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Alternative(PeerId.of_ed25519(bytes(32)).raw, "/ip4/10.0.0.1/tcp/4001")
    monkeypatch.setattr(Uploads, "busy_ms", lambda uploads, priority: 70)
    async with pair(tmp_path, uploads=Uploads(alternatives=lambda swarm: (other,))) as (a, b):
        answer = await b.exchange.fetch(
            a.id, b.swarm, b.segment.table, [0, 1, 7], priority=0, landed=b.landed
        )
        assert (answer.missing, answer.busy) == ([], [0, 1, 7])
        assert answer.alternatives == (other,)
        assert answer.retry_seconds == 0.07
        assert a.exchange.uploads.busy == 1
        assert not b.exchange.standing.counts


async def test_chunks_larger_than_a_part_and_chunks_of_zeros_arrive(tmp_path: Path) -> None:
    large = random.Random(2).randbytes(20 << 20)
    layer = Layer([[large], [bytes(300_000), b"tail"], [b"x"]], zeros=[1])
    async with (
        open_peer(tmp_path / "a", layer) as a,
        open_peer(tmp_path / "b", layer, chunks=()) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port)
        await fetch(b, a)
        assert check_content(b.segment, layer) == 4


async def test_chunk_that_goes_away_while_it_is_asked_for_is_missing(tmp_path: Path) -> None:
    async with pair(tmp_path, uploads=Uploads(bytes_per_second=5_000_000)) as (a, b):
        outcome = []

        async def ask() -> None:
            outcome.append(
                await b.exchange.fetch(
                    a.id, b.swarm, b.segment.table, list(range(COUNT)), priority=0, landed=b.landed
                )
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settled(lambda: b.segment.presence.has(0))
            for n in range(COUNT - 5, COUNT):
                a.segment.presence.clear(n)
        assert outcome[0].missing == list(range(COUNT - 5, COUNT))
        assert b.missing() == outcome[0].missing
