"""Converted images in real registries, pulled by skopeo and unpacked by umoci: the root file system is the source's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from p2pgz.core.media import OCI_LAYER_TAR
from p2pgz.testing.docker_registry import RunningRegistry
from tests.e2e.cli.layouts import Layout
from tests.e2e.trees import differences, read_tree

VECTORS = Path(__file__).parents[2] / "vectors"
IMAGE = f"oci:{VECTORS / 'image'}:gz"
# What the format adds to every layer, where no file of the image has these names
ADDED = {b".no.prefetch.landmark", b"stargz.index.json"}

pytestmark = [pytest.mark.root, pytest.mark.tools("umoci", "skopeo")]


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("docker-registry", marks=pytest.mark.registry),
        pytest.param(
            "registry",  # distribution v3, where somebody has installed it
            marks=pytest.mark.skipif(shutil.which("registry") is None, reason="distribution v3 is not on PATH"),
        ),
    ],
)  # fmt: skip
def registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningRegistry]:
    running = RunningRegistry(tmp_path_factory.mktemp("registry"), binary=request.param)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def source_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("source") / "bundle"
    run("umoci", "unpack", "--image", f"{VECTORS / 'image'}:gz", bundle)
    return bundle / "rootfs"


def plain_layers(pulled: Path, folder: Path) -> Path:
    """The image with its zstd layers as tar, since umoci knows no zstd: each must have the diff id of the config."""

    def blob(digest: str) -> bytes:
        return (pulled / "blobs" / digest.replace(":", "/")).read_bytes()

    document = json.loads((pulled / "index.json").read_text())["manifests"][0]
    manifest = json.loads(blob(document["digest"]))
    config = json.loads(blob(manifest["config"]["digest"]))
    layout = Layout(folder)
    layers = []
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        reader = zstandard.ZstdDecompressor().stream_reader(blob(layer["digest"]), read_across_frames=True)
        stream = reader.read()
        assert f"sha256:{hashlib.sha256(stream).hexdigest()}" == diff_id
        layers.append(layout.store(stream, OCI_LAYER_TAR))
    layout.tag(
        "a",
        layout.manifest(layers, layout.store(json.dumps(config).encode(), manifest["config"]["mediaType"])),
    )
    return folder


@pytest.mark.parametrize("layer_format", ["estargz", "zstd:chunked", "zstd:chunked-stargz"])
def test_pushed_image_unpacks_to_the_source(
    registry: RunningRegistry, source_root: Path, layer_format: str, tmp_path: Path
) -> None:
    reference = f"{registry.address}/converted/{layer_format.replace(':', '-')}:a"
    run(sys.executable, "-m", "p2pgz", "convert", "--plain-http", "--format", layer_format, IMAGE, reference)
    pulled = tmp_path / "pulled"
    run(
        "skopeo",
        "copy",
        "-q",
        "--insecure-policy",
        "--src-tls-verify=false",
        f"docker://{reference}",
        f"oci:{pulled}:a",
    )
    layout = pulled if layer_format == "estargz" else plain_layers(pulled, tmp_path / "plain")
    run("umoci", "unpack", "--image", f"{layout}:a", tmp_path / "bundle")
    root = tmp_path / "bundle" / "rootfs"
    for name in ADDED:
        (root / name.decode()).unlink(missing_ok=True)
    # directories that no layer names have the time of unpacking, and the root that of the last file that was put there
    now = {
        path
        for path, entry in read_tree(source_root).items()
        if entry["mtime"] >= source_root.parent.lstat().st_ctime_ns - 10**10
    }
    assert len(now) < 10
    ignored = now | {b""}
    assert (
        differences(source_root, root, ignore=lambda path, field: field == "mtime" and path in ignored) == []
    )
