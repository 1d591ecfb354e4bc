"""Other implementations of Kademlia in one network with ours: go-libp2p-kad-dht, and py-libp2p's own KadDHT."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact, KeySet, kad_key
from p2pgz.core.lookup import WIDTH
from p2pgz.core.peerid import PeerId
from p2pgz.p2p.dht import Dht
from p2pgz.p2p.identity import Identity
from p2pgz.testing.dht import contact_of, listening_dht, multiaddr_of
from p2pgz.testing.kad_network import Things
from tests.interop.foreign import built_go_peer, library_dht

# of the day in the life of a network; `make dht-promise` has 64, for which a quiet machine needs minutes
SERVERS = int(os.environ.get("P2PGZ_TEST_DHT_SERVERS", "24"))
WAIT_SECONDS = 60 * SERVERS / 24
CHUNK = Digest.of(b"a chunk")
TOC = Digest.of(b"a table of contents")


@pytest.fixture(scope="session")
def go_peer() -> Path:
    return built_go_peer()


needs_go = [pytest.mark.go, pytest.mark.skipif(shutil.which("go") is None, reason="needs a Go toolchain")]


async def settle(*nodes: Dht) -> None:
    """Wait until every node knows every other one."""
    with trio.fail_after(60):
        while any(len(node.kad.table) < min(len(nodes) - 1, WIDTH) for node in nodes):
            await trio.sleep(0.05)


async def grown(
    stack: AsyncExitStack, first: Dht, identities: Sequence[Identity], now: Callable[[], float]
) -> list[Dht]:
    """Servers that join one after the other: all at once, 250 connections would be made by this one process."""
    nodes: list[Dht] = []
    for identity in identities:
        node = await stack.enter_async_context(listening_dht(first, identity=identity, now=now))
        with trio.fail_after(20):
            while len(node.kad.table) < 0.8 * min(len(nodes), WIDTH):
                await trio.sleep(0.05)
        nodes.append(node)
    return nodes


class TestGo:
    pytestmark = [*needs_go, pytest.mark.timeout(300)]

    @pytest.mark.trio
    async def test_go_client_finds_a_chunk_by_its_cid_at_its_holder(self, go_peer: Path) -> None:
        things = Things()
        things.own.add(CHUNK.raw)
        async with (
            listening_dht() as first,
            listening_dht(first, holdings=things) as holder,
            listening_dht(first) as third,
        ):
            await settle(first, holder, third)
            found = await self.find(go_peer, first, CHUNK)
        assert f"{PeerId(holder.host.peer)} [{_address(holder)}]\n" == found

    @pytest.mark.trio
    async def test_go_client_follows_a_pointer_to_the_providers_of_the_toc(self, go_peer: Path) -> None:
        """The holder does not answer for the chunk: only the pointer, at a third node, leads to it."""
        async with listening_dht() as first, listening_dht(first) as holder, listening_dht(first) as third:
            await settle(first, holder, third)
            holder.announcer.provide(TOC.multihash)
            from p2pgz.core.pointers import Share

            third.kad.pointers.put(
                holder.host.peer, Share.of(TOC.raw, [CHUNK.raw], complete=True), trio.current_time()
            )
            with trio.fail_after(10):
                while not first.kad.records.providers(TOC.multihash, trio.current_time()):
                    await trio.sleep(0.05)
            found = await self.find(go_peer, first, CHUNK)
        assert f"{PeerId(holder.host.peer)} [{_address(holder)}]\n" == found

    @pytest.mark.trio
    async def test_our_node_finds_what_a_go_server_provides(self, go_peer: Path) -> None:
        async with listening_dht() as first, listening_dht(first) as second:
            await settle(first, second)
            command = [go_peer, "serve", multiaddr_of(first), str(CHUNK.cid())]
            async with _running(command) as process:
                line = await _line(process)
                assert line.startswith("ready "), line
                peer = PeerId.parse(line.strip().rpartition("/")[2])
                with trio.fail_after(10):
                    found: list[Contact] = []
                    while not found:
                        found = await second.kad.find_providers(CHUNK.multihash)
                assert [peer.raw] == [contact.peer for contact in found]
                assert await second.kad.ping(found[0])

    @pytest.mark.slow
    @pytest.mark.timeout(300 * SERVERS / 24)
    @pytest.mark.trio
    async def test_go_client_finds_a_chunk_a_day_later_when_all_but_its_holder_were_restarted(
        self, go_peer: Path
    ) -> None:
        """Real sockets, a clock that is put forward hour by hour; the holder is not among the chunk's 20 closest servers."""
        offset = 0.0

        def now() -> float:
            return trio.current_time() + offset

        chunks = [hashlib.sha256(b"chunk %d" % number).digest() for number in range(200)]
        identities = [Identity.from_seed(bytes([number]) * 32) for number in range(SERVERS)]
        places = KeySet(kad_key(identity.peer_id.raw) for identity in identities)
        own = kad_key(identities[0].peer_id.raw)
        chunk = next(
            each for each in map(Digest, chunks) if own not in places.closest(kad_key(each.multihash), WIDTH)
        )
        things = Things()
        things.own.update(chunks)
        async with listening_dht(identity=identities[0], holdings=things, now=now) as holder:
            async with AsyncExitStack() as day:
                others = await grown(day, holder, identities[1:], now)
                holder.announcer.provide(TOC.multihash)
                holder.announcer.hold(TOC.raw, lambda: chunks, complete=True)
                with trio.fail_after(WAIT_SECONDS):
                    while sum(len(other.kad.pointers) for other in others) < 3 * len(chunks):
                        await trio.sleep(0.1)
                for _ in range(25):
                    offset += 3600
                    holder.announcer.look_again()
                    await trio.sleep(0.2)
                await trio.sleep(2)
                assert (
                    await self.find(go_peer, others[3], chunk)
                    == f"{PeerId(holder.host.peer)} [{_address(holder)}]\n"
                )
            async with AsyncExitStack() as after:
                others = await grown(after, holder, identities[1:], now)
                with trio.fail_after(WAIT_SECONDS):
                    while sum(len(other.kad.pointers) for other in others) < 3 * len(chunks):
                        await trio.sleep(0.1)
                found = await self.find(go_peer, others[5], chunk)
                ours = await others[7].kad.find_providers(chunk.multihash)
        assert found == f"{PeerId(holder.host.peer)} [{_address(holder)}]\n"
        assert ours == [contact_of(holder)]

    async def find(self, program: Path, bootstrap: Dht, digest: Digest) -> str:
        command = [program, "find", multiaddr_of(bootstrap), str(digest.cid())]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


