"""OCI layouts with plain layers of given files, for benchmarks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path

from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME_ANNOTATION

COMPRESSIBLE_SHARE = 0.6


def block(seed: int, size: int) -> bytes:
    """Bytes that compress to about a half, as programs and libraries do."""
    rng = random.Random(seed)
    parts = [
        rng.randbytes(512) if rng.random() > COMPRESSIBLE_SHARE else bytes([rng.randrange(256)]) * 512
        for _ in range(size // 512 + 1)
    ]
    return b"".join(parts)[:size]


class Layers:
    """One layout; `add` gives it an image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._manifests: list[dict[str, object]] = []
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def add(self, tag: str, layers: list[dict[str, bytes]]) -> None:
        """An image of these layers, each a dict of names and contents."""
        described = [self._store(_tar(files), OCI_LAYER_TAR) for files in layers]
        architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        config = {
            "os": "linux",
            "architecture": architecture,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in described]},
            "config": {},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._store(json.dumps(config).encode(), OCI_CONFIG),
            "layers": described,
        }
        stored = self._store(json.dumps(manifest).encode(), OCI_MANIFEST)
        self._manifests.append({**stored, "annotations": {REF_NAME_ANNOTATION: tag}})
        index = {"schemaVersion": 2, "manifests": self._manifests}
        (self._folder / "index.json").write_text(json.dumps(index))

    def _store(self, data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (self._blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
