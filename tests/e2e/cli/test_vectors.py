"""Every layer and image of the vectors, mounted by the command and compared by their own `check.py`: no differences."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from p2pgz.core.media import TOC_DIGEST_ANNOTATION
from tests.e2e.cli.conftest import VECTORS
from tests.e2e.cli.layouts import Layout
from tests.e2e.cli.running import P2pgz, mounted, until

pytestmark = [pytest.mark.root]

LAYERS = [
    vector
    for vector in json.loads((VECTORS / "index.json").read_text())["vectors"]
    if vector["file"].startswith("blobs/")
]
IMAGES = ("gz", "esgz", "zstd", "mixed")
EDGES = json.loads((VECTORS / "expected" / "image-edge.json").read_text())
LEGACY = "sgz"  # the writer without digests in the manifest


def load_check() -> ModuleType:
    """`check.py` of the vectors: a script that belongs to no package."""
    spec = importlib.util.spec_from_file_location("vectors_check", VECTORS / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))  # as its main() does: trees of 300 levels
    return module


CHECK = load_check()


def differences(expected: dict[str, Any], root: Path) -> list[Any]:
    """What `check.py EXPECTED ROOT` prints."""
    use = expected.get("use", "entries")
    lists = ("entries", "entries_toc") if use == "either" else (use,)
    return min((CHECK.check(expected[key], root) for key in lists), key=len)


def annotations_of(vector: dict[str, Any], expected: dict[str, Any]) -> dict[str, str]:
    """What the manifest says about the layer; a writer that leaves that to its caller gives the TOC's digest."""
    if vector["writer"] == LEGACY:
        return {}
    toc = {TOC_DIGEST_ANNOTATION: expected["toc_digest"]} if "toc_digest" in expected else {}
    return expected.get("annotations") or toc


@pytest.fixture(scope="module")
def layout(disk: Path) -> Layout:
    """All layers, each as an image of one layer, tagged by its name."""
    layout = Layout(disk / "layers")
    for vector in LAYERS:
        expected = json.loads((VECTORS / vector["expected"]).read_text())
        external = VECTORS / "blobs" / f"{vector['name']}.toc.tar.gz"
        layout.add(
            vector["name"],
            (VECTORS / vector["file"]).read_bytes(),
            annotations=annotations_of(vector, expected),
            external_toc=external.read_bytes() if external.exists() else None,
        )
    return layout


@pytest.mark.parametrize("vector", LAYERS, ids=lambda vector: vector["name"])
def test_layer(shared: P2pgz, layout: Layout, home: Path, vector: dict[str, Any]) -> None:
    expected = json.loads((VECTORS / vector["expected"]).read_text())
    options = ["--allow-unverified-toc"] if vector["writer"] == LEGACY else []
    reference = layout.reference(vector["name"])
    with mounted(shared, reference, home / "root", "--suid", "--dev", *options):
        assert differences(expected, home / "root") == []


@pytest.mark.parametrize("tag", IMAGES)
def test_image(shared: P2pgz, home: Path, tag: str) -> None:
    expected = json.loads((VECTORS / "expected" / f"image-{tag}.json").read_text())
    with mounted(shared, f"oci:{VECTORS / 'image'}:{tag}", home / "root", "--suid", "--dev"):
        assert differences(expected, home / "root") == []


def through_the_link(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What umoci, containerd and podman make of `through-symlink`: the link stays, the file is where it leads."""
    by_path = {entry["path"]: dict(entry) for entry in entries}
    link, target = "nectar.ambe60", "zephyr_umbe46"
    file = by_path.pop(f"{link}/g")
    by_path[f"{target}/g"] = file | {"path": f"{target}/g"}
    by_path[link] |= {
        "type": "symlink",
        "linkname": target,
        "nlink": 1,
        "mtime": 1_500_000_000,
        "mtime_nsec": 0,
    }
    return list(by_path.values())


@pytest.mark.parametrize("tag", EDGES)
def test_layers_on_which_tools_disagree(shared: P2pgz, home: Path, tag: str) -> None:
    entries = EDGES[tag]["by_spec_rules"]
    if tag == "through-symlink":
        entries = through_the_link(entries)
    with mounted(shared, f"oci:{VECTORS / 'image-edge'}:{tag}", home / "root", "--suid", "--dev"):
        assert CHECK.check(entries, home / "root") == []


def test_legacy_layer_is_refused_without_the_opt_in(shared: P2pgz, layout: Layout, home: Path) -> None:
    (home / "root").mkdir()
    said = shared.fails(12, "mount", layout.reference("badbase.sgz"), home / "root")
    assert "--allow-unverified-toc" in said
    assert shared.mounts() == []


def test_all_mounts_are_gone_again(shared: P2pgz) -> None:
    until(lambda: shared.mounts() == [], "the end of all mounts")
