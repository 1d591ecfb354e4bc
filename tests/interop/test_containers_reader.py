"""podman's storage library pulls our zstd:chunked layers in parts, and gives back their streams bit for bit."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.core.toc import TAR_SPLIT_POSITION_ANNOTATION, TOC_DIGEST_ANNOTATION

VECTORS = Path(__file__).parents[1] / "vectors"
READER = Path(__file__).parent / "containers_reader"
SOURCES = sorted(path.name.removesuffix(".tar.tar") for path in (VECTORS / "blobs").glob("*.tar.tar"))
GO_MISSING = "needs a Go toolchain on PATH"
# The other storage drivers need C libraries
TAGS = "exclude_graphdriver_btrfs,exclude_graphdriver_zfs"

pytestmark = [
    pytest.mark.go,
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("go") is None, reason=GO_MISSING),
]


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("go") / "containers_reader"
    command = ["env", "CGO_ENABLED=0", "go", "build", "-tags", TAGS, "-o", program, "."]
    subprocess.run(command, cwd=READER, check=True, timeout=300)
    return program


def pull(
    reader: Path, directory: Path, blob: bytes, annotations: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    (directory / "blob").write_bytes(blob)
    (directory / "annotations.json").write_text(json.dumps(annotations))
    command = [reader, directory / "blob", directory / "annotations.json", directory / "store"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.timeout(320)
@pytest.mark.parametrize("source", SOURCES)
def test_podman_pulls_in_parts_and_gives_the_stream_back(reader: Path, source: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    original = (VECTORS / "blobs" / f"{source}.tar.tar").read_bytes()
    options = LayerOptions(format="zstd:chunked", chunk_bytes=1 << 16, threads=0)
    written = convert_layer(io.BytesIO(original), out, options)
    done = pull(reader, tmp_path, out.getvalue(), written.annotations)
    if TAR_SPLIT_POSITION_ANNOTATION not in written.annotations:
        # "pull it whole" is what it must say then: any other error would end the user's pull
        assert "layers without tar-split data don't support partial pulls" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["staged"], result["diff"]) == (str(written.diff_id), str(written.diff_id))
    assert result["size"] == written.stream_bytes
    assert result["fetched"] < written.size


@pytest.mark.timeout(320)
def test_podman_refuses_the_other_dialects_annotations_beside_its_own(reader: Path, tmp_path: Path) -> None:
    """Why there are two formats."""
    out = io.BytesIO()
    original = (VECTORS / "blobs" / "basic.tar.tar").read_bytes()
    written = convert_layer(io.BytesIO(original), out, LayerOptions(format="zstd:chunked", threads=0))
    notes = written.annotations | {TOC_DIGEST_ANNOTATION: str(written.toc_digest)}
    assert "both zstd:chunked and eStargz TOC found" in pull(reader, tmp_path, out.getvalue(), notes).stderr


@pytest.mark.timeout(320)
def test_podman_notices_a_changed_file(reader: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    original = (VECTORS / "blobs" / "basic.tar.tar").read_bytes()
    written = convert_layer(io.BytesIO(original), out, LayerOptions(format="zstd:chunked", threads=0))
    blob = bytearray(out.getvalue())
    blob[len(blob) // 2] ^= 1
    assert pull(reader, tmp_path, bytes(blob), written.annotations).returncode == 1
