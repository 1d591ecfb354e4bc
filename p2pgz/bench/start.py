"""How long a container of an image has to wait: from an empty pool to the first sign of life.

Each run is a fresh node; the sources alternate, so that a busy minute hits all of them.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from p2pgz.bench.processes import BenchNode, drop_caches, running
from p2pgz.errors import P2pgzError

SOURCES: Final = ("registry", "peer", "both")
MARKER_SECONDS: Final = 600.0
JOIN_SECONDS: Final = 20.0


class Run(NamedTuple):
    """One cold start."""

    source: str
    mount_seconds: float
    ready_seconds: float
    registry_bytes: int
    registry_requests: int
    peer_bytes: int


class Program(NamedTuple):
    """What runs in a chroot of the image, and the text in its output that ends the clock (empty: its first output)."""

    command: str
    until: str


def measure(
    reference: str,
    options: Sequence[str],
    folder: Path,
    *,
    program: Program | None,
    runs: int,
    peers: Sequence[str],
    say: Callable[[str], None],
) -> list[Run]:
    """Cold starts from each source. `options`: of every command that names the image. `peers`: multiaddrs of nodes that
    have it; without any, one is started and given the whole image. Raises P2pgzError."""
    found: list[Run] = []
    with _peer(reference, options, folder / "peer", peers, say) as (addresses, digest):
        by_digest = f"{_repository(reference)}@{digest}" if digest else reference
        for number in range(runs):
            for source in SOURCES if number % 2 == 0 else reversed(SOURCES):
                name = reference if source == "registry" else by_digest
                bootstrap = () if source == "registry" else addresses
                run = _cold_start(name, options, folder / f"{source}{number}", source, bootstrap, program)
                say(f"{source} {number + 1}/{runs}: {run.ready_seconds:.2f} s")
                found.append(run)
    return found


@contextmanager
def _peer(
    reference: str, options: Sequence[str], folder: Path, peers: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[Sequence[str], str]]:
    """Addresses of nodes that have the image, and its digest."""
    with running(folder, P2PGZ_FETCH__FILL="false") as node:
        digest = _digest(node, reference, options)
        if peers:
            yield peers, digest
            return
        say("fetching the image once, for the peer of the comparison")
        node("verify", *options, reference)
        yield node.status()["node"]["addrs"], digest


def _digest(node: BenchNode, reference: str, options: Sequence[str]) -> str:
    import json

    node("mount", "--no-fill", *options, reference, node.root)
    found: str = json.loads(node("status", "--json"))["mounts"][0]["digest"]
    node("umount", node.root)
    return found


def _repository(reference: str) -> str:
    head, _, tail = reference.partition("@")[0].rpartition(":")
    return reference.partition("@")[0] if not head or "/" in tail else head


def _cold_start(
    reference: str,
    options: Sequence[str],
    folder: Path,
    source: str,
    bootstrap: Sequence[str],
    program: Program | None,
) -> Run:
    with running(folder, *bootstrap, peers=bool(bootstrap), P2PGZ_FETCH__FILL="false") as node:
        if bootstrap:
            _wait_for_peer(node)
        drop_caches()
        began = time.monotonic()
        node("mount", "--no-fill", *options, reference, node.root)
        mounted = time.monotonic()
        if program is None:
            read_all(node.root)
        else:
            run_until(node.root, folder / "over", program)
        ready = time.monotonic()
        sources = node.status()["sources"]
    shutil.rmtree(folder, ignore_errors=True)
    return Run(
        source,
        mounted - began,
        ready - began,
        sources["registry"]["wire_bytes"],
        sources["registry"]["requests"],
        sources["peer"]["bytes"],
    )


def _wait_for_peer(node: BenchNode) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not node.status()["peers"]:
        if time.monotonic() > deadline:
            raise P2pgzError(
                f"no peer was reached within {JOIN_SECONDS:.0f} s",
                hint="is the address right? `p2pgz status` on that host shows it",
            )
        time.sleep(0.1)


def read_all(root: Path) -> None:
    """Every byte below a directory, by another process."""
    subprocess.run(
        ["tar", "--one-file-system", "-C", str(root), "-cf", "-", "."],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def run_until(root: Path, over: Path, program: Program) -> None:
    """Run the program in a chroot of an overlay on the mount until its output shows the text. As root."""
    for name in ("upper", "work", "root"):
        (over / name).mkdir(parents=True)
    script = (
        'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root" && '
        'mkdir -p "$2/root/proc" "$2/root/dev" && mount -t proc proc "$2/root/proc" && '
        'mount --bind /dev "$2/root/dev" && exec chroot "$2/root" /bin/sh -c "$3"'
    )
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    process = subprocess.Popen(
        [*command, "sh", str(root), str(over), program.command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    seen: list[bytes] = []
    deadline = time.monotonic() + MARKER_SECONDS
    try:
        for line in process.stdout:
            seen.append(line)
            if program.until.encode() in line:
                return
            if time.monotonic() > deadline:
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    last = b"".join(seen[-3:]).decode(errors="replace").strip()
    raise P2pgzError(
        f"{program.command!r} did not print {program.until!r}; its last output: {last or 'none'}",
        hint="--run is run by the image's /bin/sh, --until is a text of one line of its output",
    )
