"""Bars that are measured with a node of its own: a whole image from a registry on this host, and many mounts.

Called by `bars`. The yardsticks are programs of the system (curl, tar, overlayfs) or the bare library calls.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from p2pgz.bench.processes import BenchNode, drop_caches, running
from p2pgz.cli.client import NodeClient
from p2pgz.core.digest import Digest
from p2pgz.core.members import MemberInflater
from p2pgz.core.verify import verify
from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.lazy_node import run
from tests.perf.bars import Bar, Bench, ratios
from tests.perf.layouts import Layers, block

MIB = 1 << 20
GB = 1e9
TICKS = os.sysconf("SC_CLK_TCK")
IMAGE_FILES = 500
SETTLED_SECONDS = 2.0
KNOWN_ENTRIES = 300_000
MANY_MOUNTS, MANY_ENTRIES = 100, 50_000
SHARED_IMAGES, SHARED_MOUNTS_EACH, SHARED_BASE_FILES = 10, 2, 32


def read_all(root: Path) -> None:
    subprocess.run(
        f"tar -C {root} -cf - . | cat >/dev/null", shell=True, check=True, stderr=subprocess.DEVNULL
    )


def tree_of(pid: int) -> list[int]:
    """A process and what it started. Not the holder, which goes to the background, and does nothing per byte."""
    found = {pid}
    while True:
        children = {
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and _parent(entry) in found
        }
        if children <= found:
            return sorted(found)
        found |= children


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def image(bench: Bench) -> Iterator[Bar]:
    """A whole image through a cold mount, and what that costs."""
    layers = Layers(bench.folder / "plain")
    count = bench.sized(IMAGE_FILES, 8)
    files = {f"usr/lib/f{n:04}": block(n, MIB + n * 997) for n in range(count)}
    layers.add("t", [files])
    size = sum(map(len, files.values()))
    walls: dict[str, list[float]] = {"p2pgz": [], "full": []}
    costs: list[float] = []
    bare: list[float] = []
    with running_registry(bench.folder / "registry") as registry:
        reference = f"{registry.address}/bars/image:t"
        run("convert", "--plain-http", f"oci:{bench.folder}/plain:t", reference, seconds=600)
        blobs = blobs_of(registry.address)
        for number in range(bench.repeat):
            order: list[tuple[str, Callable[[], None]]] = [
                ("p2pgz", lambda number=number: through_mount(bench, number, reference, size, walls, costs)),
                ("full", lambda number=number: full_pull(bench, number, blobs, walls)),
                ("bare", lambda: bare.append(bare_cpu(bench, files) / (size / GB))),
            ]
            for _, measure in random.sample(order, len(order)):
                measure()
    yield Bar(
        "whole image through a cold mount / full pull, unpack, read",
        0.8,
        ratios(walls["p2pgz"], walls["full"]),
    )
    cost, least = sorted(costs)[len(costs) // 2], sorted(bare)[len(bare) // 2]
    yield Bar(
        "CPU per GB of node and fs / inflate + sha256 + pwrite alone",
        1.5,
        ratios(costs, bare),
        note=f"{cost:.2f} s/GB against {least:.2f}",
    )


def blobs_of(address: str) -> list[str]:
    """Where the layers of the image are."""
    accept = "Accept: application/vnd.oci.image.manifest.v1+json"
    url = f"http://{address}/v2/bars/image"
    done = subprocess.run(
        ["curl", "-sf", "-H", accept, f"{url}/manifests/t"], capture_output=True, check=True
    )
    return [f"{url}/blobs/{layer['digest']}" for layer in json.loads(done.stdout)["layers"]]


def through_mount(
    bench: Bench,
    number: int,
    reference: str,
    size: int,
    walls: dict[str, list[float]],
    costs: list[float],
) -> None:
    with running(bench.folder / f"node{number}", peers=False) as node:
        drop_caches()
        pid = node.status()["node"]["pid"]
        settle(pid)
        before, start = cpu_seconds(tree_of(pid)), time.perf_counter()
        node("mount", "--plain-http", reference, node.root)
        read_all(node.root)
        walls["p2pgz"].append(time.perf_counter() - start)
        costs.append((cpu_seconds(tree_of(pid)) - before) / (size / GB))


def settle(pid: int) -> None:
    """Wait until a node that was just started has nothing to do: what it imports is no cost of a byte."""
    used = -1.0
    while used != (used := cpu_seconds(tree_of(pid))):
        time.sleep(SETTLED_SECONDS)


def full_pull(bench: Bench, number: int, blobs: list[str], walls: dict[str, list[float]]) -> None:
    """Every layer is fetched to the disk and then unpacked from there, as a container runtime does."""
    folder = bench.folder / f"full{number}"
    root = folder / "root"
    root.mkdir(parents=True)
    drop_caches()
    start = time.perf_counter()
    for n, url in enumerate(blobs):
        subprocess.run(["curl", "-sf", "-o", folder / f"{n}.tar.gz", url], check=True)
        subprocess.run(["tar", "-C", root, "-xzf", folder / f"{n}.tar.gz"], check=True)
    read_all(root)
    walls["full"].append(time.perf_counter() - start)


def bare_cpu(bench: Bench, files: dict[str, bytes]) -> float:
    """The same bytes in chunks of 1 MiB: inflated, hashed, written, and nothing else."""
    chunks = [data[at : at + MIB] for data in files.values() for at in range(0, len(data), MIB)]
    packed = [(gzip.compress(chunk, 6), len(chunk), Digest.of(chunk).raw) for chunk in chunks]
    with (bench.folder / "bare").open("wb") as file:
        start, at = time.process_time(), 0
        for data, size, digest in packed:
            [(_, chunk)] = MemberInflater("gzip", [(0, size)]).feed(data)
            verify(digest, chunk, source="bars")
            os.pwrite(file.fileno(), chunk, at)
            at += size
        took = time.process_time() - start
    (bench.folder / "bare").unlink()
    return took


def known(bench: Bench) -> Iterator[Bar]:
    """The second mount of a large image: the command, and of that the node."""
    entries = bench.sized(KNOWN_ENTRIES, 1000)
    Layers(bench.folder / "plain").add("t", [{f"d{n // 500:03}/{n:06}": b"" for n in range(entries)}])
    reference = f"oci:{bench.folder}/plain:t"
    commands, requests = [], []
    with running(bench.folder / "node", peers=False) as node:
        node("mount", reference, node.root)
        for _ in range(max(bench.repeat, 5)):
            unmount(node)
            start = time.perf_counter()
            node("mount", reference, node.root)
            commands.append((time.perf_counter() - start) * 1000)
            unmount(node)
            client = NodeClient(node.folder / "state")
            start = time.perf_counter()
            result = client.call("/v1/mounts", {"reference": reference, "directory": str(node.root)})
            requests.append((time.perf_counter() - start) * 1000)
            os.close(client.descriptor(result["token"]))
            wait_until(lambda: not node.status()["mounts"])
    yield Bar(f"mount of {entries} known entries: in the node", 50, requests, unit="ms")
    yield Bar(f"mount of {entries} known entries: the command", 250, commands, unit="ms")


def unmount(node: BenchNode) -> None:
    if os.path.ismount(node.root):
        node("umount", node.root)
    wait_until(lambda: not node.status()["mounts"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come true")
        time.sleep(0.02)


def many(bench: Bench) -> Iterator[Bar]:
    """Memory of our own for many mounts."""
    entries, mounts = bench.sized(MANY_ENTRIES, 100), bench.sized(MANY_MOUNTS, 3)
    Layers(bench.folder / "plain").add("t", [{f"d{n // 500:03}/{n:06}": b"" for n in range(entries)}])
    with running(bench.folder / "node", peers=False) as node, ExitStack() as stack:
        pids: set[int] = set()
        for n in range(mounts):
            directory = bench.folder / f"m{n}"
            directory.mkdir()
            node("mount", f"oci:{bench.folder}/plain:t", directory)
            stack.callback(node, "umount", directory)
        status = node.status()
        pids = {*tree_of(status["node"]["pid"]), *(mount["pid"] for mount in status["mounts"])}
        [mode] = {mount["mode"] for mount in status["mounts"]}
        own = sum(map(anonymous_bytes, pids)) / 1e6
        yield Bar(
            f"{mounts} mounts of {entries} entries: Pss_Anon of all processes",
            600,
            [own],
            unit="MB",
            note=f"{mode} mode, {len(pids)} processes",
        )


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) << 10
    return 0


def shared(bench: Bench) -> Iterator[Bar]:
    """Page cache of many containers on one base, everything read in each, beside overlayfs on the same layers."""
    base = {f"base/f{n:03}": block(n, MIB) for n in range(SHARED_BASE_FILES)}
    layers = Layers(bench.folder / "plain")
    tops = [{f"top/f{n:03}": block(1000 + n, MIB)} for n in range(SHARED_IMAGES)]
    for n, top in enumerate(tops):
        layers.add(f"t{n}", [base, top])
    count = SHARED_IMAGES * SHARED_MOUNTS_EACH
    with ExitStack() as stack:
        lower = [unpacked(bench.folder / "base", base)]
        lower += [unpacked(bench.folder / f"top{n}", top) for n, top in enumerate(tops)]
        drop_caches()
        for n in range(count):
            merged = bench.folder / f"overlay{n}"
            merged.mkdir()
            options = f"lowerdir={lower[1 + n % SHARED_IMAGES]}:{lower[0]}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
            stack.callback(subprocess.run, ["umount", merged], check=True)
            read_all(merged)
        yardstick = cached_bytes(lower)
    with running(bench.folder / "node", peers=False) as node, ExitStack() as stack:
        for mode in ("erofs", "tree"):
            roots = []
            for n in range(count):
                directory = bench.folder / f"{mode}{n}"
                directory.mkdir()
                node("mount", "--mode", mode, f"oci:{bench.folder}/plain:t{n % SHARED_IMAGES}", directory)
                stack.callback(node, "umount", directory)
                roots.append(directory)
            wait_until(lambda: all(mount["state"] == "complete" for mount in node.status()["mounts"]))
            drop_caches()
            for root in roots:
                read_all(root)
            own = cached_bytes([*roots, node.folder / "state" / "pool"])
            yield Bar(
                f"{count} mounts of {SHARED_IMAGES} images on one base: page cache / overlayfs, {mode}",
                1.5,
                [own / yardstick],
                note=f"{own / 1e6:.0f} MB against {yardstick / 1e6:.0f}",
            )


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.sync()
    return folder


def cached_bytes(folders: list[Path]) -> int:
    """Of all files below; what the segment host's own FUSE files hold cannot be seen from outside."""
    names = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    total = 0
    for start in range(0, len(names), 500):
        words = [
            "fincore",
            "--bytes",
            "--noheadings",
            "--output",
            "RES",
            *map(str, names[start : start + 500]),
        ]
        total += sum(map(int, subprocess.run(words, capture_output=True, check=True).stdout.split()))
    return total
