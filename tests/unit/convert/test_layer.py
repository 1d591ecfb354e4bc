"""Layers written anew: the same tree from the TOC, from Debian's tar and from the standard library, for every vector."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from p2pgz.convert.file import convert_file
from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.convert.writer import WrittenLayer
from p2pgz.core.decompress import Decompressor
from p2pgz.core.members import MemberInflater
from p2pgz.core.model import Entry, Toc
from p2pgz.core.ownindex import PlainIndexer
from p2pgz.core.tail import Opened, open_layer_tail
from p2pgz.errors import ConfigError, ImageInvalid
from p2pgz.testing.trees import describe, differences, layer_tree
from p2pgz.testing.vectors import expected_document, expected_tree

VECTORS = Path(__file__).parents[2] / "vectors"
SOURCES = sorted(path.name.removesuffix(".tar.tar") for path in (VECTORS / "blobs").glob("*.tar.tar"))
FORMATS = ("estargz", "zstd:chunked", "zstd:chunked-stargz")
# Names that are not UTF-8 cannot be in a TOC, times are rounded in it, reserved names are left out: there the vectors say
# what the reference writer's TOC has
AS_THE_REFERENCE = {"latin1": "entries_toc", "meta": "entries", "reserved": "entries"}


def converted(blob: bytes, **options: object) -> tuple[bytes, WrittenLayer]:
    rewritten = bool(options.pop("rewritten", False))
    out = io.BytesIO()
    settings = {"chunk_bytes": 1 << 16, "threads": 0, **options}
    written = convert_layer(io.BytesIO(blob), out, LayerOptions(**settings), rewritten=rewritten)
    assert written.digest.raw == hashlib.sha256(out.getvalue()).digest()
    assert written.size == len(out.getvalue())
    return out.getvalue(), written


def opened(blob: bytes, written: WrittenLayer) -> Opened:
    layer = open_layer_tail(blob, len(blob), written.annotations)
    assert isinstance(layer, Opened)
    return layer


def content(blob: bytes, layer: Opened, entry: Entry) -> bytes:
    """A file's content as a lazy reader gets it, every chunk checked."""
    parts = []
    for chunk in entry.chunks:
        (piece,) = chunk.pieces()
        ((_, data),) = MemberInflater(layer.compression, [(piece.inner, piece.size)]).feed(
            blob[piece.offset : piece.end]
        )
        assert hashlib.sha256(data).digest() == chunk.digest
        parts.append(bytes(data))
    whole = b"".join(parts)
    assert not entry.size or hashlib.sha256(whole).digest() == entry.digest
    return whole


def lazy_tree(blob: bytes, layer: Opened) -> dict[bytes, dict[str, object]]:
    return describe(
        layer_tree(layer.toc, links_see="toc"),
        lambda entry: hashlib.sha256(content(blob, layer, entry)).hexdigest(),
    )


def stream_of(blob: bytes) -> bytes:
    stream = Decompressor()
    return b"".join(stream.feed(blob)) + b"".join(stream.finish())


def expected_lazy_tree(source: str, layer_format: str) -> dict[bytes, dict[str, object]]:
    if layer_format == "zstd:chunked":
        # Times are exact there and no name is reserved: only what is not UTF-8 differs
        name = f"{source}.zctr" if source == "latin1" else f"{source}.tar"
        document = expected_document(VECTORS / "expected" / f"{name}.json")
        return expected_tree(document["entries_toc" if source == "latin1" else "entries"])
    if source in AS_THE_REFERENCE:
        document = expected_document(VECTORS / "expected" / f"{source}.esgz64k.json")
        return expected_tree(document[AS_THE_REFERENCE[source]])
    return expected_tree(expected_document(VECTORS / "expected" / f"{source}.tar.json")["entries"])


