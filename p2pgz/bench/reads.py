"""A mount whose bytes are all here beside the same tree on the local disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from p2pgz.bench.processes import drop_caches, running
from p2pgz.errors import P2pgzError

KINDS: Final = ("tree", "files", "sequential", "random")


class Read(NamedTuple):
    """One measurement."""

    system: str
    """`mount` or `disk`"""
    kind: str
    cold: bool
    seconds: float


def measure(
    reference: str,
    options: Sequence[str],
    folder: Path,
    *,
    mode: str,
    runs: int,
    say: Callable[[str], None],
) -> list[Read]:
    """Alternating runs. Raises P2pgzError."""
    found: list[Read] = []
    with running(folder, peers=False) as node:
        say("fetching and unpacking the image")
        node("verify", *options, reference)
        node("mount", "--mode", mode, *options, reference, node.root)
        disk = folder / "unpacked"
        disk.mkdir()
        _unpack(node.root, disk)
        largest = _largest(disk)
        if largest is None:
            raise P2pgzError(f"{reference} has no files to read")
        cold = drop_caches()
        roots = {"mount": node.root, "disk": disk}
        for number in range(runs):
            for system, root in roots.items() if number % 2 == 0 else reversed(list(roots.items())):
                for kind in KINDS:
                    path = root if kind in {"tree", "files"} else root / largest
                    if cold:
                        drop_caches()
                        found.append(Read(system, kind, True, _read(kind, path, number)))
                    else:
                        _read(kind, path, number)
                    found.append(Read(system, kind, False, _read(kind, path, number)))
            say(f"reads {number + 1}/{runs}")
    return found


def _unpack(root: Path, disk: Path) -> None:
    pack = subprocess.Popen(
        ["tar", "-C", str(root), "--one-file-system", "-cf", "-", "."],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    done = subprocess.run(
        ["tar", "-C", str(disk), "-xf", "-"], stdin=pack.stdout, capture_output=True, text=True, check=False
    )
    assert pack.stdout is not None
    pack.stdout.close()
    pack.wait()
    if done.returncode and os.geteuid() == 0:
        raise P2pgzError(f"{disk}: cannot unpack the image: {done.stderr.strip().splitlines()[-1]}")


def _largest(root: Path) -> Path | None:
    best: tuple[int, Path] | None = None
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and (best is None or path.stat().st_size > best[0]):
                best = (path.stat().st_size, path.relative_to(root))
    return best[1] if best is not None else None


def _read(kind: str, path: Path, seed: int) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "p2pgz.bench.reader", kind, str(path), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise P2pgzError(f"{path}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
