"""A disk quota of the system, EDQUOT, which comes at other calls than a full disk: readers go on, and so does the node."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pgz.testing.docker_registry import running_registry
from tests.e2e.restart.lazy_node import LazyNode, file_bytes, push_image, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow]

FILES = 48
DISK_BYTES = 512 << 20
LIMIT_BYTES = 16 << 20
TOOL_SECONDS = 60


def tool(*words: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=TOOL_SECONDS
    )
    if done.returncode:
        pytest.skip(f"{words[0]} {words[1]}: {done.stderr.strip()[-200:]}")
    return done.stdout


@contextmanager
def disk_with_quota(folder: Path) -> Iterator[Path]:
    """A file system of its own with quota groups. The quotas of ext4 and XFS are missing from many kernels."""
    if not (shutil.which("mkfs.btrfs") and shutil.which("btrfs")):
        pytest.skip("btrfs-progs is not installed")
    image, root = folder / "disk", folder / "quota"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    root.mkdir()
    tool("mkfs.btrfs", "-q", image)
    tool("mount", "-o", "loop", image, root)
    try:
        tool("btrfs", "quota", "enable", root)
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=False)


def fresh_sha256(path: Path) -> str:
    """Of what the mount gives, not of what the kernel has kept of it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def limit(root: Path, count: str) -> None:
    tool("btrfs", "qgroup", "limit", count, root)


def test_node_goes_on_when_its_quota_of_the_disk_is_used_up(tmp_path: Path) -> None:
    with disk_with_quota(tmp_path) as disk, running_registry(tmp_path / "registry") as registry:
        reference, hashes = push_image(tmp_path / "plain", registry.address, 5, FILES)
        limit(disk, str(LIMIT_BYTES))
        node = LazyNode(disk / "state", environment={"P2PGZ_PEERS__ENABLED": "never"})
        node.log = tmp_path / "node.log"  # it is not the log that is to be full
        root = disk / "root"
        root.mkdir()
        try:
            node.start()
            node.call("mount", "--mode", "tree", "--no-fill", reference, root)
            for _ in range(2):
                for name, digest in hashes.items():
                    assert fresh_sha256(root / name) == digest, name
            pool = node.status()["pool"]
            assert pool["bytes"] < LIMIT_BYTES
            assert pool["full_errors"] > 0
            assert pool["sync_failures"] == 0
            # killed and started again without a free byte
            node.kill()
            node.start()
            for name, digest in hashes.items():
                assert fresh_sha256(root / name) == digest, name
            limit(disk, "none")
            wait_until(lambda: node.status()["pool"]["state"] == "keeping", 20)
            for name, digest in hashes.items():
                assert fresh_sha256(root / name) == digest, name
            everything = sum(map(file_bytes, range(FILES)))
            wait_until(lambda: node.status()["pool"]["bytes"] == everything, 20)
            node.call("umount", root)
        finally:
            node.close()
