"""Leases between real nodes without a registry: of what all want at once each thing is asked of a source once."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.hello import FEATURES
from p2pgz.core.messages import Feature
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.reference import parse_reference
from p2pgz.core.schedule import Priority
from p2pgz.errors import AuthRefused, P2pgzError, SourceUnavailable
from p2pgz.fetch.documents import Documents
from p2pgz.fetch.offers import PoolOffers
from p2pgz.fetch.origin import Origin
from p2pgz.fetch.service import ChunkFetcher
from p2pgz.fetch.shares import Access, Shares
from p2pgz.image.layer_records import OpenLayer
from p2pgz.image.layers import LayerOpener
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.membership import Members
from p2pgz.p2p.plane import ChunkPlane, open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool
from p2pgz.testing.memory_source import Fault, MemorySource
from p2pgz.testing.vectors import expected_document

VECTORS = Path(__file__).parents[2] / "vectors"
VECTOR = "basic.esgz64k"
WITHIN_SECONDS = 30.0
pytestmark = pytest.mark.trio


class Host:
    """A node without mounts: pool, exchange, members, fetcher, and its own way to the source."""

    def __init__(
        self, pool: Pool, plane: ChunkPlane, members: Members, fetcher: ChunkFetcher, shares: Shares
    ) -> None:
        self.pool, self.plane, self.members, self.fetcher = pool, plane, members, fetcher
        self.source = MemorySource(piece_bytes=4096)
        self.documents = Documents(pool, plane.exchange, fetcher.leasing, shares)
        self.layer: OpenLayer

    async def open(self, state: Path) -> None:
        """The layer of the vector, without its chunks."""
        expected = expected_document(VECTORS / "expected" / f"{VECTOR}.json")
        descriptor = replace(
            self.source.add((VECTORS / expected["blob"]).read_bytes()),
            annotations=expected.get("annotations", {}),
        )

        async def no_diff_id() -> Digest:
            raise NotImplementedError

        async def nothing(*_: object) -> None:
            await trio.lowlevel.checkpoint()

        opener = LayerOpener(self.pool, Documents(self.pool, None), self.fetcher.counters, state)
        self.layer = await opener.open(
            parse_reference("registry.test/image"),
            self.source,
            descriptor,
            access=Access(),
            diff_id=no_diff_id,
            allow_unverified_toc=False,
            progress=nothing,
        )
        segment = self.layer.segment
        self.fetcher.add_origin(Origin(segment=segment, source=self.source, descriptor=descriptor))
        await self.pool.flush()
        await self.pool.remove_chunks(segment, range(segment.table.chunk_count), nothing)
        self.source.requests.clear()

    async def read(self) -> None:
        """All chunks."""
        segment = self.layer.segment
        await self.fetcher.ensure(segment, 0, segment.table.chunk_count, Priority.BLOCKED_READ)
        for n in range(segment.table.chunk_count):
            assert Digest.of(segment.view(n)).raw == segment.table.digest(n)

    @property
    def asked_bytes(self) -> int:
        return sum(end - start for _, start, end in self.source.requests)


@asynccontextmanager
async def hosts(tmp_path: Path, *leases: bool) -> AsyncIterator[list[Host]]:
    """Nodes that know each other and have the layer open; one for each of `leases`, which says whether it takes part."""
    async with AsyncExitStack() as stack:
        made: list[Host] = []
        opened: list[tuple[Path, Pool, Identity, ChunkPlane]] = []
        for number, takes_part in enumerate(leases):
            state = tmp_path / f"n{number}"
            pool = await stack.enter_async_context(Pool.open(state, boot_id="boot", check_filesystem=False))
            identity = Identity.new()
            features = FEATURES | Feature.MEMBERS | (Feature.LEASES if takes_part else Feature(0))
            plane = await stack.enter_async_context(
                open_plane(
                    Credentials.make(identity, Admission(), features),
                    PoolOffers(pool),
                    Uploads(),
                    host="127.0.0.1",
                )
            )
            opened.append((state, pool, identity, plane))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for number, (state, pool, identity, plane) in enumerate(opened):
            members = Members(
                plane.exchange,
                identity,
                [PeerAddress.of_ip("127.0.0.1", plane.port)],
                zone="",
                seed=False,
                leases=leases[number],
                wall_seconds=1_800_000_000.0,
                rng=Random(number),
            )
            await nursery.start(members.run)
            fetcher = ChunkFetcher(
                pool,
                nursery,
                connections=4,
                fill_bytes_per_second=0,
                read_deadline_seconds=WITHIN_SECONDS,
                peers=plane.exchange,
            )
            if leases[number]:
                members.leases = fetcher.lease(members, identity.peer_id.raw, "")
            made.append(Host(pool, plane, members, fetcher, Shares()))
            await made[-1].open(state)
        for host in made[1:]:
            await host.plane.exchange.connect("127.0.0.1", made[0].plane.port)
        with trio.fail_after(WITHIN_SECONDS):
            while {len(host.members.machine.members) for host in made} != {len(made)}:
                await trio.sleep(0.01)
        yield made


async def all_read(nodes: list[Host]) -> None:
    with trio.fail_after(WITHIN_SECONDS):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(node.read)


def once(node: Host) -> int:
    table = node.layer.segment.table
    return max(table.blob_end) - min(table.blob_offset)


async def test_what_all_read_at_once_is_asked_of_the_source_once(tmp_path: Path) -> None:
    async with hosts(tmp_path, True, True, True) as nodes:
        await all_read(nodes)
        assert sum(node.asked_bytes for node in nodes) <= once(nodes[0])
        status = [node.fetcher.leasing.status() for node in nodes if node.fetcher.leasing is not None]
        count = nodes[0].layer.segment.table.chunk_count
        assert sum(one["direct_chunks"] for one in status) == 0
        assert 0 < sum(one["fetched_chunks"] for one in status) <= count
        assert sum(one["followed_chunks"] for one in status) > 0


async def test_one_that_the_source_refuses_gets_it_from_the_others(tmp_path: Path) -> None:
    async with hosts(tmp_path, True, True) as nodes:
        refused = Fault(error=AuthRefused("the source does not know you"))
        for node in nodes[:1]:
            node.source.faults = deque([refused] * 100)
        with trio.fail_after(WITHIN_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes[0].read)
                await trio.sleep(0.2)  # it is first: the lease is its own
                nursery.start_soon(nodes[1].read)
        assert nodes[0].fetcher.leasing is not None
        assert nodes[0].fetcher.leasing.rescued_chunks > 0


async def test_one_that_takes_no_part_asks_for_itself_and_is_nobody_s_home(tmp_path: Path) -> None:
    async with hosts(tmp_path, True, True, False) as nodes:
        *_, apart = nodes
        assert apart.members.machine.own.peer not in nodes[0].members.lease_members()
        await all_read(nodes)
        assert sum(node.asked_bytes for node in nodes) <= 2 * once(apart)


async def test_a_node_without_others_asks_at_once(tmp_path: Path) -> None:
    async with hosts(tmp_path, True) as nodes:
        await all_read(nodes)
        assert nodes[0].fetcher.leasing is not None
        assert nodes[0].fetcher.leasing.status()["granted"] == 0


async def test_a_home_that_is_gone_holds_up_nobody(tmp_path: Path) -> None:
    async with hosts(tmp_path, True, True, True) as nodes:
        for connection in nodes[2].plane.exchange.connections():
            connection.crowd = lambda frame: None  # it is there, and says nothing about leases
        nodes[2].members.leases = None
        await all_read(nodes[:2])
        assert sum(node.asked_bytes for node in nodes[:2]) <= once(nodes[0])


def brings(data: bytes, calls: list[str], name: str) -> Callable[[], Awaitable[bytes]]:
    async def fetch() -> bytes:
        calls.append(name)
        await trio.sleep(0.1)
        return data

    return fetch


async def get(node: Host, digest: Digest, fetch: Callable[[], Awaitable[bytes]]) -> bytes:
    return await node.documents.get(digest, limit_bytes=1 << 20, from_source=fetch, source=node)


async def test_a_document_that_all_open_at_once_is_asked_for_once(tmp_path: Path) -> None:
    data = b"a manifest" * 1000
    digest, calls, got = Digest.of(data), list[str](), list[bytes]()
    async with hosts(tmp_path, True, True, True) as nodes:

        async def one(node: Host, name: str) -> None:
            got.append(await get(node, digest, brings(data, calls, name)))

        with trio.fail_after(WITHIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for number, node in enumerate(nodes):
                    nursery.start_soon(one, node, str(number))
        assert got == [data] * 3
        assert len(calls) == 1


async def test_a_document_that_the_first_cannot_get_comes_from_the_next(tmp_path: Path) -> None:
    data = b"a config" * 1000
    digest, calls, failures = Digest.of(data), list[str](), list[P2pgzError]()
    async with hosts(tmp_path, True, True) as nodes:

        async def fails() -> bytes:
            calls.append("fails")
            await trio.sleep(0.2)
            raise SourceUnavailable("no way to the registry")

        async def first() -> None:
            try:
                await get(nodes[0], digest, fails)
            except P2pgzError as error:
                failures.append(error)

        with trio.fail_after(WITHIN_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await trio.sleep(0.05)
                assert await get(nodes[1], digest, brings(data, calls, "1")) == data
        assert calls[-1] == "1"


async def test_only_layers_that_are_here_and_shared_are_talked_about(tmp_path: Path) -> None:
    async with hosts(tmp_path, True, True) as nodes:
        one, other = nodes
        await all_read([one])
        swarm = one.layer.segment.id.raw
        assert one.members.shares(other.members.machine.own.peer, swarm)
        assert not one.members.shares(other.members.machine.own.peer, bytes(32))
