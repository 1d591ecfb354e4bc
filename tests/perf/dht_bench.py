"""What the DHT costs a node's event loop, without a network: one line of JSON.

    python tests/perf/dht_bench.py [--peers 3000] [--segments 1000] [--chunks 1000] [--connections 40] [--directory DIR]

The pool is a real one; all times are CPU of the loop's thread, which for work that waits for nothing is its time on an idle
machine. Needs five descriptors a segment.

- `request`: a DHT request decoded, answered and encoded, at so many known peers, while connected peers have told of so many
  segments: microseconds, p50, p99 and the longest. Bar: p50 and p99 at most 1 ms.
- `holders`: who of the connected peers has a chunk, by its digest. Bar: 1 ms.
- `compare`: the look at what has to be announced, every 5 s, when nothing has changed: its share of a core and the longest
  step of the loop in it. Bars: 1 % and 10 ms.
- `learn`: taking the segments' names in, once; `large_layer`: the places of 100 000 chunks: longest steps. Bar: 10 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.messages import Bitmap
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.peerid import PeerId
from p2pgz.core.pointers import Share
from p2pgz.core.standing import Standing
from p2pgz.core.verify import verify
from p2pgz.fetch.announcing import ANNOUNCED_EVERY_SECONDS, Announcing
from p2pgz.fetch.holdings import PoolHoldings
from p2pgz.fetch.shares import Shares
from p2pgz.p2p.announce import Announcer
from p2pgz.p2p.bitmaps import Bitmaps
from p2pgz.p2p.kad import KadNode
from p2pgz.p2p.kadmsg import KadMessage, Kind, encode
from p2pgz.p2p.places import places_of
from p2pgz.pool.disk import Disk
from p2pgz.pool.pool import Pool

REQUESTS = 3000
PRESENT_CHUNKS = 20
LARGE_LAYER_CHUNKS = 100_000


class Steps(trio.abc.Instrument):
    """The longest step of any task."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._began = 0.0

    def before_task_step(self, task: Any) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: Any) -> None:
        self.longest_seconds = max(self.longest_seconds, time.thread_time() - self._began)


