"""What a mount costs. The limits are wide; the figures are printed (`pytest -s`)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.mount.image_on_disk import ImageOnDisk, call, mounted, run

pytestmark = [pytest.mark.root, pytest.mark.trio]

ENTRIES = 50_000
MEMORY_LIMIT_KB = 40_000


def own_memory_kb(pid: int) -> int:
    """Memory that is neither a mapped file's nor shared with the zygote."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith("Pss_Anon:")]
    return int(line.split()[1])


async def test_large_tree_takes_little_memory_and_starts_at_once(tmp_path: Path) -> None:
    image = ImageOnDisk(tmp_path / "image")
    for directory in range(ENTRIES // 50):
        image.add(b"d%d" % directory)
        for n in range(49):
            image.add(b"d%d/a file with a name %d" % (directory, n), "reg", b"", mode=0o644)
    image.add(b"content", "reg", b"x" * 1_000_000)
    image.write().supply_all()
    async with mounted(image, tmp_path / "first") as first:
        start = time.perf_counter()
        async with mounted(image, tmp_path / "root") as m:
            cold_ms = (time.perf_counter() - start) * 1000
            start = time.perf_counter()
            session = await m.host.start_session(image.options(), m.supplier.ensure)
            warm_ms = (time.perf_counter() - start) * 1000
            session.drop_mount_fd()
            idle_kb = own_memory_kb(m.session.pid)
            start = time.perf_counter()
            found = await run("find", m.directory, "-type", "f", "-size", "+100k")
            find_seconds = time.perf_counter() - start
            assert found.stdout.count(b"\n") == 1
            await call((m.directory / "content").read_bytes)
            used_kb = own_memory_kb(m.session.pid)
            parent = int(Path(f"/proc/{m.session.pid}/stat").read_text().rpartition(")")[2].split()[1])
            zygote_kb = own_memory_kb(parent)
            await session.wait_closed()
        assert first.session.exit_status is None
    print(
        f"start {cold_ms:.0f} ms with the zygote, {warm_ms:.1f} ms after; find over {ENTRIES} entries {find_seconds:.2f} s"
    )
    print(f"own memory: {idle_kb} kB idle, {used_kb} kB after the find; zygote {zygote_kb} kB")
    assert used_kb < MEMORY_LIMIT_KB
    assert warm_ms < 1000
