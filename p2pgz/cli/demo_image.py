"""The demo's image: a small root file system of files of this machine, with a lot that is never read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME_ANNOTATION

# Enough that lazy and full differ visibly, little enough to pack in a few seconds
PAYLOAD_BYTES = 48 << 20
PROGRAMS = ("sh", "cat", "ls", "uname")


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


def write_layout(folder: Path) -> None:
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
