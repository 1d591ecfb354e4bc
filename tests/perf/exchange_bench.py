"""The exchange beside a bare trio TLS stream: bulk into the pool, 64 KiB on a warm connection, CPU per GB.

    python tests/perf/exchange_bench.py [--mebibytes 192] [--runs 7] [--chunk-bytes 1048576] [--directory DIR]

Giver and taker are processes of their own. The yardstick's reader does what a pool must do at the least: sha256 and pwrite
of every piece; its sender reads the same bytes from a file in the page cache. Runs alternate, medians are shown. CPU is
user + system of both ends. Bars: bulk at least 0.8 of the yardstick, at most 3 CPU seconds per GB; 64 KiB p50 at most twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from p2pgz.core.admission import Admission
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.core.peerid import PeerId
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.fetch.offers import PoolOffers
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.listener import PeerListener, listen
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool

SMALL_BYTES = 64 << 10
SMALL_REQUESTS = 300
SEED = 1


def content(chunk_bytes: int, total: int) -> tuple[Toc, list[bytes]]:
    """A layer whose first chunks are small ones, the rest of `chunk_bytes`; the same in every process."""
    import random

    rng = random.Random(SEED)
    sizes = [SMALL_BYTES] * SMALL_REQUESTS + [chunk_bytes] * (total // chunk_bytes)
    block = rng.randbytes(max(sizes))
    chunks = [n.to_bytes(8, "big") + block[8:size] for n, size in enumerate(sizes)]
    entries = [
        Entry(
            name=b"%d" % n,
            kind="reg",
            size=len(c),
            chunks=(Chunk(hashlib.sha256(c).digest(), 0, len(c), n << 21, (n << 21) + len(c), 0),),
        )
        for n, c in enumerate(chunks)
    ]
    return Toc(Digest.of(b"bench %d %d" % (chunk_bytes, total)), entries), chunks


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def give(arguments: argparse.Namespace) -> None:
    """The serving process: the exchange, and the yardstick's server. Commands on stdin: `cpu` prints CPU seconds."""
    toc, chunks = content(arguments.chunk_bytes, arguments.mebibytes << 20)
    directory = Path(arguments.directory)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool.open(directory, boot_id="b", check_filesystem=False))
        segment = await pool.open_segment(SegmentLayout.build(toc, compression="gzip"))
        for n, data in enumerate(chunks):
            await pool.add(segment, n, verify(segment.table.digest(n), data, source="bench"))
        identity = Identity.new()
        credentials = Credentials.make(identity, Admission())
        exchange = await stack.enter_async_context(
            Exchange.open(credentials, PoolOffers(pool), Uploads(zstd=False))
        )
        table = segment.table

        async def bare(raw: trio.SocketStream) -> None:
            stream = trio.SSLStream(raw, credentials.accepting, server_side=True, https_compatible=True)
            while order := await stream.receive_some(64):
                first, count = json.loads(order)
                for n in range(first, first + count):
                    data = os.pread(segment.data_fd, table.size[n], table.segment_offset[n])
                    await stream.send_all(data)

        async with trio.open_nursery() as nursery:
            ports = []
            for listener in (PeerListener(exchange.accept), PeerListener(bare)):
                listeners = await listen("127.0.0.1", 0)
                ports.append(listeners[0].socket.getsockname()[1])
                await nursery.start(listener.serve, listeners)
            print(json.dumps([*ports, str(identity.peer_id)]), flush=True)
            async for line in trio.wrap_file(sys.stdin):
                if line.strip() == "cpu":
                    print(cpu_seconds(), flush=True)
                else:
                    break
            nursery.cancel_scope.cancel()


