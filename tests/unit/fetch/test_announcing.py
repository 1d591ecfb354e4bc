"""What a node tells the DHT, and what it answers from: pool, shares and bitmaps are real, the DHT has no other member."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.sharing import Mode, Policy, Rule
from p2pgz.fetch import announcing
from p2pgz.fetch.announcing import Announcing, is_complete
from p2pgz.fetch.holdings import PoolHoldings
from p2pgz.fetch.shares import Shares
from p2pgz.pool.pool import Pool, Segment
from p2pgz.testing.conformance_pool import Layer
from p2pgz.testing.kad_network import SimulatedNetwork, SimulatedNode
from p2pgz.testing.peers import Peer, open_peer, peer_layer

pytestmark = pytest.mark.trio
MANIFEST, CONFIG = b"a manifest", Digest.of(b"a config")


@dataclass
class Bench:
    pool: Pool
    segment: Segment
    layer: Layer
    shares: Shares
    node: SimulatedNode

    @property
    def dht(self) -> Any:
        return SimpleNamespace(announcer=self.node.announcer, kad=self.node.kad)

    @property
    def announced(self) -> set[bytes]:
        return self.node.kad.announced

    async def opened(self, repository: str = "registry.test/app") -> None:
        place = self.shares.place(repository, Digest.of(MANIFEST), MANIFEST)
        await self.shares.add(place, segments=[self.segment], documents=[CONFIG])

    async def put(self, *chunks: int) -> None:
        await self.pool.add_many(self.segment, [(n, self.layer.verified(n)) for n in chunks])


@asynccontextmanager
async def bench(directory: Path) -> AsyncIterator[Bench]:
    layer = Layer.random(1, files=5)
    async with (
        Pool.open(directory, boot_id="test", check_filesystem=False) as pool,
        trio.open_nursery() as nursery,
    ):
        segment = await pool.open_segment(layer.layout)
        shares = Shares(Policy([Rule("registry.test/secret/*", Mode.PROOF)]))
        node = SimulatedNetwork(nursery).start(1)
        yield Bench(pool, segment, layer, shares, node)
        nursery.cancel_scope.cancel()


async def test_a_toc_is_announced_while_there_are_chunks_and_documents_always(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        what = Announcing(b.pool, b.shares)
        await b.put(0)
        await what.compare(b.dht)
        assert b.announced == set()  # no image has been opened that vouches for it
        await b.opened()
        await what.compare(b.dht)
        documents = {Digest.of(MANIFEST).multihash, CONFIG.multihash}
        assert b.announced == {b.segment.id.multihash, *documents}
        held = b.node.announcer._held[b.segment.id.raw]
        assert (held.complete, list(held.digests())) == (False, [b.segment.table.digest(0)])
        await b.put(*range(1, len(b.layer.chunks)))
        await what.compare(b.dht)
        assert b.node.announcer._held[b.segment.id.raw].complete

        async def acknowledge() -> None:
            await trio.lowlevel.checkpoint()

        await b.pool.remove_chunks(b.segment, range(len(b.layer.chunks)), acknowledge)
        await what.compare(b.dht)
        assert b.announced == documents
        assert b.node.announcer._held == {}


async def test_a_layer_that_fills_is_pointed_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "GROWN_SECONDS", 0.0)
    async with bench(tmp_path) as b:
        what = Announcing(b.pool, b.shares)
        await b.opened()
        await b.put(*range(4))
        await what.compare(b.dht)
        tocs = b.node.announcer._tocs
        assert tocs.due(trio.current_time() + 1000) == [b.segment.id.raw]
        later = tocs.next_due()
        assert later is not None
        await what.compare(b.dht)
        assert tocs.next_due() == later
        await b.put(4)
        await what.compare(b.dht)
        sooner = tocs.next_due()
        assert sooner is not None
        assert sooner < trio.current_time() + 200


async def test_after_a_restart_layers_are_opened_only_while_there_are_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [Layer.random(seed, files=2, name=b"%d" % seed) for seed in range(4)]
    async with Pool.open(tmp_path, boot_id="test", check_filesystem=False) as pool:
        for layer in layers:
            segment = await pool.open_segment(layer.layout)
            await pool.add_many(segment, layer.all_verified())
    async with (
        Pool.open(tmp_path, boot_id="test", check_filesystem=False) as pool,
        trio.open_nursery() as nursery,
    ):
        assert pool.segments() == []
        shares: Any = Shares()
        shares._open_segments.update(layer.toc.digest.raw for layer in layers)
        node = SimulatedNetwork(nursery).start(1)
        dht: Any = SimpleNamespace(announcer=node.announcer, kad=node.kad)
        what = Announcing(pool, shares)
        monkeypatch.setattr(announcing, "OPEN_SEGMENTS_MAX", 2)
        await what.compare(dht)
        assert len(pool.segments()) == len(node.kad.announced) == 2
        await what.compare(dht)
        assert len(pool.segments()) == len(node.kad.announced) == 2
        for layer in layers:
            assert pool.segment(layer.toc.digest)
        await what.compare(dht)
        assert node.kad.announced == {layer.toc.digest.multihash for layer in layers}
        nursery.cancel_scope.cancel()


async def test_a_private_image_is_not_announced(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.put(0)
        await b.opened("registry.test/secret/app")
        await Announcing(b.pool, b.shares).compare(b.dht)
        assert b.announced == set()


async def test_a_complete_plain_layer_has_its_other_names(tmp_path: Path) -> None:
    names = [Digest.of(b"diff id"), Digest.of(b"blob")]
    async with bench(tmp_path) as b:
        what = Announcing(b.pool, b.shares, layer_names=lambda segment: names)
        await b.opened()
        await b.put(0)
        await what.compare(b.dht)
        assert not b.announced & {name.multihash for name in names}
        await b.put(*range(1, len(b.layer.chunks)))
        await what.compare(b.dht)
        assert b.announced >= {name.multihash for name in names}


async def test_chunks_of_zeros_are_missing_to_nobody(tmp_path: Path) -> None:
    layer = Layer([[b"data"], [bytes(100)]], zeros=[1])
    async with Pool.open(tmp_path, boot_id="test", check_filesystem=False) as pool:
        segment = await pool.open_segment(layer.layout)
        assert not is_complete(segment)
        await pool.add(segment, 0, layer.verified(0))
        assert is_complete(segment)
        await pool.add(segment, 1, layer.verified(1))
        assert is_complete(segment)


async def test_chunks_are_announced_one_by_one_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as b:
        what = Announcing(b.pool, b.shares, provide_chunks=True)
        await b.opened()
        await b.put(0, 1)
        await what.compare(b.dht)
        chunks = {Digest(b.segment.table.digest(n)).multihash for n in (0, 1)}
        assert b.announced >= chunks
        monkeypatch.setattr(announcing, "CHUNK_KEYS_MAX", 2)
        await b.put(2)
        await what.compare(b.dht)
        assert not b.announced & chunks
        assert b.segment.id.multihash in b.announced


async def test_a_new_dht_is_told_all_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        what = Announcing(b.pool, b.shares)
        await b.opened()
        await b.put(0)
        await what.compare(b.dht)
        b.announced.clear()
        await what.compare(b.dht)
        assert b.announced == set()
        what.begin()
        await what.compare(b.dht)
        assert b.segment.id.multihash in b.announced


async def test_what_moves_is_renewed_and_what_is_provided_again_is_not_withdrawn(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        announcer = b.node.announcer
        announcer.provide(CONFIG.multihash)
        announcer._keys.due(trio.current_time())
        later = announcer._keys.next_due()
        assert later is not None
        assert later > trio.current_time() + 600
        announcer.moved()
        soon = announcer._keys.next_due()
        assert soon is not None
        assert soon < trio.current_time() + 10
        announcer.withdraw(CONFIG.multihash)
        announcer.provide(CONFIG.multihash)
        assert announcer._withdrawn == []


@asynccontextmanager
async def two_peers(directory: Path) -> AsyncIterator[tuple[Peer, Peer, PoolHoldings, Shares]]:
    """One that has some chunks, another that follows it, and what the second one would answer."""
    layer = peer_layer(1)
    async with (
        open_peer(directory / "a", layer, chunks=[0, 1]) as a,
        open_peer(directory / "b", layer, chunks=[2]) as b,
    ):
        await b.exchange.connect("127.0.0.1", a.port)
        b.exchange.follow(b.swarm)
        with trio.fail_after(5):
            while not b.exchange.swarm_holders(b.swarm):
                await trio.sleep(0.01)
        shares = Shares()
        yield a, b, PoolHoldings(b.exchange, b.pool, shares, lambda peer: (b"address",)), shares


async def test_holders_are_the_connected_peers_whose_bitmaps_show_it(tmp_path: Path) -> None:
    async with two_peers(tmp_path) as (a, b, holdings, _):
        digest = b.segment.table.digest
        assert holdings.holders(digest(0)) == []  # not followed
        holdings.followed(b.swarm)
        await holdings.tend()
        shown = [Contact(a.id.raw, (b"address",))]
        assert holdings.holders(digest(0)) == shown
        assert holdings.holders(b.swarm) == shown
        assert holdings.holders(digest(2)) == []
        assert holdings.holders(Digest.of(b"nobody's").raw) == []
        holdings.unfollowed(b.swarm)
        await holdings.tend()
        assert holdings.holders(digest(0)) == holdings.holders(b.swarm) == []


async def test_what_is_here_is_told_only_of_open_images(tmp_path: Path) -> None:
    async with two_peers(tmp_path) as (_, b, holdings, shares):
        chunk = b.segment.table.digest(2)
        assert not holdings.holds(chunk)
        assert not holdings.holds(b.swarm)
        place = shares.place("registry.test/app", Digest.of(MANIFEST), MANIFEST)
        await shares.add(place, segments=[b.segment], documents=[CONFIG])
        assert holdings.holds(chunk)
        assert holdings.holds(b.swarm)
        assert holdings.holds(CONFIG.raw)
        assert not holdings.holds(b.segment.table.digest(0))
