"""Plain layers from peers: real exchanges on the loopback interface, real pools, a source that counts what it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from p2pgz.core import indexclaim, indexdoc
from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.indexclaim import IndexClaim
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.media import Descriptor
from p2pgz.core.messages import Feature
from p2pgz.core.model import ChunkKind
from p2pgz.core.ownindex import PlainIndex, PlainIndexer, segment_toc
from p2pgz.core.peerid import PeerId
from p2pgz.core.reference import parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.core.standing import Fault
from p2pgz.core.verify import verify
from p2pgz.errors import ImageInvalid, SourceUnavailable
from p2pgz.fetch import gather, signed
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.indexes import INDEXES, PlainIndexes
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.plainshare import PlainShare
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Access
from p2pgz.fetch.signed import SignedLayers
from p2pgz.fetch.trace import POOL, Kind, Source
from p2pgz.image.layer_records import OpenLayer
from p2pgz.image.layers import LayerOpener
from p2pgz.image.plain_layers import PlainLayers
from p2pgz.p2p.certificate import verify_signature
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.plane import open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool
from p2pgz.testing.memory_source import MemorySource
from p2pgz.testing.vectors import expected_document

VECTORS = Path(__file__).parents[2] / "vectors"
REFERENCE = parse_reference("registry.test/image")
FEATURES = Feature.ZSTD | Feature.PROOF | Feature.INDEX
pytestmark = pytest.mark.trio


@dataclass(frozen=True)
class Layer:
    """A plain layer of the vectors."""

    blob: bytes
    diff_id: Digest

    @classmethod
    def of(cls, name: str) -> Layer:
        expected = expected_document(VECTORS / "expected" / f"{name}.json")
        return cls((VECTORS / expected["blob"]).read_bytes(), Digest.parse(expected["diff_id"]))


def made(name: str) -> tuple[PlainIndex, dict[bytes, bytes]]:
    """The true index of a layer, and its chunks."""
    indexer = PlainIndexer()
    payloads = dict(indexer.feed((VECTORS / "blobs" / f"{name}.tar.tar").read_bytes()))
    return indexer.finish(), payloads


@dataclass
class Host:
    """What a node has of it all."""

    pool: Pool
    exchange: Exchange
    port: int
    identity: Identity
    indexes: PlainIndexes
    fetcher: ChunkFetcher
    opener: LayerOpener
    share: PlainShare
    source: MemorySource
    texts: list[str] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.exchange.own_id

    def describe(self, layer: Layer) -> Descriptor:
        return self.source.add(layer.blob)

    async def open(self, layer: Layer) -> OpenLayer:
        """Open a layer as an image would."""
        descriptor = self.describe(layer)

        async def diff_id() -> Digest:
            return layer.diff_id

        async def progress(event: dict) -> None:
            self.texts.append(event["text"])

        opened = await self.opener.open(
            REFERENCE,
            self.source,
            descriptor,
            access=Access(),
            diff_id=diff_id,
            allow_unverified_toc=False,
            progress=progress,
        )
        self.fetcher.add_origin(
            Origin(segment=opened.segment, source=self.source, descriptor=descriptor, streamed=True)
        )
        return opened

    async def plant(
        self,
        index: PlainIndex,
        payloads: dict[bytes, bytes],
        *,
        without: Sequence[int] = (),
        makers: dict[PeerId, bytes] | None = None,
        data: bytes | None = None,
    ) -> Digest:
        """Have a layer and tell of it, without having seen or checked anything."""
        toc = segment_toc(index.toc)
        segment = await self.pool.open_segment(SegmentLayout.build(toc, compression="none"))
        chunks = [chunk for entry in toc.entries for chunk in entry.chunks]
        await self.pool.add_many(
            segment,
            [
                (n, verify(chunk.digest, payloads[chunk.digest], source="test"))
                for n, chunk in enumerate(chunks)
                if chunk.kind is ChunkKind.DATA and n not in without
            ],
        )
        data = indexdoc.to_bytes(index) if data is None else data
        return await self.indexes.keep(index, segment.id, data, makers=makers or {}, checked=True)

    async def meet(self, *others: Host) -> None:
        for other in others:
            await self.exchange.connect("127.0.0.1", other.port, expected=other.id)

    def die(self) -> None:
        """Every connection breaks, in the middle of whatever is going on."""
        for connection in self.exchange.connections():
            connection.blame(SourceUnavailable("killed by the test"), Fault.LOST)

    def blob_requests(self) -> int:
        return len(self.source.requests)

    async def read(self, opened: OpenLayer, numbers: Sequence[int] | None = None) -> None:
        """Read chunks, and compare them with what they must be."""
        table = opened.segment.table
        for n in range(table.chunk_count) if numbers is None else numbers:
            await self.fetcher.ensure(opened.segment, n, 1, Priority.BLOCKED_READ)
            assert hashlib.sha256(opened.segment.view(n)).digest() == table.digest(n)


@asynccontextmanager
async def host(
    directory: Path,
    *,
    trusted: Sequence[PeerId] = (),
    uploads: Uploads | None = None,
    features: Feature = FEATURES,
    identity: Identity | None = None,
) -> AsyncIterator[Host]:
    """A host that has nothing yet."""
    identity = identity or Identity.new()
    async with Pool.open(directory, boot_id="test", check_filesystem=False) as pool:
        indexes = PlainIndexes(pool, directory / INDEXES, identity)
        credentials = Credentials.make(identity, Admission(), features)
        offers = PoolOffers(pool, None, indexes)
        async with (
            open_plane(credentials, offers, uploads or Uploads(), host="127.0.0.1") as plane,
            trio.open_nursery() as nursery,
        ):
            peers = plane.exchange
            fetcher = ChunkFetcher(
                pool,
                nursery,
                connections=4,
                fill_bytes_per_second=0,
                read_deadline_seconds=5.0,
                peers=peers,
            )
            share = PlainShare(
                pool,
                peers,
                indexes,
                fetcher.counters,
                directory,
                verify=verify_signature,
                trusted=trusted,
            )
            nursery.start_soon(SignedLayers(pool, indexes, share, fetcher.refuse).run)
            plain = PlainLayers(pool, fetcher.counters, directory, indexes, share)
            opener = LayerOpener(pool, Documents(pool, peers), fetcher.counters, directory, plain)
            source = MemorySource(piece_bytes=4096)
            yield Host(pool, peers, plane.port, identity, indexes, fetcher, opener, share, source)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def hosts(tmp_path: Path, count: int) -> AsyncIterator[list[Host]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(host(tmp_path / f"host{n}")) for n in range(count)]


async def settled(condition: object, seconds: float = 5.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


def says(bench: Host, diff_id: Digest) -> IndexClaim:
    """What a host tells of a layer."""
    found = bench.indexes.claim(diff_id)
    assert found is not None
    claim = indexclaim.from_bytes(found[2], diff_id, verify_signature)
    assert claim is not None
    return claim


@pytest.mark.parametrize(
    "name",
    [
        "basic.gz", "basic.zstm", "basic.tar", "big.gz", "links.tar", "meta.zst", "hlorder.gz", "empty.gz",
        "sparse-gnu.gz", "sparse-pax00.zst", "sparse-pax01.tar", "sparse-pax10.gz",
    ],
)  # fmt: skip
async def test_second_host_has_a_plain_layer_without_its_source(tmp_path: Path, name: str) -> None:
    layer = Layer.of(name)
    async with hosts(tmp_path, 2) as (first, second):
        there = await first.open(layer)
        await second.meet(first)
        here = await second.open(layer)
        assert second.blob_requests() == 0
        assert here.toc == there.toc
        assert here.segment.id == there.segment.id
        await second.read(here)
        assert second.blob_requests() == 0
        came = [
            second.fetcher.trace.came(here.segment, n).source for n in range(here.segment.table.chunk_count)
        ]
        assert set(came) <= {Source(Kind.PEER, str(first.id)), POOL}
        came = [
            first.fetcher.trace.came(there.segment, n).source for n in range(there.segment.table.chunk_count)
        ]
        assert set(came) <= {Source(Kind.REGISTRY, first.source.name)}
        assert says(second, layer.diff_id).makers.keys() == {first.id, second.id}
        assert not second.exchange.standing.counts


async def test_relay_passes_the_maker_s_signature_on(tmp_path: Path) -> None:
    layer = Layer.of("links.gz")
    async with hosts(tmp_path, 3) as (maker, relay, third):
        await maker.open(layer)
        await relay.meet(maker)
        await relay.open(layer)
        maker.die()
        await settled(lambda: not relay.exchange.connections())
        await third.meet(relay)
        await third.open(layer)
        assert third.blob_requests() == 0
        assert maker.id in says(third, layer.diff_id).makers


async def test_same_layer_packed_otherwise_needs_nobody(tmp_path: Path) -> None:
    async with host(tmp_path) as only:
        gzipped = await only.open(Layer.of("basic.gz"))
        only.source.requests.clear()
        packed = await only.open(Layer.of("basic.zst"))
        assert packed.segment is gzipped.segment
        assert only.blob_requests() == 0


async def test_without_peers_that_know_the_layer_the_source_is_asked_at_once(tmp_path: Path) -> None:
    async with hosts(tmp_path, 2) as (other, second):
        await second.meet(other)
        with trio.fail_after(gather.HOLDERS_SECONDS):
            await second.open(Layer.of("basic.gz"))
        assert second.blob_requests() == 2  # its tail, then all of it


async def test_many_layers_at_once_come_from_one_peer(tmp_path: Path) -> None:
    names = ["basic.gz", "links.gz", "meta.gz", "names.gz", "order.gz", "reserved.gz", "sparse-gnu.gz", "sparse-pax00.gz",
             "sparse-pax01.gz", "sparse-pax10.gz", "hlorder.gz", "latin1.gz"]  # fmt: skip
    layers = [Layer.of(name) for name in names]
    async with hosts(tmp_path, 2) as (first, second):
        for layer in layers:
            await first.open(layer)
        await second.meet(first)
        async with trio.open_nursery() as nursery:
            for layer in layers:
                nursery.start_soon(second.open, layer)
        assert second.blob_requests() == 0


async def test_peer_of_an_earlier_version_is_not_asked(tmp_path: Path) -> None:
    layer = Layer.of("links.gz")
    async with host(tmp_path / "old", features=Feature.ZSTD) as old, host(tmp_path / "new") as new:
        await old.open(layer)
        await new.meet(old)
        await new.read(await new.open(layer))
        assert new.blob_requests() == 2
        assert not new.exchange.standing.counts


# --- peers that lie


def lie_about_a_mode(index: PlainIndex) -> PlainIndex:
    entries = list(index.toc.entries)
    n = next(n for n, entry in enumerate(entries) if entry.chunks)
    entries[n] = msgspec.structs.replace(entries[n], mode=0o4777)
    return msgspec.structs.replace(index, toc=msgspec.structs.replace(index.toc, entries=entries))


def lie_about_content(index: PlainIndex, payloads: dict[bytes, bytes]) -> PlainIndex:
    entries = list(index.toc.entries)
    n = next(n for n, entry in enumerate(entries) if len(entry.chunks) == 1)
    evil = bytes(entries[n].size)
    digest = hashlib.sha256(evil).digest()
    payloads[digest] = evil
    chunk = msgspec.structs.replace(entries[n].chunks[0], digest=digest)
    entries[n] = msgspec.structs.replace(entries[n], chunks=(chunk,), digest=digest)
    return msgspec.structs.replace(index, toc=msgspec.structs.replace(index.toc, entries=entries))


@pytest.mark.parametrize("lie", ["mode", "content"])
@pytest.mark.parametrize("honest", [False, True], ids=["alone", "beside an honest one"])
async def test_lying_index_costs_its_peer_the_place_and_the_reader_nothing(
    tmp_path: Path, lie: str, honest: bool
) -> None:
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    async with hosts(tmp_path, 3) as (liar, true, victim):
        await liar.plant(
            lie_about_a_mode(index) if lie == "mode" else lie_about_content(index, payloads), payloads
        )
        await victim.meet(liar)
        if honest:
            await true.open(layer)
            await victim.meet(true)
        opened = await victim.open(layer)
        await victim.read(opened)
        assert opened.toc.entries == index.toc.entries
        if honest:
            assert victim.blob_requests() == 0
            assert victim.exchange.connection(true.id) is not None
        else:
            assert victim.blob_requests() == 2
            assert victim.exchange.standing.counts == {Fault.LIE: 1}
            assert victim.exchange.connection(liar.id) is None
        assert victim.exchange.standing.counts.total() == victim.exchange.standing.counts[Fault.LIE]
        assert not victim.exchange.standing.out_until(true.id, trio.current_time())


async def test_honest_peers_are_not_blamed_for_the_chunks_of_a_lie(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    async with hosts(tmp_path, 3) as (liar, true, victim):
        lie = lie_about_content(index, payloads)
        # it tells of a lie and has none of its chunks, so that they would be asked of others
        await liar.plant(lie, payloads, without=range(10_000))
        await true.open(layer)
        await victim.meet(liar, true)
        await victim.read(await victim.open(layer))
        assert not victim.exchange.standing.out_until(true.id, trio.current_time())


async def test_truncated_index_costs_its_peer_the_place(tmp_path: Path) -> None:
    layer = Layer.of("links.gz")
    index, payloads = made("links")
    async with hosts(tmp_path, 2) as (liar, victim):
        await liar.plant(index, payloads, data=indexdoc.to_bytes(index)[:-5])
        await victim.meet(liar)
        await victim.read(await victim.open(layer))
        assert victim.blob_requests() == 2
        assert victim.exchange.standing.counts == {Fault.LIE: 1}


async def test_index_of_another_layer_costs_its_peer_the_place(tmp_path: Path) -> None:
    layer = Layer.of("links.gz")
    index, payloads = made("basic")
    async with hosts(tmp_path, 2) as (liar, victim):
        await liar.plant(index, payloads)
        record = liar.indexes.record(index.toc.digest)
        assert record is not None
        await liar.indexes.write(layer.diff_id, msgspec.structs.replace(record, makers={}))
        await victim.meet(liar)
        await victim.open(layer)
        assert victim.blob_requests() == 2
        assert victim.exchange.standing.counts == {Fault.LIE: 1}


def huge_document(index: PlainIndex) -> PlainIndex:
    return msgspec.structs.replace(index, other=bytes(6 << 20))


def endless_stream(index: PlainIndex) -> PlainIndex:
    return msgspec.structs.replace(index, stream_bytes=1 << 30)


@pytest.mark.parametrize("change", [huge_document, endless_stream])
async def test_index_that_is_too_large_for_its_layer_is_not_used(tmp_path: Path, change) -> None:
    layer = Layer.of("links.gz")
    index, payloads = made("links")
    async with hosts(tmp_path, 2) as (other, second):
        await other.plant(change(index), payloads)
        await second.meet(other)
        with trio.fail_after(5):
            await second.read(await second.open(layer))
        assert second.blob_requests() == 2


async def test_index_of_millions_of_chunks_is_refused(tmp_path: Path) -> None:
    layer = Layer.of("sparse-gnu.gz")
    index, payloads = made("sparse-gnu")
    document = msgspec.msgpack.decode(indexdoc.to_bytes(index))
    entry = next(entry for entry in document[4] if entry[12])
    entry[5], entry[12] = 1 << 40, [[-1, 1 << 40, b""]]
    async with hosts(tmp_path, 2) as (liar, victim):
        await liar.plant(index, payloads, data=msgspec.msgpack.encode(document))
        await victim.meet(liar)
        with trio.fail_after(5):
            await victim.open(layer)
        assert victim.blob_requests() == 2
        assert victim.exchange.standing.counts == {Fault.LIE: 1}


# --- peers that fail


async def test_what_no_peer_has_comes_from_the_source(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    async with hosts(tmp_path, 2) as (other, second):
        await other.plant(index, payloads, without=[3])
        await second.meet(other)
        await second.read(await second.open(layer))
        assert second.blob_requests() == 2
        assert not second.exchange.standing.counts


async def test_two_peers_with_half_each_are_enough(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    count = sum(len(entry.chunks) for entry in index.toc.entries)
    async with hosts(tmp_path, 3) as (one, other, second):
        await one.plant(index, payloads, without=range(count // 2))
        await other.plant(index, payloads, without=range(count // 2, count))
        await second.meet(one, other)
        await second.read(await second.open(layer))
        assert second.blob_requests() == 0


@pytest.mark.parametrize("another", [False, True], ids=["alone", "beside another one"])
async def test_peer_that_dies_in_the_middle(tmp_path: Path, another: bool) -> None:
    layer = Layer.of("basic.gz")
    async with (
        host(tmp_path / "dying", uploads=Uploads(bytes_per_second=500_000)) as dying,
        host(tmp_path / "other") as other,
        host(tmp_path / "second") as second,
    ):
        await dying.open(layer)
        await second.meet(dying)
        if another:
            await other.open(layer)

        async def die() -> None:
            await settled(lambda: second.exchange.chunks)
            if another:
                await second.meet(other)
            dying.die()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(die)
            opened = await second.open(layer)
        await second.read(opened)
        assert second.blob_requests() == (0 if another else 2)


async def test_slow_peers_leave_the_layer_to_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "RATE_SECONDS", 0.3)
    layer = Layer.of("basic.gz")
    async with (
        host(tmp_path / "slow", uploads=Uploads(bytes_per_second=50_000)) as slow,
        host(tmp_path / "second") as second,
    ):
        await slow.open(layer)
        await second.meet(slow)
        with trio.fail_after(5):
            await second.read(await second.open(layer))
        assert second.blob_requests() == 2


# --- signed indexes


async def test_signed_index_makes_the_layer_lazy_and_is_checked_when_all_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed, "LOOK_SECONDS", 0.1)
    layer = Layer.of("basic.gz")
    async with (
        host(tmp_path / "maker") as maker,
        host(tmp_path / "second", trusted=[maker.id]) as second,
    ):
        await maker.open(layer)
        await second.meet(maker)
        opened = await second.open(layer)
        assert opened.segment.presence.present_count() == 0
        assert second.indexes.claim(layer.diff_id) is None  # not passed on yet
        await second.read(opened, [0])
        assert opened.segment.presence.present_count() < opened.segment.table.chunk_count
        await second.read(opened)
        assert second.blob_requests() == 0
        await settled(lambda: second.indexes.claim(layer.diff_id))
        assert says(second, layer.diff_id).makers.keys() == {maker.id, second.id}


async def test_signature_of_somebody_else_makes_nothing_lazy(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    async with (
        host(tmp_path / "maker") as maker,
        host(tmp_path / "second", trusted=[Identity.new().peer_id]) as second,
    ):
        await maker.open(layer)
        await second.meet(maker)
        opened = await second.open(layer)
        assert not opened.segment.presence.missing(0, opened.segment.table.chunk_count)
        assert second.blob_requests() == 0


async def test_forged_signature_costs_its_peer_the_place(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    trusted = Identity.new()
    async with (
        host(tmp_path / "liar") as liar,
        host(tmp_path / "victim", trusted=[trusted.peer_id]) as victim,
    ):
        other = trusted.sign(b"something else")
        await liar.plant(lie_about_a_mode(index), payloads, makers={trusted.peer_id: other})
        await victim.meet(liar)
        opened = await victim.open(layer)
        assert opened.toc.entries == index.toc.entries
        assert victim.blob_requests() == 2
        assert victim.exchange.standing.counts == {Fault.LIE: 1}


async def test_trusted_maker_that_lies_is_found_out_and_not_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed, "LOOK_SECONDS", 0.1)
    layer = Layer.of("basic.gz")
    index, payloads = made("basic")
    async with host(tmp_path / "liar") as liar, host(tmp_path / "victim", trusted=[liar.id]) as victim:
        await liar.plant(lie_about_a_mode(index), payloads)
        await victim.meet(liar)
        opened = await victim.open(layer)
        assert opened.toc.entries != index.toc.entries  # that is what trust means
        await victim.read(opened)
        # known to be a lie, then refused: the second is what readers meet
        origin = victim.fetcher.origin(opened.segment)
        assert origin is not None
        await settled(lambda: origin.refused is not None)
        assert victim.indexes.is_lie(opened.segment.id)
        with pytest.raises(ImageInvalid, match="is a lie"):
            await victim.read(opened, [0])
        again = await victim.open(layer)
        assert again.toc.entries == index.toc.entries
        await victim.read(again)
        assert victim.blob_requests() == 2


async def test_lazy_layer_goes_on_from_the_source_when_its_peers_are_gone(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    async with (
        host(tmp_path / "maker") as maker,
        host(tmp_path / "second", trusted=[maker.id]) as second,
    ):
        await maker.open(layer)
        await second.meet(maker)
        opened = await second.open(layer)
        await second.read(opened, [0])
        maker.die()
        await settled(lambda: not second.exchange.connections())
        assert second.blob_requests() == 0
        await second.read(opened)
        assert second.blob_requests() == 1


async def test_layer_that_lost_a_chunk_gets_it_from_a_peer(tmp_path: Path) -> None:
    layer = Layer.of("basic.gz")
    async with hosts(tmp_path, 2) as (first, second):
        await first.open(layer)
        await second.meet(first)
        opened = await second.open(layer)
        await second.pool.flush()
        await second.pool.remove_chunks(opened.segment, [2, 3], trio.lowlevel.checkpoint)
        await settled(lambda: second.exchange.holders(opened.segment.id.raw, 3))
        await second.read(opened)
        assert second.blob_requests() == 0
