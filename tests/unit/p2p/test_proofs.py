"""Images that are not for every peer, between exchanges on loopback with real pools: who gets what, and who does not."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from p2pgz.core import sharing
from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.frames import encode
from p2pgz.core.messages import (
    Bitmap,
    Doc,
    DocWant,
    Feature,
    Frame,
    Goodbye,
    Join,
    Leave,
    Missing,
    Proof,
    ProofDocWant,
    ProofJoin,
    Want,
)
from p2pgz.core.sharing import Mode, Policy, Rule, document_name, image_secret, swarm_name
from p2pgz.core.standing import Fault
from p2pgz.errors import PeerFault
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.shares import Place, Shares
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials, Handshaken, dial
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.plane import open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool, Segment, SegmentMeta
from p2pgz.pool.segment import SHARED_DOMAIN
from p2pgz.testing.conformance_pool import check_content
from p2pgz.testing.peers import peer_layer

LAYER = peer_layer(21)
COUNT = len(LAYER.chunks)
TOC = LAYER.toc.digest.raw
MANIFEST = b'{"schemaVersion":2,"layers":["of a test"]}'
MANIFEST_DIGEST = Digest.of(MANIFEST)
CONFIG = random.Random(3).randbytes(5000)
REPOSITORY = "registry.test/secret/app"
SECRET = image_secret(MANIFEST)
SWARM = swarm_name(SECRET, TOC)
KEY = b"k" * 32
pytestmark = pytest.mark.trio


@dataclass(slots=True)
class Member:
    """A node of the cluster that has opened the image, or, without a segment, has not."""

    pool: Pool
    exchange: Exchange
    shares: Shares
    place: Place
    port: int
    segment: Segment | None = None

    async def open_image(self, chunks: range) -> Segment:
        domain = self.place.domain
        self.segment = await self.pool.open_segment(LAYER.layout, SegmentMeta(domain=domain))
        await self.pool.add_many(self.segment, [(n, LAYER.verified(n)) for n in chunks])
        config = Digest.of(CONFIG)
        await self.pool.put_object(config, CONFIG, domain=domain)
        await self.pool.put_object(MANIFEST_DIGEST, MANIFEST, domain=self.place.manifest_domain)
        await self.shares.add(self.place, segments=[self.segment], documents=[config])
        return self.segment

    async def fetch(self, peer: Member, swarm: bytes) -> None:
        segment = self.segment
        assert segment is not None

        async def landed(good: list) -> None:  # type: ignore[type-arg]
            await self.pool.add_many(segment, good)

        missing = segment.presence.missing(0, COUNT)
        await self.exchange.fetch(
            peer.exchange.own_id, swarm, segment.table, missing, priority=3, landed=landed
        )


@asynccontextmanager
async def member(
    directory: Path,
    mode: Mode,
    chunks: range | None = None,
    *,
    identity: Identity | None = None,
    features: Feature | None = None,
) -> AsyncIterator[Member]:
    """A member that gives the image's repository this mode; with `chunks` it has opened the image and has these."""
    async with Pool.open(directory, boot_id="test", check_filesystem=False) as pool:
        shares = Shares(Policy([Rule("registry.test/secret/*", mode)]), directory)
        admission = Admission(cluster_keys=[KEY])
        credentials = Credentials.make(
            identity or Identity.new(), admission, *([] if features is None else [features])
        )
        async with open_plane(credentials, PoolOffers(pool, shares), Uploads(), host="127.0.0.1") as plane:
            place = shares.place(REPOSITORY, MANIFEST_DIGEST, MANIFEST)
            found = Member(pool, plane.exchange, shares, place, plane.port)
            if chunks is not None:
                await found.open_image(chunks)
            yield found


@asynccontextmanager
async def raw(
    holder: Member, *, identity: Identity | None = None, key: bytes = KEY
) -> AsyncIterator[Handshaken]:
    """An admitted peer that says what it likes."""
    credentials = Credentials.make(identity or Identity.new(), Admission(cluster_keys=[key]))
    async with await trio.open_tcp_stream("127.0.0.1", holder.port) as stream:
        yield await dial(stream, credentials)


async def say(ends: Handshaken, *frames: Frame) -> None:
    await ends.stream.send_all(b"".join(map(encode, frames)))


