"""Reads of one kind in a process of its own, so that no cache of the benchmark's own helps: prints the seconds.

python -m p2pgz.bench.reader tree|files|sequential|random PATH SEED
"""

from __future__ import annotations

import os
import random
import stat
import sys
import time
from pathlib import Path
from typing import Final

READ_BYTES: Final = 1 << 20
PAGE_BYTES: Final = 4096
RANDOM_READS: Final = 20_000


def read_tree(root: Path) -> None:
    """Every name, and its attributes."""
    for folder, directories, names in os.walk(root):
        for name in (*directories, *names):
            Path(folder, name).lstat()


def read_files(root: Path) -> None:
    """Every byte of every file."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if stat.S_ISREG(path.lstat().st_mode):
                read_sequentially(path)


def read_sequentially(path: Path) -> None:
    """One file, a MiB at a time."""
    with path.open("rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass


def read_randomly(path: Path, seed: int) -> None:
    """Pages of one file."""
    rng = random.Random(seed)  # noqa: S311  # for places, not for secrets
    pages = max(1, path.stat().st_size // PAGE_BYTES)
    with path.open("rb", buffering=0) as file:
        for _ in range(RANDOM_READS):
            os.pread(file.fileno(), PAGE_BYTES, rng.randrange(pages) * PAGE_BYTES)


def main(kind: str, path: str, seed: str) -> None:
    """See the module."""
    began = time.perf_counter()
    if kind == "random":
        read_randomly(Path(path), int(seed))
    else:
        {"tree": read_tree, "files": read_files, "sequential": read_sequentially}[kind](Path(path))
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:4])
