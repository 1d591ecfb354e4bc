"""`p2pgz demo`: the whole way on this machine, with real processes and a registry of its own on loopback.

An image is made from files of this machine, pushed plain, converted, mounted by a node with a fresh state directory, and a
program of it is started in a chroot. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from p2pgz.cli.context import Settings, json_option, print_json
from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME_ANNOTATION
from p2pgz.errors import MountUnavailable, P2pgzError

# Enough that lazy and full differ visibly, little enough to pack in a few seconds
PAYLOAD_BYTES = 48 << 20
PROGRAMS = ("sh", "cat", "ls", "uname")
COMMAND = "uname -s; echo hello from an image that is not here yet; ls /usr/share | head -n 3"


def _libraries(program: str) -> list[Path]:
    """The shared libraries of a program, as the dynamic linker finds them."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [Path(word) for word in listed.split() if word.startswith("/") and Path(word).is_file()]


def _files() -> Iterator[Path]:
    """Files of this machine that make a small root file system with a lot that is never read."""
    for name in (*PROGRAMS, "head", "echo"):
        if found := shutil.which(name):
            yield Path(found)
            yield from _libraries(found)
    total = 0
    for root in ("/usr/share", "/usr/lib/python3", "/usr/include"):
        for directory, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                path = Path(directory, name)
                try:
                    size = path.lstat().st_size
                except OSError:
                    continue
                if not path.is_symlink() and path.is_file() and 0 < size < (4 << 20):
                    total += size
                    yield path
                if total > PAYLOAD_BYTES:
                    return


def _write_layout(folder: Path) -> None:
    """An OCI layout with one plain image, tagged `plain`."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = folder / "layer"
    _write_layer(layer)
    machine = os.uname().machine
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)

    def store(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    tar = store(layer.read_bytes(), OCI_LAYER_TAR)
    layer.unlink()
    config = {
        "os": "linux",
        "architecture": architecture,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [tar["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": store(json.dumps(config).encode(), OCI_CONFIG),
        "layers": [tar],
    }
    described = store(json.dumps(manifest).encode(), OCI_MANIFEST)
    index = {"schemaVersion": 2, "manifests": [{**described, "annotations": {REF_NAME_ANNOTATION: "plain"}}]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _write_layer(target: Path) -> None:
    seen: set[str] = set()
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for directory in ("bin", "proc", "tmp"):
            info = tarfile.TarInfo(directory)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for path in _files():
            name = str(path).lstrip("/")
            if name in seen:
                continue
            seen.add(name)
            with contextlib.suppress(PermissionError):
                tar.add(path.resolve(), name, recursive=False)
        for name in PROGRAMS:
            link = f"bin/{name}"
            if link not in seen and (found := shutil.which(name)):
                info = tarfile.TarInfo(link)
                info.type, info.linkname = tarfile.SYMTYPE, found
                tar.addfile(info)


class _Run:
    """The demo's node and commands: every one is a process of the installed `p2pgz`."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.base = [sys.executable, "-m", "p2pgz", "--quiet", "--state-dir", str(self.state)]
        # this pool is thrown away: it may be where a kept one must not, such as a container's own file system
        self.environment = {**os.environ, "P2PGZ_POOL__CHECK_FILESYSTEM": "false"}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.base, *arguments], capture_output=True, text=True, check=False, env=self.environment
        )
        if done.returncode:
            raise P2pgzError(f"p2pgz {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self("status", "--json"))
        return document

    def stop(self) -> None:
        """End the node that the first command started, and wait for it: its directory is removed next."""
        with contextlib.suppress(P2pgzError, ProcessLookupError):
            pid = self.status()["node"]["pid"]
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 15
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)


