"""The bars of speed, each measured beside its yardstick in one run: `make bench`.

    python -m tests.perf.bars [--folder DIR] [--rows reads,image,known,many,shared,start] [--repeat 3] [--scale 1.0]

Root. DIR is on the disk to measure (default /var/tmp). In every repetition a system and its yardstick follow each other in
random order, and a row's figure is the median of the ratios of the repetitions, so that other work on the machine hurts
both. `--scale` makes images smaller. The rows `start` need a laboratory with stargz-snapshotter in it, see `bars_start`;
without one they are skipped. Prints a table; its last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROWS = ("reads", "image", "known", "many", "shared", "start")


@dataclass
class Bar:
    """One row: `values` are the figures of the repetitions, of which the median has to be at most `bar`."""

    what: str
    bar: float
    values: list[float]
    unit: str = "ratio"
    note: str = ""

    @property
    def figure(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return self.figure <= self.bar

    def row(self) -> str:
        low, high = min(self.values), max(self.values)
        verdict = "met" if self.met else "MISSED"
        return (
            f"| {self.what} | {self.figure:.3g} | {low:.3g}–{high:.3g} ({len(self.values)}) "
            f"| ≤ {self.bar:g} {'' if self.unit == 'ratio' else self.unit} | {verdict} | {self.note} |"
        )

    def document(self) -> dict[str, object]:
        return {
            "what": self.what,
            "figure": round(self.figure, 4),
            "bar": self.bar,
            "unit": self.unit,
            "met": self.met,
            "values": [round(value, 4) for value in self.values],
        }


@dataclass
class Bench:
    """What the rows are measured with."""

    folder: Path
    repeat: int
    scale: float
    skipped: dict[str, str] = field(default_factory=dict)

    def sized(self, number: int, least: int = 1) -> int:
        return max(least, int(number * self.scale))


Rows = Callable[[Bench], Iterator[Bar]]


def ratios(own: list[float], yardstick: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, yardstick, strict=True)]


def rows(name: str) -> Rows:
    """The function behind a group of rows; each is imported when it is measured."""
    if name == "reads":
        from tests.perf.bars_reads import reads as measure
    elif name == "start":
        from tests.perf.bars_start import start as measure
    else:
        from tests.perf import bars_image

        measure = {
            "image": bars_image.image,
            "known": bars_image.known,
            "many": bars_image.many,
            "shared": bars_image.shared,
        }[name]
    return measure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    if os.geteuid():
        print("this needs root: it mounts, and drops the kernel's caches", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is mounted is unmounted
    begin, load = time.monotonic(), os.getloadavg()[0]
    bars: list[Bar] = []
    faults: dict[str, str] = {}
    skipped: dict[str, str] = {}
    print("| what | figure | range (runs) | bar | | |\n|---|---|---|---|---|---|", flush=True)
    for name in options.rows.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"p2pgz-bars-{name}-", dir=options.folder))
        bench = Bench(folder, options.repeat, options.scale)
        try:
            for bar in rows(name)(bench):
                print(bar.row(), flush=True)
                bars.append(bar)
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: {faults[name]}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        skipped |= bench.skipped
    print(
        json.dumps(
            {
                "bench": "bars",
                "load_before": round(load, 1),
                "seconds": round(time.monotonic() - begin),
                "missed": [bar.what for bar in bars if not bar.met],
                "skipped": skipped,
                "faults": faults,
                "bars": [bar.document() for bar in bars],
            }
        )
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
