"""The small numbers that docs/explanation/design.md rests on: `.venv/bin/python tests/perf/design_facts.py`.

CPU time of this process, best of several rounds, so that a busy machine disturbs little. Ratios matter, not the numbers.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import apsw
import deflate
import trio
from isal import isal_zlib

ROUNDS = 5
CORPUS_BYTES = 24 << 20


def cpu_seconds(work: Callable[[], object], repeat: int) -> float:
    """CPU seconds of one call: the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(repeat):
            work()
        best = min(best, (time.process_time() - started) / repeat)
    return best


def corpus() -> list[bytes]:
    """Files of the standard library in pieces of at most 1 MiB: a mix of text and compiled code."""
    pieces: list[bytes] = []
    total = 0
    for folder, names, files in os.walk(sysconfig.get_paths()["stdlib"]):
        names.sort()
        for name in sorted(files):
            data = Path(folder, name).read_bytes()[: 1 << 20]
            if data and total < CORPUS_BYTES:
                pieces.append(data)
                total += len(data)
    return pieces


async def hop_seconds(count: int = 2000) -> float:
    """One thread hop: wall time, median."""
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        await trio.to_thread.run_sync(int)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Measure and print."""
    print(f"thread hop (trio.to_thread, median)      {trio.run(hop_seconds) * 1e6:8.1f} us")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        connection = apsw.Connection(f"{folder}/db")
        connection.pragma("journal_mode", "WAL")
        connection.execute("CREATE TABLE t(k BLOB PRIMARY KEY, v) WITHOUT ROWID")
        keys = [hashlib.sha256(b"%d" % n).digest() for n in range(100_000)]
        with connection:
            connection.executemany("INSERT INTO t VALUES(?, 1)", [(key,) for key in keys])
        some = iter(keys * ROUNDS)
        read = cpu_seconds(
            lambda: list(connection.execute("SELECT v FROM t WHERE k = ?", (next(some),))), 20_000
        )
        print(f"SQLite point read on the loop            {read * 1e6:8.1f} us")
        connection.close()
    piece = os.urandom(1 << 20)
    print(
        f"sha256                                   {1 / cpu_seconds(lambda: hashlib.sha256(piece), 50):8.0f} MiB/s"
    )
    pieces = corpus()
    size = sum(map(len, pieces))
    go_like = [zlib.compress(data, 6, 31) for data in pieces]
    packed = [deflate.gzip_compress(data, 4) for data in pieces]
    zlib_cpu = cpu_seconds(lambda: [zlib.compress(data, 6, 31) for data in pieces], 1)
    ours_cpu = cpu_seconds(lambda: [deflate.gzip_compress(data, 4) for data in pieces], 1)
    ratio = sum(map(len, packed)) / sum(map(len, go_like))
    print(f"libdeflate 4 / zlib 6, CPU               {ours_cpu / zlib_cpu:8.2f}   of {size >> 20} MiB")
    print(f"libdeflate 4 / zlib 6, size              {ratio:8.3f}")
    isal = cpu_seconds(lambda: [isal_zlib.decompress(data, 31) for data in packed], 1)
    plain = cpu_seconds(lambda: [zlib.decompress(data, 31) for data in packed], 1)
    print(f"inflate: isal / zlib, CPU                {isal / plain:8.2f}")


if __name__ == "__main__":
    main()
