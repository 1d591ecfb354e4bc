"""What the snapshotter asks of the node, and how containerd's labels name a layer.

Labels come from containerd's image pullers (CRI, the transfer service, clients with the same wrapper) or from tools made
for stargz-snapshotter. What is missing or wrong in them makes a layer one that containerd unpacks, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from p2pgz.core.digest import Digest
from p2pgz.core.reference import parse_reference
from p2pgz.errors import P2pgzError

SNAPSHOT_REF: Final = "containerd.io/snapshot.ref"
REMOTE: Final = "containerd.io/snapshot/remote"
# (reference, layer digest, manifest digest), in the order in which they are looked for
NAMES: Final = (
    (
        "containerd.io/snapshot/cri.image-ref",
        "containerd.io/snapshot/cri.layer-digest",
        "containerd.io/snapshot/cri.manifest-digest",
    ),
    (
        "containerd.io/snapshot/remote/stargz.reference",
        "containerd.io/snapshot/remote/stargz.digest",
        "",
    ),
)


class NotLazy(Exception):
    """This layer is for containerd to unpack; the text says why."""


class Wanted(NamedTuple):
    """A layer that containerd is about to unpack."""

    reference: str
    """of the image, with the manifest's digest where containerd says it"""
    layer: str
    """digest of its blob"""
    chain_id: str
    """names its content with everything below it (image spec, "Layer ChainID")"""


class Lazy(msgspec.Struct, frozen=True):
    """The lowest layers of an image, as one tree: what a snapshot of ours is made of."""

    reference: str
    """by digest: what it means never changes"""
    layers: int
    """how many of its layers"""
    total: int
    """how many it has"""


class Images(Protocol):
    """The node. Both raise P2pgzError: NodeUnavailable when there is none."""

    def find(self, wanted: Wanted) -> Lazy:
        """Open the image, everything verified that a mount of it needs, and say which part of it the layer completes."""

    def mount(self, lazy: Lazy, directory: Path) -> None:
        """Mount that part at an empty directory."""

    def unpacked(self, wanted: Wanted | None, key: str, reason: str) -> None:
        """Let `p2pgz status` and `why` say that containerd unpacks a layer; best effort, never raises."""


def wanted_layer(labels: Mapping[str, str]) -> Wanted:
    """The layer that labels name; raises NotLazy that says what they lack."""
    chain_id = labels.get(SNAPSHOT_REF, "")
    for reference_label, layer_label, manifest_label in NAMES:
        if not (reference_text := labels.get(reference_label)):
            continue
        if not (layer := labels.get(layer_label)):
            raise NotLazy(f"label {layer_label} is missing")
        try:
            reference = parse_reference(reference_text)
            if manifest := labels.get(manifest_label):
                reference = reference.with_digest(Digest.parse(manifest))
            return Wanted(str(reference), str(Digest.parse(layer)), str(Digest.parse(chain_id)))
        except P2pgzError as error:
            raise NotLazy(f"its labels cannot be used: {error.what}") from error
    raise NotLazy(
        "containerd named neither image nor layer: snapshot annotations are off, or its client gives none"
    )
