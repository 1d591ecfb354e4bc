"""Whom a busy node names: those that have or get the same swarm, where they can be dialled, and nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.standing import Fault
from p2pgz.p2p.alternatives import NAMED_MAX, Alternatives
from p2pgz.p2p.uploads import Uploads
from p2pgz.testing.peers import Peer, open_peer, peer_layer

LAYER = peer_layer(4)
OTHER = peer_layer(5)
pytestmark = pytest.mark.trio


@asynccontextmanager
async def seed_with(tmp_path: Path, count: int) -> AsyncIterator[tuple[Peer, list[Peer], Alternatives]]:
    """A seed of which peers follow its swarm, and one that follows another."""
    async with AsyncExitStack() as stack:
        uploads = Uploads()
        seed = await stack.enter_async_context(open_peer(tmp_path / "seed", LAYER, uploads=uploads))
        peers = []
        for n in range(count):
            peer = await stack.enter_async_context(open_peer(tmp_path / f"p{n}", LAYER, chunks=()))
            peer.exchange.follow(peer.swarm)
            await peer.exchange.connect("127.0.0.1", seed.port)
            peers.append(peer)
        stranger = await stack.enter_async_context(open_peer(tmp_path / "stranger", OTHER, chunks=()))
        stranger.exchange.follow(stranger.swarm)
        await stranger.exchange.connect("127.0.0.1", seed.port)
        ports = {peer.id.raw: peer.port for peer in [*peers, stranger]}

        def addresses(peer: bytes) -> list[bytes]:
            named = PeerAddress("dns", "name.example", 1).to_bytes()
            return [b"nonsense", named, PeerAddress.of_ip("127.0.0.1", ports[peer]).to_bytes()]

        alternatives = Alternatives(seed.exchange, addresses)
        uploads.alternatives = alternatives
        with trio.fail_after(5):
            while sum(bool(c.serving.joined) for c in seed.exchange.connections()) < count + 1:
                await trio.sleep(0.01)
        yield seed, peers, alternatives


async def test_who_follows_the_swarm_is_named_with_an_address(tmp_path: Path) -> None:
    async with seed_with(tmp_path, 2) as (seed, peers, alternatives):
        found = {item.peer: item.address for item in alternatives(seed.swarm)}
        assert found == {peer.id.raw: f"/ip4/127.0.0.1/tcp/{peer.port}" for peer in peers}
        assert alternatives(bytes(32)) == ()


async def test_no_more_are_named_than_is_of_use_and_none_that_misbehaved(tmp_path: Path) -> None:
    async with seed_with(tmp_path, NAMED_MAX + 2) as (seed, peers, alternatives):
        seed.exchange.standing.fault(peers[0].id, Fault.CORRUPT, trio.current_time())
        named = set()
        for _ in range(40):
            found = alternatives(seed.swarm)
            assert len(found) == NAMED_MAX
            named |= {item.peer for item in found}
        assert named == {peer.id.raw for peer in peers[1:]}


async def test_who_has_something_comes_before_who_only_wants_it(tmp_path: Path) -> None:
    async with seed_with(tmp_path, NAMED_MAX + 1) as (seed, peers, alternatives):
        seed.exchange.follow(seed.swarm)
        for peer in peers[:NAMED_MAX]:
            await peer.pool.add_many(peer.segment, [(0, LAYER.verified(0))])
        with trio.fail_after(5):
            while len(seed.exchange.swarm_holders(seed.swarm)) < NAMED_MAX:
                await trio.sleep(0.01)
        assert {item.peer for item in alternatives(seed.swarm)} == {p.id.raw for p in peers[:NAMED_MAX]}


async def test_reader_that_meets_a_busy_seed_finds_the_others_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with seed_with(tmp_path, 2) as (seed, (reader, other), _):
        await other.pool.add_many(other.segment, [(n, LAYER.verified(n)) for n in range(5)])
        monkeypatch.setattr(seed.exchange.uploads, "busy_ms", lambda priority: 100)
        answer = await reader.exchange.fetch(
            seed.id, reader.swarm, reader.segment.table, [0, 1], priority=0, landed=reader.landed
        )
        assert answer.busy == [0, 1]
        with trio.fail_after(5):
            while other.id not in reader.exchange.holders(reader.swarm, 1):
                await trio.sleep(0.01)
        await reader.exchange.fetch(
            other.id, reader.swarm, reader.segment.table, [0, 1], priority=0, landed=reader.landed
        )
        assert reader.segment.presence.has(1)
        assert not reader.exchange.standing.counts