@click.command()
@json_option
@click.pass_obj
def demo(settings: Settings, /, as_json: bool) -> None:
    """Make an image of files of this machine, mount it lazily, start a program of it, and show what it cost."""
    import trio

    from p2pgz.testing.fake_registry import FakeRegistry

    say = (lambda text: None) if as_json or settings.quiet else (lambda text: click.echo(text, err=True))

    async def run(folder: Path) -> dict[str, Any]:
        async with FakeRegistry.open() as registry:
            return await trio.to_thread.run_sync(_tour, folder, registry.address, say)

    with tempfile.TemporaryDirectory(prefix="p2pgz-demo-", dir=roomy_directory()) as name:
        result = trio.run(run, Path(name))
    if as_json:
        print_json(result)
        return
    share = 100 * result["fetched_bytes"] / result["image_bytes"]
    rows = [
        ("image, compressed", f"{result['image_bytes'] / 1e6:.1f} MB"),
        (
            "fetched",
            f"{result['fetched_bytes'] / 1e6:.1f} MB ({share:.0f} %)",
        ),
        ("requests", str(result["requests"])),
        ("mounted after", f"{result['mount_seconds']:.2f} s" if result["mounted"] else "not mounted"),
        ("first output after", f"{result['first_output_seconds']:.2f} s"),
    ]
    for label, value in rows:
        click.echo(f"{label:20}{value}")


def roomy_directory() -> str | None:
    """The place for large temporary files: on a disk where the usual one may be a tmpfs, which a pool cannot use."""
    roomy = "/var/tmp"  # noqa: S108  # mkdtemp makes a private folder there
    return roomy if os.access(roomy, os.W_OK) else None


def _missing_for_mount() -> str:
    if os.geteuid() != 0:
        return "a chroot needs root"
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is not there (modprobe fuse; in a container pass the device)"
    return ""


def _tour(folder: Path, address: str, say: Any) -> dict[str, Any]:
    p2pgz = _Run(folder)
    reference = f"{address}/demo/machine:lazy"
    say("packing files of this machine into an image …")
    _write_layout(folder / "layout")
    say("converting it, and pushing it to a registry on loopback …")
    converted = json.loads(
        p2pgz("convert", "--json", "--plain-http", f"oci:{folder / 'layout'}:plain", reference)
    )
    image_bytes = sum(layer["bytes"] for layer in converted["layers"])
    missing = _missing_for_mount()
    started = time.monotonic()
    try:
        if missing:
            say(f"no mount: {missing}; reading with ls and cat instead")
            listed = p2pgz("ls", "--plain-http", reference, "/bin")
            first = time.monotonic() - started
            say(listed.rstrip())
            return _result(p2pgz, image_bytes, mounted=False, mount_seconds=0.0, first_output_seconds=first)
        say(f"mounting {reference} …")
        return _mounted_tour(p2pgz, folder / "root", reference, image_bytes, started, say)
    finally:
        p2pgz.stop()


def _mounted_tour(
    p2pgz: _Run, root: Path, reference: str, image_bytes: int, started: float, say: Any
) -> dict[str, Any]:
    root.mkdir()
    p2pgz("mount", "--plain-http", "--no-fill", reference, str(root))
    mount_seconds = time.monotonic() - started
    try:
        with subprocess.Popen(
            ["chroot", str(root), "/bin/sh", "-c", COMMAND],
            stdout=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        ) as program:
            assert program.stdout is not None
            first_line = program.stdout.readline()
            first = time.monotonic() - started
            rest = program.stdout.read()
        if program.returncode:
            raise MountUnavailable(f"the program in the image ended with {program.returncode}")
        say("".join(f"  | {line}\n" for line in (first_line + rest).splitlines()).rstrip())
        return _result(
            p2pgz, image_bytes, mounted=True, mount_seconds=mount_seconds, first_output_seconds=first
        )
    finally:
        p2pgz("umount", str(root))


def _result(p2pgz: _Run, image_bytes: int, **times: Any) -> dict[str, Any]:
    registry = p2pgz.status()["sources"]["registry"]
    return {
        "image_bytes": image_bytes,
        "fetched_bytes": registry["wire_bytes"],
        "requests": registry["requests"],
        **times,
    }
