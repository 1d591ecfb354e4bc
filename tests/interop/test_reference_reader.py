"""The reference library opens our blobs, verifies the TOC and every chunk of every file."""

import hashlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.core.model import Entry
from p2pgz.core.tail import Opened, open_layer_tail
from p2pgz.testing.trees import layer_tree

VECTORS = Path(__file__).parents[1] / "vectors"
READER = Path(__file__).parent / "estargz_reader"
SOURCES = sorted(path.name.removesuffix(".tar.tar") for path in (VECTORS / "blobs").glob("*.tar.tar"))
GO_MISSING = "needs a Go toolchain on PATH"

pytestmark = [pytest.mark.go, pytest.mark.skipif(shutil.which("go") is None, reason=GO_MISSING)]


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("go") / "estargz_reader"
    subprocess.run(["go", "build", "-o", program, "."], cwd=READER, check=True, timeout=300)
    return program


@pytest.mark.timeout(320)
@pytest.mark.parametrize("layer_format", ["estargz", "zstd:chunked-stargz"])
@pytest.mark.parametrize("source", SOURCES)
def test_reference_reader_sees_the_same_files(
    reader: Path, source: str, layer_format: str, tmp_path: Path
) -> None:
    out = io.BytesIO()
    original = (VECTORS / "blobs" / f"{source}.tar.tar").read_bytes()
    written = convert_layer(
        io.BytesIO(original), out, LayerOptions(format=layer_format, chunk_bytes=1 << 16, threads=0)
    )
    (tmp_path / "blob").write_bytes(out.getvalue())
    done = subprocess.run(
        [reader, "verify", tmp_path / "blob", str(written.toc_digest)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {row["Name"].encode(): row for row in rows if "landmark" not in row["Name"] or "/" in row["Name"]}
    found.pop(b"stargz.index.json", None)
    opened = open_layer_tail(out.getvalue(), written.size, written.annotations)
    assert isinstance(opened, Opened)
    tree = layer_tree(opened.toc, links_see="toc")
    assert found.keys() == tree.keys()
    for name, node in tree.items():
        entry = node.entry or Entry(name, "dir", 0o755)
        row = found[name]
        assert (row["Type"], row["Size"] if entry.kind == "reg" else 0) == (entry.kind, entry.size)
        assert row["Chunks"] == len(entry.chunks)
        if name:
            assert row["Mode"] == entry.mode
        if entry.kind == "reg" and entry.size:
            assert row["Digest"] == f"sha256:{entry.digest.hex()}"


@pytest.mark.timeout(320)
def test_reference_reader_refuses_a_changed_chunk(reader: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    original = (VECTORS / "blobs" / "badbase.gz.tar.gz").read_bytes()
    written = convert_layer(io.BytesIO(original), out, LayerOptions(threads=0))
    blob = bytearray(out.getvalue())
    opened = open_layer_tail(bytes(blob), len(blob), written.annotations)
    assert isinstance(opened, Opened)
    chunk = max(
        (chunk for entry in opened.toc.entries for chunk in entry.chunks),
        key=lambda chunk: chunk.end - chunk.offset,
    )
    blob[(chunk.offset + chunk.end) // 2] ^= 1
    (tmp_path / "blob").write_bytes(blob)
    command = [reader, "verify", tmp_path / "blob", str(written.toc_digest)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    command[-1] = f"sha256:{hashlib.sha256().hexdigest()}"
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