def archive_of(*members: tuple[str, bytes | None, dict[str, object]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, fields in members:
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
            for key, value in fields.items():
                setattr(member, key, value)
            member.size = len(data or b"")
            tar.addfile(member, io.BytesIO(data or b""))
    return out.getvalue()


def names(toc: Toc) -> list[bytes]:
    return [entry.name for entry in toc.entries]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layer_format", FORMATS)
def test_converted_layer_shows_the_same_tree(source: str, layer_format: str) -> None:
    blob, written = converted((VECTORS / "blobs" / f"{source}.tar.tar").read_bytes(), format=layer_format)
    layer = opened(blob, written)
    assert list(differences(expected_lazy_tree(source, layer_format), lazy_tree(blob, layer))) == []
    stream = stream_of(blob)
    assert (written.diff_id.raw, written.stream_bytes) == (hashlib.sha256(stream).digest(), len(stream))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("layer_format", FORMATS)
def test_stream_inside_unpacks_to_the_same_tree(source: str, layer_format: str) -> None:
    blob, _written = converted((VECTORS / "blobs" / f"{source}.tar.tar").read_bytes(), format=layer_format)
    indexer = PlainIndexer()
    payloads = dict(indexer.feed(stream_of(blob)))
    toc = indexer.finish().toc

    def content_digest(entry: Entry) -> str:
        return hashlib.sha256(b"".join(payloads[chunk.digest] for chunk in entry.chunks)).hexdigest()

    found = describe(layer_tree(toc), content_digest)
    added = set() if layer_format == "zstd:chunked" else {b".no.prefetch.landmark"}
    added |= {b"stargz.index.json"} if layer_format == "estargz" else set()
    assert added <= found.keys()
    wanted = expected_tree(expected_document(VECTORS / "expected" / f"{source}.tar.json")["entries"])
    for name in (b".no.prefetch.landmark", b"stargz.index.json", b".prefetch.landmark"):
        found.pop(name, None)
        wanted.pop(name, None)
    wanted[b""]["nlink"] = found[b""]["nlink"]
    assert list(differences(wanted, found)) == []


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in ("meta", "order")])
def test_standard_library_reads_what_was_written(source: str) -> None:
    original = (VECTORS / "blobs" / f"{source}.tar.tar").read_bytes()
    blob, _ = converted(original)
    reserved = {".no.prefetch.landmark", ".prefetch.landmark", "stargz.index.json"}
    with tarfile.open(fileobj=io.BytesIO(blob)) as mine, tarfile.open(fileobj=io.BytesIO(original)) as theirs:
        kept = [member for member in mine.getmembers() if member.name not in reserved]
        wanted = [member for member in theirs.getmembers() if member.name not in reserved]
        assert [(m.name, m.mode, m.uid, m.gid, m.size, m.mtime, m.linkname) for m in kept] == [
            (m.name, m.mode, m.uid, m.gid, m.size, m.mtime, m.linkname) for m in wanted
        ]
        for found, original_member in zip(kept, wanted, strict=True):
            if found.isreg():
                ours, other = mine.extractfile(found), theirs.extractfile(original_member)
                assert ours is not None
                assert other is not None
                assert ours.read() == other.read()


def unpack(layer: Path, root: Path) -> str:
    """Unpack with Debian's tar; gives what it complained about."""
    root.mkdir(mode=0o755)
    command = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--numeric-owner",
        "--warning=no-timestamp",
        "-xpf",
        layer,
        "-C",
        root,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.root
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "reserved"])
def test_debian_tar_unpacks_what_was_written(source: str, tmp_path: Path) -> None:
    original = VECTORS / "blobs" / f"{source}.tar.tar"
    (tmp_path / "layer.tar.gz").write_bytes(converted(original.read_bytes())[0])
    complaints = unpack(original, tmp_path / "original")
    assert unpack(tmp_path / "layer.tar.gz", tmp_path / "converted") == complaints
    for name in (".no.prefetch.landmark", "stargz.index.json"):
        (tmp_path / "converted" / name).unlink()
    # tar gives some directories the time of unpacking, whoever wrote the archive
    document = VECTORS / "expected" / f"{source}.tar.json"
    results = [
        subprocess.run(
            [sys.executable, VECTORS / "check.py", document, tmp_path / root, "--ignore", "mtime"],
            capture_output=True, text=True, check=False,
        ).stdout
        for root in ("original", "converted")
    ]  # fmt: skip
    assert results[0] == results[1]
    assert "same" in results[1] or source == "order"  # it has a name with "..", which tar refuses
    times = [
        {
            path.relative_to(tmp_path / root): path.lstat().st_mtime_ns
            for path in (tmp_path / root).rglob("*")
            if not path.is_dir()
        }
        for root in ("original", "converted")
    ]
    assert times[0] == times[1]


@pytest.mark.parametrize("layer_format", FORMATS)
def test_threads_and_piece_sizes_do_not_change_the_result(layer_format: str) -> None:
    original = (VECTORS / "blobs" / "basic.gz.tar.gz").read_bytes()
    once, _ = converted(original, format=layer_format, threads=0)
    assert converted(original, format=layer_format, threads=1)[0] == once
    assert converted(original, format=layer_format, threads=2)[0] == once


