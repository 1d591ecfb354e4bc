"""OCI image layouts written by hand: right manifest, config, annotations and diff id around any layer."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from p2pgz.core.media import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_LAYER_TAR,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    REF_NAME_ANNOTATION,
)

UNPACKED_MAX_BYTES = 64 << 20  # bombs are not unpacked to learn their diff id
LAYER_DIGEST_ANNOTATION = "containerd.io/snapshot/stargz/layer.digest"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def diff_id(blob: bytes) -> str:
    """The digest of a layer's tar stream; of nothing in particular when it has none that is sound and small."""
    try:
        if blob[:2] == b"\x1f\x8b":
            stream: Any = gzip.GzipFile(fileobj=io.BytesIO(blob))
        elif blob[:4] == b"\x28\xb5\x2f\xfd" or blob[1:4] == b"\x2a\x4d\x18":
            stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True)
        else:
            stream = io.BytesIO(blob)
        data = stream.read(UNPACKED_MAX_BYTES)
        return digest_of(data if len(data) < UNPACKED_MAX_BYTES else b"")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, MemoryError):
        return digest_of(b"")


def layer_type(blob: bytes) -> str:
    """The media type that suits the layer's first bytes."""
    if blob[:2] == b"\x1f\x8b":
        return OCI_LAYER_GZIP
    return (
        OCI_LAYER_ZSTD if blob[:4] == b"\x28\xb5\x2f\xfd" or blob[1:4] == b"\x2a\x4d\x18" else OCI_LAYER_TAR
    )


class Layout:
    """An OCI layout in a new folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._entries: list[dict[str, Any]] = []
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def reference(self, tag: str) -> str:
        return f"oci:{self.folder}:{tag}"

    def store(self, data: bytes, media_type: str, *, digest: str = "", **more: Any) -> dict[str, Any]:
        """Put a blob in, under another digest than its own if so wanted; its descriptor."""
        digest = digest or digest_of(data)
        (self._blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def config(self, diff_ids: Sequence[str], **more: Any) -> dict[str, Any]:
        document = {
            "os": "linux",
            "architecture": ARCHITECTURE,
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
            **more,
        }
        return self.store(json.dumps(document).encode(), OCI_CONFIG)

    def tag(self, name: str, descriptor: dict[str, Any]) -> None:
        """Write index.json with one more tag."""
        self._entries.append({**descriptor, "annotations": {REF_NAME_ANNOTATION: name}})
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self._entries}
        (self.folder / "index.json").write_text(json.dumps(index))

    def manifest(self, layers: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
        return self.store(json.dumps(document).encode(), OCI_MANIFEST)

    def add(
        self,
        tag: str,
        *layers: bytes,
        annotations: Mapping[str, str] | None = None,
        external_toc: bytes | None = None,
    ) -> str:
        """An image of these layers (annotations: the one layer's); its reference."""
        described = [
            self.store(blob, layer_type(blob), **({"annotations": dict(annotations)} if annotations else {}))
            for blob in layers
        ]
        self.tag(tag, self.manifest(described, self.config([diff_id(blob) for blob in layers])))
        if external_toc is not None:
            toc_annotations = {LAYER_DIGEST_ANNOTATION: described[0]["digest"]}
            toc = self.store(external_toc, OCI_LAYER_GZIP, annotations=toc_annotations)
            self.tag(f"{tag}-esgztoc", self.manifest([toc], self.config([diff_id(external_toc)])))
        return self.reference(tag)


def tar_layer(files: Mapping[str, bytes]) -> bytes:
    """A plain tar of regular files, always the same bytes for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1_700_000_000
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()