async def take(arguments: argparse.Namespace) -> None:
    toc, chunks = content(arguments.chunk_bytes, arguments.mebibytes << 20)
    bulk = range(SMALL_REQUESTS, len(chunks))
    bulk_bytes = sum(len(chunks[n]) for n in bulk)
    del chunks
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        command = [sys.executable, __file__, "--give", "--directory", f"{folder}/give"]
        command += ["--chunk-bytes", str(arguments.chunk_bytes), "--mebibytes", str(arguments.mebibytes)]
        giver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        port, bare_port, peer = json.loads(giver.stdout.readline())

        def giver_cpu() -> float:
            giver.stdin.write("cpu\n")
            giver.stdin.flush()
            return float(giver.stdout.readline())

        def note(name: str, value: float) -> None:
            results.setdefault(name, []).append(value)

        for run in range(arguments.runs):
            await bare(bare_port, Path(folder) / "bare", toc, bulk, note, giver_cpu, bulk_bytes)
            await exchanged(port, peer, Path(folder) / f"take{run}", toc, bulk, note, giver_cpu, bulk_bytes)
            # its pages are the next run's: a guest pays for a page that its host has not given it yet, in either system
            shutil.rmtree(Path(folder) / f"take{run}")
        giver.stdin.close()
        giver.wait()
    medians = {name: statistics.median(values) for name, values in results.items()}
    for name, value in medians.items():
        print(f"{name:34}{value:10.3f}   {min(results[name]):10.3f} .. {max(results[name]):.3f}")
    for label, name, bar in (
        ("bulk, exchange / bare", "MB/s", 0.8),
        ("64 KiB p50, exchange / bare", "64 KiB p50 ms", 2),
        ("CPU, exchange / bare", "CPU s/GB", 1.25),
    ):
        print(f"{label:34}{medians['exchange ' + name] / medians['bare ' + name]:10.2f}   bar {bar}")


async def bare(port, path, toc, bulk, note, giver_cpu, bulk_bytes) -> None:
    _, dialling = Identity.new().tls_contexts()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", port), dialling, https_compatible=True)
    sizes = [entry.size for entry in toc.entries]

    async def receive(first: int, count: int) -> None:
        await stream.send_all(json.dumps([first, count]).encode())
        at = 0
        for n in range(first, first + count):
            parts, left = [], sizes[n]
            while left:
                data = await stream.receive_some(min(left, 65536))
                parts.append(data)
                left -= len(data)
            whole = b"".join(parts)
            assert hashlib.sha256(whole).digest() == toc.entries[n].chunks[0].digest
            os.pwrite(fd, whole, at)
            at += len(whole)

    await receive(0, 1)
    times = []
    for n in range(SMALL_REQUESTS):
        start = time.perf_counter()
        await receive(n, 1)
        times.append(time.perf_counter() - start)
    note("bare 64 KiB p50 ms", statistics.median(times) * 1000)
    note("bare 64 KiB p99 ms", statistics.quantiles(times, n=100)[98] * 1000)
    cpu, start = cpu_seconds() + giver_cpu(), time.perf_counter()
    await receive(bulk[0], len(bulk))
    seconds = time.perf_counter() - start
    note("bare MB/s", bulk_bytes / seconds / 1e6)
    note("bare CPU s/GB", (cpu_seconds() + giver_cpu() - cpu) / bulk_bytes * 1e9)
    await trio.aclose_forcefully(stream)
    os.close(fd)


async def exchanged(port, peer, directory, toc, bulk, note, giver_cpu, bulk_bytes) -> None:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool.open(directory, boot_id="b", check_filesystem=False))
        segment = await pool.open_segment(SegmentLayout.build(toc, compression="gzip"))
        credentials = Credentials.make(Identity.new(), Admission())
        exchange = await stack.enter_async_context(Exchange.open(credentials, PoolOffers(pool), Uploads()))
        swarm, giver = toc.digest.raw, PeerId.parse(peer)

        async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
            await pool.add_many(segment, good)

        async def fetch(chunks: list[int], priority: int) -> None:
            answer = await exchange.fetch(
                giver, swarm, segment.table, chunks, priority=priority, landed=landed
            )
            assert not answer.missing
            assert not answer.busy

        start = time.perf_counter()
        await exchange.connect("127.0.0.1", port, expected=giver)
        await fetch([0], 0)
        note("exchange new connection + chunk ms", (time.perf_counter() - start) * 1000)
        times = []
        for n in range(1, SMALL_REQUESTS):
            start = time.perf_counter()
            await fetch([n], 0)
            times.append(time.perf_counter() - start)
        note("exchange 64 KiB p50 ms", statistics.median(times) * 1000)
        note("exchange 64 KiB p99 ms", statistics.quantiles(times, n=100)[98] * 1000)
        cpu, start = cpu_seconds() + giver_cpu(), time.perf_counter()
        await fetch(list(bulk), 3)
        seconds = time.perf_counter() - start
        assert segment.presence.has_range(0, segment.table.chunk_count)
        note("exchange MB/s", bulk_bytes / seconds / 1e6)
        note("exchange CPU s/GB", (cpu_seconds() + giver_cpu() - cpu) / bulk_bytes * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--give", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mebibytes", type=int, default=192)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--chunk-bytes", type=int, default=1 << 20)
    parser.add_argument("--directory", default="/var/tmp")
    arguments = parser.parse_args()
    trio.run(give if arguments.give else take, arguments)


if __name__ == "__main__":
    main()
