"""A node that opens what it is told to, and whose mounts are a file in a directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from p2pgz.core.digest import Digest
from p2pgz.errors import P2pgzError
from p2pgz.snapshotter.images import SNAPSHOT_REF, Lazy, Wanted

REF = "registry.example/team/app:1"
MANIFEST, LAYER = Digest.of(b"manifest"), Digest.of(b"layer")


def chain(number: int) -> str:
    return str(Digest.of(f"chain {number}".encode()))


def labels(number: int, **more: str) -> dict[str, str]:
    """As CRI names the layer with the chain id `number`."""
    return {
        SNAPSHOT_REF: chain(number),
        "containerd.io/snapshot/cri.image-ref": REF,
        "containerd.io/snapshot/cri.layer-digest": str(LAYER),
        "containerd.io/snapshot/cri.manifest-digest": str(MANIFEST),
        **more,
    }


class FakeImages:
    """An image of `total` layers; the chain id of its lowest N is `chain(N)`."""

    def __init__(self, total: int = 2) -> None:
        self.total = total
        self.finds: list[Wanted] = []
        self.mounted: list[tuple[Lazy, Path]] = []
        self.reasons: list[str] = []
        self.find_fails: P2pgzError | None = None
        self.mount_fails: P2pgzError | None = None
        self.before_find: Callable[[], None] = lambda: None

    def find(self, wanted: Wanted) -> Lazy:
        self.finds.append(wanted)
        self.before_find()
        if self.find_fails is not None:
            raise self.find_fails
        number = next(n for n in range(1, self.total + 1) if chain(n) == wanted.chain_id)
        return Lazy(reference=wanted.reference, layers=number, total=self.total)

    def mount(self, lazy: Lazy, directory: Path) -> None:
        if self.mount_fails is not None:
            raise self.mount_fails
        self.mounted.append((lazy, directory))

    def unpacked(self, wanted: Wanted | None, key: str, reason: str) -> None:
        self.reasons.append(reason)
