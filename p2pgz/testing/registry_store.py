"""What a `FakeRegistry` holds: blobs, manifests and tags by repository, uploads in progress, tokens. No IO."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor


@dataclass
class RegistryStore:
    """Content by digest, shared by all repositories; what a repository has is in its sets."""

    content: dict[Digest, bytes] = field(default_factory=dict)
    media_types: dict[Digest, str] = field(default_factory=dict)
    """of manifests"""
    blobs: dict[str, set[Digest]] = field(default_factory=dict)
    manifests: dict[str, set[Digest]] = field(default_factory=dict)
    tags: dict[tuple[str, str], Digest] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)

    def add_blob(
        self, repository: str, data: bytes, media_type: str = "application/octet-stream"
    ) -> Descriptor:
        """Put a blob into a repository."""
        digest = Digest.of(data)
        self.content[digest] = data
        self.blobs.setdefault(repository, set()).add(digest)
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    def add_manifest(
        self, repository: str, data: bytes, media_type: str = OCI_MANIFEST, *, tag: str = ""
    ) -> Descriptor:
        """Put a manifest or index into a repository, under a tag if there is one."""
        digest = Digest.of(data)
        self.content[digest] = data
        self.media_types[digest] = media_type
        self.manifests.setdefault(repository, set()).add(digest)
        if tag:
            self.tags[repository, tag] = digest
        return Descriptor(media_type=media_type, digest=digest, size=len(data))

    def add_image(self, repository: str, layers: list[bytes], *, tag: str = "latest") -> Descriptor:
        """Put an image of these layer blobs (taken for tar.gz) into a repository; its manifest's descriptor."""
        descriptors = [self.add_blob(repository, layer, OCI_LAYER_GZIP) for layer in layers]
        diff_ids = [str(Digest.of(b"diff of " + layer)) for layer in layers]
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described(self.add_blob(repository, json.dumps(config).encode(), OCI_CONFIG)),
            "layers": [described(descriptor) for descriptor in descriptors],
        }
        return self.add_manifest(repository, json.dumps(manifest).encode(), tag=tag)

    def blob(self, repository: str, digest: Digest) -> bytes | None:
        """The bytes of a blob that the repository has."""
        return self.content[digest] if digest in self.blobs.get(repository, ()) else None

    def find_manifest(self, repository: str, name: str) -> Digest | None:
        """The manifest that a tag or digest names in a repository."""
        digest = self.tags.get((repository, name))
        if digest is None and name.startswith("sha256:") and len(name) == 71:
            digest = Digest.parse(name)
        return digest if digest in self.manifests.get(repository, ()) else None

    def missing_blobs(self, repository: str, manifest: bytes) -> list[str]:
        """Digests that a manifest names and the repository lacks."""
        document = json.loads(manifest)
        named = [*document.get("layers", []), *([document["config"]] if "config" in document else [])]
        here = self.blobs.get(repository, set())
        return [blob["digest"] for blob in named if Digest.parse(blob["digest"]) not in here]


def described(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as documents hold it."""
    return {"mediaType": descriptor.media_type, "digest": str(descriptor.digest), "size": descriptor.size}
