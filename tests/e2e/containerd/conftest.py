"""One containerd for each module: starting it with node and snapshotter takes as long as most tests.

What runs in it outlives a test on purpose, so it is `engine` that checks, at its end, that nothing is left.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.media import OCI_MANIFEST, TOC_DIGEST_ANNOTATION
from p2pgz.testing.docker_registry import RunningRegistry, running_registry
from tests.conftest import missing_tool, mounts_below
from tests.e2e import lab_images
from tests.e2e.containerd.engine import Engine, find_binaries


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> None:
    """Not after each test here."""


@pytest.fixture(scope="session")
def small_registry(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry with the image `small`: plain (`gz`), and converted (`es`: eStargz, `zc`: zstd:chunked)."""
    layout = lab_images.image_layout(cache_dir, lab_images.SMALL)
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        name = f"{registry.address}/lab/small"
        lab_images.push(layout, lab_images.SMALL, f"{name}:gz")
        for tag, form in (("es", "estargz"), ("zc", "zstd:chunked")):
            command = ["convert", "-q", "--format", form, f"oci:{layout}:{lab_images.SMALL}", f"{name}:{tag}"]
            lab_images.run(sys.executable, "-m", "p2pgz", *command)
        for tag, size in (
            ("nameless", "131072"),
            ("right", "65536"),
            ("verified", "98304"),
        ):  # other chunks: the same files in other layers
            command = [
                "convert",
                "-q",
                "--chunk-size",
                size,
                f"oci:{layout}:{lab_images.SMALL}",
                f"{name}:{tag}",
            ]
            lab_images.run(sys.executable, "-m", "p2pgz", *command)
        push_liar(registry, "lab/small", "right", "liar")
        push_claimant(registry, "lab/small", "verified", "claimant")
        yield registry


def push_liar(registry: RunningRegistry, repository: str, source: str, target: str) -> None:
    """The image again, but its second layer's TOC is said to have another digest; its layers are as they should be."""
    connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=10)
    connection.request("GET", f"/v2/{repository}/manifests/{source}", headers={"Accept": OCI_MANIFEST})
    manifest = json.loads(connection.getresponse().read())
    manifest["layers"][1]["annotations"][TOC_DIGEST_ANNOTATION] = str(Digest.of(b"another TOC"))
    headers = {"Content-Type": OCI_MANIFEST}
    connection.request("PUT", f"/v2/{repository}/manifests/{target}", json.dumps(manifest), headers)
    assert connection.getresponse().status == 201
    connection.close()


def push_claimant(registry: RunningRegistry, repository: str, source: str, target: str) -> None:
    """The image again, but its config claims that the last layer has another's diff id."""
    connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=10)

    def ask(method: str, path: str, body: bytes = b"", **headers: str) -> tuple[bytes, str]:
        connection.request(
            method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status in (200, 201, 202), (method, path, answer.status, said)
        return said, answer.headers.get("Location", "")

    manifest = json.loads(ask("GET", f"/v2/{repository}/manifests/{source}", Accept=OCI_MANIFEST)[0])
    config = json.loads(ask("GET", f"/v2/{repository}/blobs/{manifest['config']['digest']}")[0])
    config["rootfs"]["diff_ids"][-1] = str(Digest.of(b"the layer of somebody else"))
    document = json.dumps(config).encode()
    manifest["config"].update(digest=str(Digest.of(document)), size=len(document))
    _, place = ask("POST", f"/v2/{repository}/blobs/uploads/")
    place = place.partition(registry.address)[2] or place
    mark = "&" if "?" in place else "?"
    ask(
        "PUT", f"{place}{mark}digest={Digest.of(document)}", document, Content_Type="application/octet-stream"
    )
    ask(
        "PUT",
        f"/v2/{repository}/manifests/{target}",
        json.dumps(manifest).encode(),
        Content_Type=OCI_MANIFEST,
    )
    connection.close()


@pytest.fixture(scope="module")
def engine(cache_dir: Path, adopts_orphans: None) -> Iterator[Engine]:
    """On a real disk, since neither overlays nor the pool want tmpfs."""
    binaries = find_binaries(cache_dir)
    if binaries is None or missing_tool("runc"):
        pytest.skip("containerd, its shim, ctr or runc are not here: `make containerd` brings them")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="p2pgz-c-") as name:
        folder = Path(name)
        engine = Engine(binaries, folder)
        try:
            engine.start()
            yield engine
        finally:
            engine.close()
        assert mounts_below(folder) == set()
        left = subprocess.run(
            ["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False
        ).stdout
        assert left.split() == []