def test_converting_a_converted_layer_changes_nothing_but_the_format() -> None:
    first, written = converted((VECTORS / "blobs" / "basic.tar.tar").read_bytes())
    again, rewritten = converted(first, rewritten=True)
    assert again == first
    assert rewritten.warnings == ()
    for layer_format, lazy in (("zstd:chunked", False), ("zstd:chunked-stargz", True)):
        zstd, made = converted(first, format=layer_format, rewritten=True)
        assert made.warnings == ()
        # podman's dialect has no landmarks that could come back
        back, _ = converted(zstd, rewritten=lazy)
        assert back == first
    assert written.warnings == ()


def test_reference_writers_layer_is_taken_anew() -> None:
    document = expected_document(VECTORS / "expected" / "basic.esgz64k.json")
    blob, written = converted((VECTORS / document["blob"]).read_bytes(), rewritten=True)
    layer = opened(blob, written)
    assert list(differences(expected_tree(document["entries"]), lazy_tree(blob, layer))) == []
    assert written.warnings == ()


def test_optimized_layer_stays_optimized() -> None:
    document = expected_document(VECTORS / "expected" / "basic.esgzprio.json")
    original = (VECTORS / document["blob"]).read_bytes()
    before = open_layer_tail(original, len(original), document["annotations"])
    assert isinstance(before, Opened)
    blob, written = converted(original, rewritten=True)
    after = opened(blob, written)

    def prefetched(layer: Opened) -> set[bytes]:
        return {
            entry.name
            for entry in layer.toc.entries
            for c in entry.chunks
            if c.offset < layer.toc.prefetch_end
        }

    assert prefetched(after) == prefetched(before) != set()


def test_boundaries_and_keys_are_those_of_the_reference_writer() -> None:
    original = (VECTORS / "blobs" / "basic.tar.tar").read_bytes()
    blob, written = converted(original)
    reference = expected_document(VECTORS / "expected" / "basic.esgz64k.json")
    layer = opened(blob, written)
    landmark = json.loads(layer.toc_json)["entries"][0]
    assert landmark == {
        "name": ".no.prefetch.landmark", "type": "reg", "size": 1, "offset": landmark["offset"],
        "digest": landmark["digest"], "chunkDigest": landmark["digest"],
    }  # fmt: skip
    found = [
        (entry.name, chunk.file_offset, chunk.size, chunk.digest.hex(), chunk.inner)
        for entry in layer.toc.entries
        for chunk in entry.chunks
    ]
    wanted = [
        (c["path"].encode(), c["chunkOffset"], c["chunkSize"], c["chunkDigest"][7:], c["innerOffset"])
        for c in reference["chunks"]
        if "landmark" not in c["path"]
    ]
    assert found == wanted


def test_prioritized_files_come_first_with_what_they_need() -> None:
    original = archive_of(
        ("a/", None, {}),
        ("a/late", b"1" * 5000, {}),
        ("b/", None, {"mode": 0o700}),
        ("b/target", b"2" * 70_000, {}),
        ("b/twice", b"3", {}),
        ("c", b"4", {}),
        ("b/twice", b"5", {}),
        ("link", b"", {"type": tarfile.LNKTYPE, "linkname": "b/target"}),
    )
    order = (b"/link", b"c", b"nowhere", b"b/twice")
    blob, written = converted(original, prioritized=order)
    layer = opened(blob, written)
    assert names(layer.toc) == [b"b", b"b/target", b"link", b"c", b"a", b"a/late", b"b/twice"]
    first = {
        entry.name for entry in layer.toc.entries for c in entry.chunks if c.offset < layer.toc.prefetch_end
    }
    assert first == {b"b/target", b"c"}
    assert [text.split(" was")[0] for text in written.warnings] == ["prioritized 'b/twice'"]
    assert written.absent == (b"nowhere",)
    plain, plain_written = converted(original)
    assert lazy_tree(blob, layer) == lazy_tree(plain, opened(plain, plain_written))
    assert content(blob, layer, layer.toc.entries[-1]) == b"5"


@pytest.mark.parametrize("source", [*SOURCES, "tiny"])
def test_any_order_of_files_shows_the_same_tree(source: str) -> None:
    suffix = "gz.tar.gz" if source == "tiny" else "tar.tar"
    original = (VECTORS / "blobs" / f"{source}.{suffix}").read_bytes()
    blob, written = converted(original)
    layer = opened(blob, written)
    files = [entry.name for entry in layer.toc.entries if entry.kind != "dir"]
    moved, moved_written = converted(original, prioritized=tuple(reversed(files)))
    moved_layer = opened(moved, moved_written)
    assert lazy_tree(moved, moved_layer) == lazy_tree(blob, layer)
    if source in ("tiny", "basic", "sparse-gnu"):
        assert names(moved_layer.toc) != names(layer.toc)


