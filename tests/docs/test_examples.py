"""The commands in README and how-tos work: each page's blocks marked `sh run` are one script, run as they stand.

Where a page says `localhost:5000`, a registry of ours answers; `/srv` and `/mnt` are folders of the test's, and ports from
24801 on are free ones.
`oci:layout:plain` is a small image, `localhost:5000/team/app:lazy` the same one, converted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME_ANNOTATION
from tests.e2e.cli.fake_registry_thread import RegistryThread

ROOT = Path(__file__).parents[2]
NODE_ENDS_WITHIN_SECONDS = 10.0
BLOCK = re.compile(r"^```sh run( root)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
    if path.is_file() and BLOCK.search(path.read_text("utf-8"))
]


def layer() -> bytes:
    """A root file system with a shell."""
    buffer = io.BytesIO()
    shell = Path(shutil.which("busybox") or "/bin/true").read_bytes()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin", "etc", "proc", "dev", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, data in (("bin/busybox", shell), ("etc/os-release", b"ID=example\n")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            tar.addfile(member, io.BytesIO(data))
        for name in ("sh", "cat", "echo", "ls"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


def write_layout(folder: Path, tar: bytes) -> None:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def store(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    stored = store(tar, OCI_LAYER_TAR)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    rootfs = {"type": "layers", "diff_ids": [stored["digest"]]}
    config = {"os": "linux", "architecture": machine, "config": {}, "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": store(json.dumps(config).encode(), OCI_CONFIG),
        "layers": [stored],
    }
    described = store(json.dumps(manifest).encode(), OCI_MANIFEST)
    described["annotations"] = {REF_NAME_ANNOTATION: "plain"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `layout` and its only layer, `layer.tar`."""
    folder = tmp_path_factory.mktemp("image")
    tar = layer()
    write_layout(folder / "layout", tar)
    (folder / "layer.tar").write_bytes(tar)
    return folder


@pytest.fixture(scope="module")
def registry(layout: Path) -> Iterator[RegistryThread]:
    """What answers in place of localhost:5000."""
    with RegistryThread.running() as registry:
        convert = ["convert", f"oci:{layout / 'layout'}:plain", f"{registry.address}/team/app:lazy"]
        subprocess.run([sys.executable, "-m", "p2pgz", *convert], check=True, timeout=60, capture_output=True)
        yield registry


@pytest.fixture
def folder(layout: Path) -> Iterator[Path]:
    """A working directory on a disk, with the image in it; the node that a page started ends with it."""
    place = Path(tempfile.mkdtemp(prefix="p2pgz-docs-", dir="/var/tmp"))
    shutil.copytree(layout, place, dirs_exist_ok=True)
    yield place
    for point in reversed(mount_points(place)):  # only where a page stopped half way
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
    for lock in place.glob("*/lock"):
        end_node(lock)
    shutil.rmtree(place, ignore_errors=True)


def mount_points(place: Path) -> list[str]:
    """What is mounted below a folder, oldest first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point.startswith(f"{place}/")]


def end_node(lock: Path) -> None:
    """End the node that a page started, if it still runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(lock.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + NODE_ENDS_WITHIN_SECONDS
        status = Path(f"/proc/{pid}/stat")
        while time.monotonic() < deadline and status.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.02)


@pytest.fixture
def free_ports() -> list[int]:
    """Ports that nobody listens at now; by the same number a page means the same one."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(10)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


@pytest.mark.root
@pytest.mark.tools("busybox", "unshare", "curl")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_work(
    page: Path, folder: Path, registry: RegistryThread, free_ports: list[int]
) -> None:
    blocks = [block for _, block in BLOCK.findall(page.read_text("utf-8"))]
    script = "\n".join(blocks).replace("localhost:5000", registry.address)
    script = re.sub(r"(?<![\w./])/(srv|mnt)\b", rf"{folder}/\1", script)
    script = script.replace("/run/p2pgz/", f"{folder}/state/")
    script = re.sub(r"\b2480\d\b", lambda port: str(free_ports[int(port[0]) - 24800]), script)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "P2PGZ_STATE_DIR": str(folder / "state"),
        "P2PGZ_NODE__EPHEMERAL_LINGER_SECONDS": "5",
        "HOME": str(folder),
    }
    for name in ("mnt", "srv"):
        (folder / name).mkdir()
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")