async def watched(work: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Seconds of work and the longest step in it."""
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    await trio.lowlevel.checkpoint()
    steps.longest_seconds = 0.0
    began = time.process_time()
    await work()
    await trio.lowlevel.checkpoint()
    seconds = time.process_time() - began
    trio.lowlevel.remove_instrument(steps)
    return {"cpu_ms": round(1e3 * seconds, 2), "longest_step_ms": round(1e3 * steps.longest_seconds, 2)}


def microseconds(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "p50_us": round(1e6 * statistics.median(ordered), 1),
        "p99_us": round(1e6 * ordered[len(ordered) * 99 // 100], 1),
        "max_us": round(1e6 * ordered[-1], 1),
    }


def content(number: int, n: int) -> bytes:
    return b"%8d %8d" % (number, n)


def layout(number: int, chunks: int) -> SegmentLayout:
    digests = [hashlib.sha256(content(number, n)).digest() for n in range(chunks)]
    entries = [
        Entry(name=b"%d" % n, kind="reg", size=17, chunks=(Chunk(digest, 0, 17, n * 40, n * 40 + 40, 0),))
        for n, digest in enumerate(digests)
    ]
    return SegmentLayout.build(Toc(Digest.of(b"%d" % number), entries), compression="gzip")


def peer(number: int) -> Contact:
    raw = PeerId.of_ed25519(hashlib.sha256(b"peer %d" % number).digest()).raw
    return Contact(raw, (b"\x04\x0a" + number.to_bytes(3, "big") + b"\x06\x12\xc1",))


class Careless(Disk):
    """Syncs nothing: making a thousand segments would take minutes, and is not what is measured."""

    def fsync(self, fd: int) -> None: ...
    def fdatasync(self, fd: int) -> None: ...
    def sync_directory(self, directory: Path) -> None: ...


class Alone:
    """A network with nobody in it."""

    def own(self) -> Contact:
        return peer(0)

    async def ask(self, contact: Contact, protocol: str, message: bytes) -> bytes:
        raise AssertionError("a request is answered from what is known here")

    async def tell(self, contact: Contact, protocol: str, messages: Any) -> None: ...


async def measure(peers: int, segments: int, chunks: int, connections: int, directory: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        async with Pool.open(Path(folder), boot_id="bench", check_filesystem=False, disk=Careless()) as pool:
            return await _measure(pool, peers, segments, chunks, connections)


async def _measure(pool: Pool, peers: int, segments: int, chunks: int, connections: int) -> dict[str, Any]:
    rng = random.Random(1)
    opened = []
    for number in range(segments):
        segment = await pool.open_segment(layout(number, chunks))
        data = [content(number, n) for n in range(PRESENT_CHUNKS)]
        digest = segment.table.digest
        await pool.add_many(segment, [(n, verify(digest(n), each, source="")) for n, each in enumerate(data)])
        opened.append(segment)
    await pool.flush()
    shares: Any = Shares()
    shares._open_segments.update(segment.id.raw for segment in opened)
    told = []
    for number in range(connections):
        bitmaps = Bitmaps()
        for segment in opened:
            bitmaps.follow(segment.id.raw)
            bits = bytes((chunks + 7) // 8) if rng.random() < 0.9 else rng.randbytes(chunks // 8)
            bitmaps.on_bitmap(Bitmap(segment.id.raw, 8 * len(bits), bits))
        told.append(SimpleNamespace(peer=PeerId(peer(number + 1).peer), bitmaps=bitmaps))
    exchange: Any = SimpleNamespace(connections=lambda: told, standing=Standing())
    holdings = PoolHoldings(exchange, pool, shares, lambda raw: (b"\x04\x0a\0\0\1\x06\x12\xc1",))
    for segment in opened:
        holdings.followed(segment.id.raw)
    result: dict[str, Any] = {"learn": await watched(holdings.tend)}

    kad = KadNode(Alone(), holdings=holdings)
    announcer = Announcer(kad, random=rng.random)
    for number in range(1, peers + 1):
        announcer.joined(peer(number), b"e" * 8)
        announcer._servers.put(peer(number))
    names = [segment.table.digest(rng.randrange(chunks)) for segment in opened for _ in range(3)]
    nobodys = [rng.randbytes(32) for _ in range(REQUESTS)]
    now = trio.current_time()
    for number, name in enumerate(nobodys[:1000]):
        for other in range(1, 21):
            kad.records.add(Digest(name).multihash, peer(1 + (number * 20 + other) % peers), now)
    pointed = nobodys[1000:2000]
    kad.pointers.put(peer(1).peer, Share.of(opened[0].id.raw, pointed, complete=True), now)
    kad._resolved[opened[0].id.raw] = (now + 3600, [peer(n) for n in range(1, 21)])
    kinds = {
        "chunk_of_a_bitmap": [(Kind.GET_PROVIDERS, Digest(name).multihash) for name in names[:REQUESTS]],
        "record": [(Kind.GET_PROVIDERS, Digest(name).multihash) for name in nobodys[:1000]],
        "pointer": [(Kind.GET_PROVIDERS, Digest(name).multihash) for name in pointed],
        "unknown": [(Kind.GET_PROVIDERS, Digest(name).multihash) for name in nobodys[2000:]],
        "find_node": [(Kind.FIND_NODE, peer(n).peer) for n in range(1, 1000)],
    }
    result["request"] = {}
    for kind, requests in kinds.items():
        samples = []
        for what, key in requests:
            data = encode(KadMessage(what, key))
            began = time.thread_time()
            answer = await kad.answer(peer(7), data)
            samples.append(time.thread_time() - began)
            assert answer
        result["request"][kind] = microseconds(samples)
    result["known_peers"] = {"table": len(kad.table), "servers": len(announcer._servers)}

    samples = []
    for name in [*names[:REQUESTS], *nobodys]:
        began = time.thread_time()
        holdings.holders(name)
        samples.append(time.thread_time() - began)
    result["holders"] = microseconds(samples)

    dht: Any = SimpleNamespace(announcer=announcer, kad=kad)
    announcing = Announcing(pool, shares)
    result["first_compare"] = await watched(lambda: announcing.compare(dht))
    again = await watched(lambda: announcing.compare(dht))
    again["percent_of_a_core"] = round(again["cpu_ms"] / 10 / ANNOUNCED_EVERY_SECONDS, 3)
    result["compare"] = again
    many = [hashlib.sha256(b"%d" % n).digest() for n in range(LARGE_LAYER_CHUNKS)]
    result["large_layer"] = await watched(lambda: places_of(iter(many)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=int, default=3000)
    parser.add_argument("--segments", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=40)
    parser.add_argument("--directory", default="/var/tmp")
    arguments = vars(parser.parse_args())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps({**arguments, **trio.run(lambda: measure(**arguments))}))


if __name__ == "__main__":
    main()
