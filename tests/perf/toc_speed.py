"""CPU time from the JSON of a TOC of 50 000 entries to its segment table. Run by hand: `python tests/perf/toc_speed.py`.

Prints the median of five runs of each step. The goal is 0.30 s together: a layer is parsed once, while a mount waits.
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable

from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.toc import parse_toc

ENTRIES = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
RUNS = 5


def make_toc() -> bytes:
    entries = []
    offset = 100
    for k in range(ENTRIES):
        directory = f"usr/lib/python3/dist-packages/package{k // 40}"
        if k % 40 == 0:
            entries.append(
                {"name": directory + "/", "type": "dir", "mode": 0o755, "modtime": "2024-05-01T10:00:00Z"}
            )
            continue
        digest = "sha256:" + hashlib.sha256(str(k).encode()).hexdigest()
        entries.append(
            {
                "name": f"{directory}/module_{k}.py",
                "type": "reg",
                "size": 1000 + k % 7000,
                "modtime": f"2024-05-01T10:{k % 60:02}:00Z",
                "mode": 0o644,
                "offset": offset,
                "NumLink": 0,
                "digest": digest,
                "chunkDigest": digest,
            }
        )
        offset += 400 + k % 3000
    return json.dumps({"version": 1, "entries": entries}, indent="\t").encode()


def cpu_seconds(step: Callable[[], object]) -> float:
    gc.collect()
    started = time.process_time()
    step()
    return time.process_time() - started


def main() -> None:
    toc_json = make_toc()
    end = 1 << 40
    toc = parse_toc(toc_json, kind="estargz", payload_end=end, blob_size=end)
    layout = SegmentLayout.build(toc, compression="gzip")
    table = layout.to_bytes()
    steps: dict[str, Callable[[], object]] = {
        "parse": lambda: parse_toc(toc_json, kind="estargz", payload_end=end, blob_size=end),
        "layout": lambda: SegmentLayout.build(toc, compression="gzip"),
        "table": layout.to_bytes,
        "open table": lambda: SegmentTable(table),
    }
    total = 0.0
    for name, step in steps.items():
        seconds = statistics.median(cpu_seconds(step) for _ in range(RUNS))
        total += seconds
        print(f"{name:12} {seconds * 1000:8.1f} ms")
    print(f"{'together':12} {total * 1000:8.1f} ms for {ENTRIES} entries, {len(toc_json)} bytes of JSON")


if __name__ == "__main__":
    main()