def test_circle_of_hard_links_is_not_moved() -> None:
    entries = [
        ("a", b"", {"type": tarfile.LNKTYPE, "linkname": "b"}),
        ("b", b"", {"type": tarfile.LNKTYPE, "linkname": "a"}),
    ]
    with pytest.raises(ImageInvalid):
        opened(*converted(archive_of(*entries), prioritized=(b"a",)))


def test_limits_of_holes_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = (VECTORS / "blobs" / "sparse-gnu.tar.tar").read_bytes()
    monkeypatch.setattr("p2pgz.convert.layer._MAX_STEPS", 2)
    with pytest.raises(ImageInvalid, match="runs"):
        converted(original, prioritized=(b"x",))
    monkeypatch.setattr("p2pgz.convert.layer._ZEROS_WRITTEN_LIMIT", 2)
    with pytest.raises(ImageInvalid, match="holes"):
        converted(original)


def test_entries_that_no_tree_can_have() -> None:
    blob, written = converted(archive_of(("./", b"", {}), ("ok", b"", {})))
    assert names(opened(blob, written).toc) == [b"ok"]
    assert "cannot be the root" in written.warnings[0]
    with pytest.raises(ImageInvalid, match="an owner"):
        converted(archive_of(("x", b"", {"uid": 0xFFFFFFFF})))


def test_nothing_to_prioritize_means_nothing_to_prefetch() -> None:
    blob, written = converted(archive_of(("a", b"1", {})), prioritized=(b"elsewhere",))
    assert opened(blob, written).toc.prefetch_end == 0


def test_hard_link_keeps_the_file_that_was_written_over() -> None:
    original = archive_of(
        ("f", b"old", {"mode": 0o600}),
        ("l1", b"", {"type": tarfile.LNKTYPE, "linkname": "f"}),
        ("l2", b"", {"type": tarfile.LNKTYPE, "linkname": "l1"}),
        ("f", b"new", {}),
        ("l3", b"", {"type": tarfile.LNKTYPE, "linkname": "f"}),
    )
    blob, written = converted(original)
    layer = opened(blob, written)
    assert [(e.name, e.kind, e.link, e.mode) for e in layer.toc.entries] == [
        (b"l1", "reg", b"", 0o600),
        (b"l2", "hardlink", b"l1", 0o644),
        (b"f", "reg", b"", 0o644),
        (b"l3", "hardlink", b"f", 0o644),
    ]
    assert [content(blob, layer, layer.toc.entries[n]) for n in (0, 2)] == [b"old", b"new"]


def test_directory_that_becomes_a_file_takes_its_children_with_it() -> None:
    original = archive_of(
        ("d/", None, {}),
        ("d/kept", b"1", {}),
        ("l", b"", {"type": tarfile.LNKTYPE, "linkname": "d/kept"}),
        ("d", b"2", {}),
    )
    blob, written = converted(original)
    assert [(e.name, e.kind) for e in opened(blob, written).toc.entries] == [(b"l", "reg"), (b"d", "reg")]


def test_link_to_a_reserved_file_goes_with_it() -> None:
    original = archive_of(
        ("stargz.index.json", b"{}", {}),
        ("l", b"", {"type": tarfile.LNKTYPE, "linkname": "stargz.index.json"}),
    )
    blob, written = converted(original)
    assert names(opened(blob, written).toc) == []
    assert len(written.warnings) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 1},
        {"level": 99},
        {"level": 0},
        {"format": "tar"},
        {"threads": -1},
        {"chunk_bytes": 1 << 40},
    ],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        converted(b"", **options)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-2000], lambda b: b[:300] + b"x" + b[301:], lambda b: b"junk" * 500]
)
def test_damaged_layers_are_refused_and_leave_no_file(damage: object, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(damage((VECTORS / "blobs" / "basic.tar.tar").read_bytes()))
    with pytest.raises(ImageInvalid):
        convert_file(source, tmp_path / "out", LayerOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_file_is_converted_and_reports_progress(tmp_path: Path) -> None:
    seen: list[int] = []
    source = VECTORS / "blobs" / "basic.zstm.tar.zst"
    written = convert_file(source, tmp_path / "out", LayerOptions(), progress=seen.append)
    blob = (tmp_path / "out").read_bytes()
    assert len(blob) == written.size
    assert opened(blob, written).toc.entries
    assert seen == [source.stat().st_size]
    again = convert_file(tmp_path / "out", tmp_path / "again", LayerOptions())
    assert again.digest == written.digest