async def hear(ends: Handshaken, count: int) -> list[Frame]:
    frames = list(ends.frames)
    ends.frames.clear()
    with trio.fail_after(5):
        while len(frames) < count:
            data = await ends.stream.receive()
            assert data, "the connection has ended"
            frames += ends.reader.feed(data)
    return frames


async def settled(condition: object, seconds: float = 5.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


async def nothing_is_told(holder: Member, *extra: tuple[bytes, bytes]) -> None:
    """An admitted peer that knows every digest, and shows these proofs for these names, hears what it hears of nothing."""
    async with raw(holder) as ends:
        answers = []
        for name in (bytes(32), TOC, SWARM, document_name(SECRET, TOC)):
            await say(ends, Join(name), Want(1, 0, name, ((0, 2),)), Leave(name))
            answers.append([encode(frame).replace(name, bytes(32)) for frame in await hear(ends, 2)])
        for name, proof in ((bytes(32), bytes(32)), *extra):
            await say(ends, ProofJoin(name, proof), Want(1, 0, name, ((0, 2),)), Leave(name))
            answers.append([encode(frame).replace(name, bytes(32)) for frame in await hear(ends, 2)])
        assert all(answer == answers[0] for answer in answers)
        assert answers[0] == [encode(Bitmap(bytes(32), 0, b"")), encode(Missing(1))]
        for digest in (bytes(32), MANIFEST_DIGEST.raw, Digest.of(CONFIG).raw, document_name(SECRET, TOC)):
            await say(ends, DocWant(2, digest))
            assert await hear(ends, 1) == [Missing(2)]
        for name in (bytes(32), document_name(SECRET, MANIFEST_DIGEST.raw)):
            await say(ends, ProofDocWant(3, name, bytes(32)))
            assert await hear(ends, 1) == [Missing(3)]


async def test_a_prover_gets_the_image_from_a_prover(tmp_path: Path) -> None:
    async with (
        member(tmp_path / "a", Mode.PROOF, range(COUNT)) as a,
        member(tmp_path / "b", Mode.PROOF, range(0)) as b,
    ):
        b.exchange.follow(SWARM, SECRET)
        await b.exchange.connect("127.0.0.1", a.port, expected=a.exchange.own_id)
        await settled(lambda: b.exchange.holders(SWARM, 0))
        await b.fetch(a, SWARM)
        assert b.segment is not None
        assert check_content(b.segment, LAYER) == COUNT
        for document in (CONFIG, MANIFEST):
            digest = hashlib.sha256(document).digest()
            assert await b.exchange.document(digest, limit_bytes=9000, secret=SECRET) == document
            assert await b.exchange.document(digest, limit_bytes=9000) is None
        assert not a.exchange.standing.counts
        assert not b.exchange.standing.counts


async def test_changes_are_told_to_provers_and_leaving_ends_it(tmp_path: Path) -> None:
    async with (
        member(tmp_path / "a", Mode.PROOF, range(3)) as a,
        member(tmp_path / "b", Mode.PROOF, range(0)) as b,
    ):
        connection = await b.exchange.connect("127.0.0.1", a.port)
        b.exchange.follow(SWARM, SECRET)
        await settled(lambda: connection.bitmaps.count(SWARM) == 3)
        assert a.segment is not None
        await a.pool.add_many(a.segment, [(5, LAYER.verified(5))])
        await settled(lambda: connection.bitmaps.has(SWARM, 5))
        for _ in range(3):  # proofs that are on their way when one leaves and joins again are no fault
            b.exchange.unfollow(SWARM)
            b.exchange.follow(SWARM, SECRET)
        await settled(lambda: connection.bitmaps.count(SWARM) == 4)
        b.exchange.unfollow(SWARM)
        await settled(lambda: not a.exchange.connections()[0].serving.joined)
        await b.fetch(a, SWARM)
        assert b.segment is not None
        assert b.segment.presence.present_count() == 0
        assert not connection.ended


async def test_a_proof_counts_when_the_holder_opens_the_image_later(tmp_path: Path) -> None:
    async with (
        member(tmp_path / "a", Mode.PROOF) as a,
        member(tmp_path / "b", Mode.PROOF, range(0)) as b,
    ):
        b.exchange.follow(SWARM, SECRET)
        connection = await b.exchange.connect("127.0.0.1", a.port)
        await settled(lambda: a.exchange.connections() and a.exchange.connections()[0].serving.joined)
        assert connection.bitmaps.count(SWARM) == 0
        await a.open_image(range(7))
        await settled(lambda: connection.bitmaps.count(SWARM) == 7)


async def test_digests_and_names_without_a_proof_tell_nothing(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with member(tmp_path, Mode.PROOF, range(COUNT)) as a:
        await nothing_is_told(a, (SWARM, bytes(32)), (SWARM, rng.randbytes(32)), (TOC, rng.randbytes(32)))


async def test_an_image_that_is_not_shared_is_given_to_nobody(tmp_path: Path) -> None:
    async with member(tmp_path / "a", Mode.NONE, range(COUNT)) as a:
        await nothing_is_told(a, (SWARM, bytes(32)))
        async with member(tmp_path / "b", Mode.PROOF, range(0)) as b:
            b.exchange.follow(SWARM, SECRET)
            connection = await b.exchange.connect("127.0.0.1", a.port)
            await settled(lambda: any(c.serving.joined for c in a.exchange.connections()))
            await b.fetch(a, SWARM)
            assert connection.bitmaps.count(SWARM) == 0
            assert await b.exchange.document(MANIFEST_DIGEST.raw, limit_bytes=9000, secret=SECRET) is None
            assert b.segment is not None
            assert b.segment.presence.present_count() == 0


async def test_an_image_of_the_cluster_is_for_every_admitted_peer_and_nobody_else(tmp_path: Path) -> None:
    async with member(tmp_path / "a", Mode.CLUSTER, range(COUNT)) as a:
        async with raw(a) as ends:
            await say(ends, Join(TOC), DocWant(1, Digest.of(CONFIG).raw))
            frames = await hear(ends, 2)
            assert sorted(type(frame).__name__ for frame in frames) == ["Bitmap", "Doc"]
            await say(ends, ProofJoin(SWARM, ends.proofs.join(SECRET, SWARM)))  # the wrong words for it
            assert await hear(ends, 1) == [Bitmap(SWARM, 0, memoryview(b""))]
        with pytest.raises(PeerFault):  # an outsider that knows the digest: neither end admits the other
            async with raw(a, key=b"x" * 32):
                pass
        stranger = Credentials.make(Identity.new(), Admission())  # and one that would admit anybody
        async with await trio.open_tcp_stream("127.0.0.1", a.port) as stream:
            ends = await dial(stream, stranger)
            await say(ends, Join(TOC), Want(1, 0, TOC, ((0, 1),)), DocWant(2, MANIFEST_DIGEST.raw))
            (answer,) = await hear(ends, 1)
            assert isinstance(answer, Goodbye)


async def test_proofs_do_not_serve_on_other_connections(tmp_path: Path) -> None:
    """Seen by another holder, from an earlier connection of the same identity, or sent back by the holder itself."""
    mine = Identity.new()
    async with (
        member(tmp_path / "a", Mode.PROOF, range(COUNT)) as a,
        member(tmp_path / "b", Mode.PROOF, range(COUNT)) as b,
    ):
        async with raw(a, identity=mine) as first, raw(b, identity=mine) as second:
            earlier = first.proofs.join(SECRET, SWARM)
            other_holder = second.proofs.join(SECRET, SWARM)
            await say(first, ProofJoin(SWARM, earlier))
            assert [type(frame) for frame in await hear(first, 2)] == [Proof, Bitmap]
        async with raw(a, identity=mine) as again:
            for proof in (earlier, other_holder, again.proofs.answer(SECRET, SWARM)):
                await say(again, ProofJoin(SWARM, proof), Want(1, 0, SWARM, ((0, 1),)))
                assert await hear(again, 2) == [Bitmap(SWARM, 0, memoryview(b"")), Missing(1)]
            name = document_name(SECRET, MANIFEST_DIGEST.raw)
            await say(again, ProofDocWant(2, name, again.proofs.join(SECRET, name)))
            assert await hear(again, 1) == [Missing(2)]
            await say(again, ProofDocWant(3, name, again.proofs.document(SECRET, name)))
            assert await hear(again, 1) == [Doc(3, 0, len(MANIFEST), memoryview(MANIFEST))]
            await say(again, ProofJoin(SWARM, again.proofs.join(SECRET, SWARM)), Join(SWARM))
            frames = await hear(again, 3)
            assert [type(frame) for frame in frames] == [Proof, Bitmap, Bitmap]
            assert isinstance(frames[2], Bitmap)
            assert frames[2].count == 0  # an open join replaces the proven one


@pytest.mark.parametrize("lie", ["no proof", "wrong proof", "own proof back"])
async def test_a_holder_that_does_not_know_the_image_is_not_believed(tmp_path: Path, lie: str) -> None:
    async with member(tmp_path, Mode.PROOF, range(0)) as b:
        b.exchange.follow(SWARM, SECRET)
        async with raw(b) as ends:
            (joined,) = await hear(ends, 1)
            assert isinstance(joined, ProofJoin)
            count = COUNT
            bitmap = Bitmap(SWARM, count, ((1 << count) - 1).to_bytes((count + 7) // 8, "little"))
            proofs = {"no proof": [], "wrong proof": [bytes(32)], "own proof back": [joined.proof]}[lie]
            await say(ends, *(Proof(SWARM, proof) for proof in proofs), bitmap)
            await settled(lambda: not b.exchange.connections())
            assert b.exchange.standing.counts == {Fault.PROTOCOL: 1}
            assert b.exchange.holders(SWARM, 0) == []


async def test_older_peers_are_not_asked_in_words_that_they_do_not_know(tmp_path: Path) -> None:
    async with (
        member(tmp_path / "a", Mode.PROOF, range(COUNT), features=Feature.ZSTD) as a,
        member(tmp_path / "b", Mode.PROOF, range(0)) as b,
    ):
        b.exchange.follow(SWARM, SECRET)
        connection = await b.exchange.connect("127.0.0.1", a.port)
        assert await b.exchange.document(MANIFEST_DIGEST.raw, limit_bytes=9000, secret=SECRET) is None
        assert not connection.ended
        assert not a.exchange.connections()[0].serving.joined
        for frame in (ProofJoin(SWARM, bytes(32)), ProofDocWant(1, SWARM, bytes(32))):
            async with raw(a) as ends:
                await say(ends, frame)
                with trio.fail_after(5):
                    assert not await ends.stream.receive()
        assert a.exchange.standing.counts == {Fault.PROTOCOL: 2}


async def test_the_same_layer_in_two_modes_is_two_segments(tmp_path: Path) -> None:
    """An open image and a private one with the same TOC: each gives and gets its own, under its own name."""
    async with member(tmp_path, Mode.PROOF, range(5)) as a:
        public = await a.pool.open_segment(LAYER.layout)
        await a.pool.add_many(public, [(n, LAYER.verified(n)) for n in range(5, 9)])
        place = a.shares.place("registry.test/public", MANIFEST_DIGEST, MANIFEST)
        assert (place.mode, place.domain) == (Mode.CLUSTER, SHARED_DOMAIN)
        await a.shares.add(place, segments=[public], documents=[])
        assert not await a.pool.copy_from(public, 0)  # the other tenant's bytes, by their digest
        assert a.segment is not None
        assert not await a.pool.copy_from(a.segment, 6)
        async with raw(a) as ends:
            await say(ends, Join(TOC))
            (open_one,) = await hear(ends, 1)
            await say(ends, ProofJoin(SWARM, ends.proofs.join(SECRET, SWARM)))
            _, closed_one = await hear(ends, 2)
            assert isinstance(open_one, Bitmap)
            assert isinstance(closed_one, Bitmap)
            assert int.from_bytes(open_one.bits, "little") == 0b1_1110_0000
            assert int.from_bytes(closed_one.bits, "little") == 0b1_1111


async def test_a_repository_that_has_become_private_is_not_shared_after_a_restart(tmp_path: Path) -> None:
    async with member(tmp_path, Mode.CLUSTER, range(COUNT)):
        pass
    for mode in (Mode.PROOF, Mode.NONE):
        async with member(tmp_path, mode) as a:
            await a.shares.load(a.pool)
            await nothing_is_told(a, (SWARM, bytes(32)))
    async with member(tmp_path, Mode.CLUSTER) as a:
        await a.shares.load(a.pool)
        async with raw(a) as ends:
            await say(ends, DocWant(1, Digest.of(CONFIG).raw))
            assert isinstance((await hear(ends, 1))[0], Doc)


async def test_a_private_image_stays_private_when_its_repository_is_opened_to_all(tmp_path: Path) -> None:
    async with member(tmp_path, Mode.PROOF, range(COUNT)):
        pass
    async with member(tmp_path, Mode.CLUSTER) as a:
        await a.shares.load(a.pool)
        await nothing_is_told(a, (SWARM, bytes(32)))
    async with member(tmp_path, Mode.PROOF) as a:  # and is shared again as it was
        await a.shares.load(a.pool)
        async with raw(a) as ends:
            await say(ends, ProofJoin(SWARM, ends.proofs.join(SECRET, SWARM)))
            assert [type(frame) for frame in await hear(ends, 2)] == [Proof, Bitmap]


async def test_unknown_and_not_allowed_are_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One MAC each, and no look at pool or index: what a clock could tell apart on any machine."""
    macs: list[int] = []
    real = sharing._mac

    def counted(*arguments: bytes) -> bytes:
        macs.append(1)
        return real(*arguments)

    async with member(tmp_path, Mode.PROOF, range(COUNT)) as a, raw(a) as ends:
        right = ends.proofs.join(SECRET, SWARM)
        wrong = bytes(31) + b"x"
        monkeypatch.setattr(sharing, "_mac", counted)
        for forbidden in ("segment", "find", "get_object"):
            monkeypatch.setattr(a.pool, forbidden, None)
        name = document_name(SECRET, MANIFEST_DIGEST.raw)
        for unknown, known in (
            (ProofJoin(wrong, right), ProofJoin(SWARM, wrong)),
            (ProofDocWant(1, wrong, right), ProofDocWant(1, name, wrong)),
            (Want(2, 0, wrong, ((0, 1),)), Want(2, 0, TOC, ((0, 1),))),
            (Join(wrong), Join(TOC)),
            (DocWant(3, wrong), DocWant(3, MANIFEST_DIGEST.raw)),
        ):
            work = []
            for frame in (unknown, known):
                macs.clear()
                # leaving at once: a proof that may become right later is looked at again when something changes
                leave = [Leave(frame.swarm)] if isinstance(frame, Join | ProofJoin) else []
                await say(ends, frame, *leave)
                (answer,) = await hear(ends, 1)
                assert answer in (Missing(1), Missing(2), Missing(3)) or getattr(answer, "count", 1) == 0
                work.append(len(macs))
            assert work[0] == work[1] == isinstance(unknown, ProofJoin | ProofDocWant)


async def test_unknown_and_not_allowed_take_the_same_time(tmp_path: Path) -> None:
    """Round trips on one connection, in a shuffled order; the bound is generous, for machines that do other things."""
    rng = random.Random(11)
    async with member(tmp_path, Mode.PROOF, range(COUNT)) as a, raw(a) as ends:
        wrong = rng.randbytes(32)
        name = document_name(SECRET, MANIFEST_DIGEST.raw)
        questions: dict[str, list[Frame]] = {
            "unknown": [ProofJoin(bytes(32), wrong), Want(1, 0, bytes(32), ((0, 1),)), Leave(bytes(32))],
            "not allowed": [ProofJoin(SWARM, wrong), Want(1, 0, SWARM, ((0, 1),)), Leave(SWARM)],
            "unknown document": [ProofDocWant(1, bytes(32), wrong), DocWant(1, bytes(32))],
            "closed document": [ProofDocWant(1, name, wrong), DocWant(1, MANIFEST_DIGEST.raw)],
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in questions}
        order = list(questions) * 150
        rng.shuffle(order)
        for kind in order:
            start = time.perf_counter()
            await say(ends, *questions[kind])
            await hear(ends, 2)
            seconds[kind].append(time.perf_counter() - start)
            await trio.lowlevel.checkpoint()
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        for one, other in (("unknown", "not allowed"), ("unknown document", "closed document")):
            assert abs(medians[one] - medians[other]) < max(1e-4, 0.25 * medians[one]), medians