class TestPyLibp2p:
    @pytest.mark.trio
    async def test_its_dht_finds_our_chunk_and_we_find_its_records(self) -> None:
        things = Things()
        things.own.add(CHUNK.raw)
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(listening_dht())
            holder = await stack.enter_async_context(listening_dht(first, holdings=things))
            await settle(first, holder)
            host, theirs = await stack.enter_async_context(library_dht(contact_of(first)))
            found = await theirs.find_providers("1220" + CHUNK.hex)
            assert {holder.host.peer} == {info.peer_id.to_bytes() for info in found}
            assert await theirs.provide("1220" + TOC.hex)
            with trio.fail_after(10):
                while not first.kad.records.providers(TOC.multihash, trio.current_time()):
                    await trio.sleep(0.05)
            ours = await holder.kad.find_providers(TOC.multihash)
            assert [host.get_id().to_bytes()] == [contact.peer for contact in ours]
            holder.announcer.provide(Digest.of(b"ours").multihash)
            with trio.fail_after(10):
                while not theirs.provider_store.get_providers(Digest.of(b"ours").multihash):
                    await trio.sleep(0.05)


@asynccontextmanager
async def _running(command: list[Any]) -> AsyncIterator[trio.Process]:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            lambda task_status: trio.run_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False, task_status=task_status
            )
        )
        try:
            yield process
        finally:
            process.terminate()
            nursery.cancel_scope.cancel()


async def _line(process: trio.Process) -> str:
    assert process.stdout is not None
    text = b""
    with trio.fail_after(60):
        while not text.endswith(b"\n"):
            text += await process.stdout.receive_some()
    return text.decode()


def _address(dht: Dht) -> str:
    return multiaddr_of(dht).rpartition("/p2p/")[0]
