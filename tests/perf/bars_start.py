"""Cold starts beside stargz-snapshotter, measured by a laboratory that is not part of this repository.

Looked for in $P2PGZ_BENCH_LAB, a folder with `lab/coldstart.py` (starts an image's program in a network namespace with a
link of a given rate and delay, on a new file system each time, and appends one JSON object per trial to a file), `w` (its
images and registry, up and filled) and `bin` (containerd, ctr and a daemon made of stargz-snapshotter's packages). Without
it, or without those programs, these rows are skipped. `p2pgz` is this tree's: a node that runs, then `p2pgz mount`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.perf.bars import Bar, Bench

IMAGES = ("python", "gcc", "redis")
LINKS = ("1000/1", "100/20")
FOREIGN = ("stargzd", "containerd", "ctr")
TRIAL_SECONDS = 30
PLAIN = 0.7


def start(bench: Bench) -> Iterator[Bar]:
    lab = Path(os.environ.get("P2PGZ_BENCH_LAB", "/nonexistent"))
    missing = [str(path) for path in needed(lab) if not path.exists()]
    if missing:
        bench.skipped["start"] = f"P2PGZ_BENCH_LAB: no {', '.join(missing)}"
        return
    systems = ("p2pgz", "stargz-chroot")
    trials = run(bench, lab, systems)
    for link in LINKS:
        for image in IMAGES:
            own, peer = (figures(trials, system, image, link, "ready") for system in systems)
            if not own or not peer:
                bench.skipped[f"start of {image}, {link}"] = "no trial succeeded"
                continue
            against = statistics.median(peer)
            yield Bar(
                f"start of {image}, {link} Mbit/ms, registry only / stargz-snapshotter",
                PLAIN,
                [value / against for value in own],
                note=f"{statistics.median(own):.2f} s against {against:.2f}",
            )


def needed(lab: Path) -> list[Path]:
    return [lab / "lab" / "coldstart.py", lab / "w", *(lab / "bin" / name for name in FOREIGN)]


def run(bench: Bench, lab: Path, systems: tuple[str, ...]) -> list[dict[str, Any]]:
    """All trials, in an order that the laboratory shuffles."""
    up = bench.folder / "is-up"
    up.write_text('#!/bin/sh\ntest -S "$1/api.sock"\n')
    up.chmod(0o755)
    out = bench.folder / "trials.jsonl"
    own = f"{sys.executable} -m p2pgz --state-dir STATE"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "P2PGZ_START": f"{own} node",
        "P2PGZ_UP": f"{up} STATE",
        "P2PGZ_MOUNT": f"{own} mount --plain-http REF DIR",
        "P2PGZ_UMOUNT": f"{own} umount DIR",
    }
    words = [lab / "lab" / "coldstart.py", "trial", lab / "w", lab / "bin", "--images", ",".join(IMAGES)]
    words += [
        "--links",
        ",".join(LINKS),
        "--systems",
        ",".join(systems),
        "-n",
        str(bench.repeat),
        "--out",
        out,
    ]
    count = len(IMAGES) * len(LINKS) * len(systems) * bench.repeat
    subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        check=True,
        stdout=sys.stderr,
        timeout=count * TRIAL_SECONDS,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def figures(trials: list[dict[str, Any]], system: str, image: str, link: str, field: str) -> list[float]:
    """A field of all trials that succeeded."""
    wanted = {"system": system, "image": image, "link": link}
    found = []
    for trial in trials:
        if trial.get("error") or any(trial.get(key) != value for key, value in wanted.items()):
            continue
        value = trial[field]
        found.append(max(value) if isinstance(value, list) else value)
    return found
