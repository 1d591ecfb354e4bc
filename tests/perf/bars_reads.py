"""Reads of an image that is here altogether, beside the same tree unpacked by one `tar -x` on the same ext4."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import trio

from tests.perf import erofs_bench
from tests.perf.bars import Bar, Bench, ratios

NAMES = {
    "find": "find -printf of all names",
    "tar": "tar of all files",
    "seq": "1 MiB reads in sequence",
    "random": "random 4 KiB reads",
}
SMALLER = Path(os.__file__).parent / "test"  # some thousand files
WARM = 1.1
COLD = 1.0
COLD_RANDOM = 1.6
COLD_FUSE = 1.3


def reads(bench: Bench) -> Iterator[Bar]:
    options = argparse.Namespace(
        folder=bench.folder / "reads",
        source=Path(sys.base_prefix) if bench.scale >= 1 else SMALLER,
        repeat=bench.repeat,
        big_mib=bench.sized(256, 16),
        random=bench.sized(200_000, 2000),
    )
    times = trio.run(erofs_bench.bench, options)
    for system, label in (("erofs native", "native"), ("erofs through FUSE", "through FUSE")):
        for state in ("warm", "cold"):
            for item, name in NAMES.items():
                bar = WARM
                if state == "cold":
                    bar = COLD_FUSE if system != "erofs native" else COLD_RANDOM if item == "random" else COLD
                own, yardstick = times[system, item, state], times["unpacked", item, state]
                yield Bar(f"{state}, {label}: {name}", bar, ratios(own, yardstick))
