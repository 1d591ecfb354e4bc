"""Read speeds of a mounted tree in erofs and tree mode, beside the same tree unpacked on the local disk.

    python tests/perf/erofs_bench.py FOLDER [--source DIR] [--repeat 3] [--big-mib 512] [--random 200000]

Root. FOLDER is on the disk to measure; --source is copied into an image (everything present in the pool) and unpacked once
with tar as the yardstick. Each figure is the median of --repeat runs in random order: cold is after `drop_caches`, warm is
the run that follows. Programs are processes of their own. Prints a table of seconds and of ratios to the unpacked tree.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from p2pgz.mount.attach import move_mount
from p2pgz.mount.hosting import ErofsPart
from p2pgz.mount.segment_client import SegmentClient
from p2pgz.mount.session import FsHost
from p2pgz.mount.setup import READ_AHEAD_COMPLETE_KB
from p2pgz.mount.umount import unmount
from tests.e2e.mount.image_on_disk import ImageOnDisk, Supplier

MIB = 1 << 20
ITEMS = ("find", "tar", "seq", "random")
SYSTEMS = ("unpacked", "erofs native", "erofs through FUSE", "tree")
READER = """
import os, random, sys, time
kind, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
start = time.perf_counter()
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
if kind == "seq":
    while os.read(fd, 1 << 20):
        pass
else:
    choose = random.Random(1)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(count):
        os.pread(fd, 4096, choose.randrange(size >> 12) << 12)
print(time.perf_counter() - start)
"""


def make_image(folder: Path, source: Path, big_bytes: int) -> ImageOnDisk:
    image = ImageOnDisk(folder, chunk_bytes=4 * MIB)
    choose = random.Random(1)
    image.add(b"big", "reg", b"".join([choose.randbytes(MIB) for _ in range(big_bytes // MIB)]))
    top = os.fsencode(source)
    for where, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(folders + names):
            path = os.path.join(where, name)
            status = os.lstat(path)
            more = {
                "mode": status.st_mode & 0o7777,
                "uid": status.st_uid,
                "gid": status.st_gid,
                "mtime": int(status.st_mtime),
            }
            shown = b"files/" + os.path.relpath(path, top)
            if os.path.islink(path):
                image.add(shown, "symlink", link=os.readlink(path), **more)
            elif os.path.isdir(path):
                image.add(shown, **more)
            elif os.path.isfile(path):
                image.add(shown, "reg", Path(os.fsdecode(path)).read_bytes(), **more)
    return image.write().supply_all()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def measure(item: str, root: Path, count: int) -> float:
    start = time.perf_counter()
    if item == "find":
        subprocess.run(["find", root, "-printf", "%s %m %u %T@\n"], stdout=subprocess.DEVNULL, check=True)
    elif item == "tar":
        subprocess.run(
            f"tar -C {root} -cf - files | cat >/dev/null", shell=True, check=True, stderr=subprocess.DEVNULL
        )
    else:
        done = subprocess.run(
            [sys.executable, "-c", READER, item, root / "big", str(count)], capture_output=True, check=True
        )
        return float(done.stdout)
    return time.perf_counter() - start


@asynccontextmanager
async def mounted(image: ImageOnDisk, system: str, root: Path) -> AsyncIterator[Path]:
    root.mkdir(exist_ok=True)
    ensure = Supplier(image).ensure
    async with FsHost.open() as host, SegmentClient.open() as client:
        if system == "tree":
            session = await host.start_session(image.options(read_ahead_kb=READ_AHEAD_COMPLETE_KB), ensure)
        else:
            native = [0] if system == "erofs native" else []
            opening = ErofsPart(bytes(image.metadata_path), native, True)
            session = await client.start_session(opening, image.options(), ensure)
        descriptor = session.take_mount_fd()
        move_mount(descriptor, root)
        os.close(descriptor)
        try:
            yield root
        finally:
            await trio.to_thread.run_sync(unmount, root)
            await session.wait_closed()


Times = dict[tuple[str, str, str], list[float]]
"""by system, item, and "cold" or "warm": seconds of each repetition"""


async def bench(options: argparse.Namespace) -> Times:
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    image = await trio.to_thread.run_sync(make_image, folder / "image", options.source, options.big_mib * MIB)
    times: Times = {}
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    async with mounted(image, "erofs native", folder / "root") as root:
        unpack = f"tar -C {root} -cf - . | tar -C {unpacked} -xf -"
        await trio.to_thread.run_sync(partial(subprocess.run, unpack, shell=True, check=True))
    runs = [(system, item) for system in SYSTEMS for item in ITEMS]
    for _ in range(options.repeat):
        for system, item in random.sample(runs, len(runs)):
            # with new processes each time: pages that a process has mapped survive the dropping of caches
            await trio.to_thread.run_sync(drop_caches)
            async with AsyncExitStack() as stack:
                if system == "unpacked":
                    root = unpacked
                else:
                    root = await stack.enter_async_context(mounted(image, system, folder / "root"))
                await trio.to_thread.run_sync(drop_caches)
                for state in ("cold", "warm"):
                    # a cold read of 200 000 random pages is all disk: a tenth tells as much
                    count = options.random // (10 if state == "cold" else 1)
                    if item == "random" and state == "warm":
                        await trio.to_thread.run_sync(measure, "seq", root, count)
                    took = await trio.to_thread.run_sync(measure, item, root, count)
                    times.setdefault((system, item, state), []).append(took)
    return times


def show(times: Times) -> None:
    columns = [(item, state) for state in ("cold", "warm") for item in ITEMS]
    print("| seconds (ratio) | " + " | ".join(f"{item} {state}" for item, state in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for system in SYSTEMS:
        cells = []
        for item, state in columns:
            own = statistics.median(times[system, item, state])
            ratio = own / statistics.median(times["unpacked", item, state])
            cells.append(f"{own:.3f} ({ratio:.2f})")
        print(f"| {system} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path(sys.base_prefix))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--big-mib", type=int, default=512)
    parser.add_argument("--random", type=int, default=200_000)
    options = parser.parse_args()
    try:
        show(trio.run(bench, options))
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
