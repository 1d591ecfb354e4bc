"""The trees of all vectors, against what reference tools showed for them (tests/vectors/README.md)."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import stat
from functools import cache
from pathlib import Path

import pytest
import zstandard

from p2pgz.core.digest import Digest
from p2pgz.core.footer import parse_footer
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Toc
from p2pgz.core.ownindex import PlainIndexer
from p2pgz.core.toc import extract_external_toc, extract_toc, parse_toc
from p2pgz.errors import ImageInvalid
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import ROOT_INO, TreeFile, build_tree

VECTORS = Path(__file__).parents[2] / "vectors"
KINDS = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}
FLAVOURS = ("gz", "esgz", "zstd", "mixed")


def read_plain(blob: bytes) -> Toc:
    if blob[:2] == b"\x1f\x8b":
        blob = gzip.decompress(blob)
    elif blob[:4] == b"\x28\xb5\x2f\xfd" or blob[1:4] == b"\x2a\x4d\x18":
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob), read_across_frames=True)
        blob = reader.read()
    indexer = PlainIndexer()
    indexer.feed(blob)
    return indexer.finish().toc


def read_toc(blob: bytes, external: bytes | None = None) -> tuple[Toc, str]:
    """The TOC of a blob of any flavour, and how its members are compressed."""
    footer = parse_footer(blob[-(64 << 10) :], len(blob))
    if footer is None:
        return read_plain(blob), "none"
    if footer.kind == "external":
        assert external is not None
        toc_json = extract_external_toc(external)
    else:
        size = footer.toc_compressed_bytes
        end = len(blob) - footer.footer_bytes if size is None else footer.toc_offset + size
        toc_json = extract_toc(footer, blob[footer.toc_offset : end])
    toc = parse_toc(toc_json, kind=footer.kind, payload_end=footer.payload_end, blob_size=len(blob))
    return toc, footer.compression


def make_tree(*tocs: tuple[Toc, str]) -> tuple[TreeFile, list[SegmentTable]]:
    layers, tables = [], {}
    for toc, compression in tocs:
        layout = SegmentLayout.build(toc, compression=compression)
        layers.append(LayerInput(toc, layout.extents, toc.digest))
        tables[toc.digest] = SegmentTable(layout.to_bytes())
    tree = TreeFile(build_tree(merge_layers(layers)))
    return tree, [tables[segment] for segment in tree.segments]


def describe(tree: TreeFile, tables: list[SegmentTable]) -> dict[str, dict[str, object]]:
    """What `check.py` compares, of every path."""
    found: dict[str, dict[str, object]] = {}
    first_names: dict[int, str] = {}
    todo = [(b"", ROOT_INO)]
    paths = []
    while todo:
        path, ino = todo.pop()
        paths.append((path, ino))
        for name, child, _ in tree.entries(ino):
            todo.append((path + b"/" + name if path else name, child))
            assert tree.lookup(ino, name) == child
    for path, ino in sorted(paths):
        inode = tree.inode(ino)
        kind = KINDS[stat.S_IFMT(inode.mode)]
        shown = os.fsdecode(path)
        entry: dict[str, object] = {
            "type": kind,
            "mode": stat.S_IMODE(inode.mode),
            "uid": inode.uid,
            "gid": inode.gid,
            "mtime_ns": inode.mtime_ns,
            "nlink": inode.nlink,
            "xattrs": {
                os.fsdecode(name): base64.b64encode(value).decode()
                for name, value in tree.xattrs(ino).items()
            },
        }
        if kind == "reg":
            entry["size"] = inode.size
            extent = tree.extent(ino)
            if extent is not None and extent.chunk_count == 1:
                table = tables[extent.segment]
                entry["sha256"] = table.digest(extent.first_chunk).hex()
                assert table.segment_offset[extent.first_chunk] == extent.segment_offset
                assert table.size[extent.first_chunk] == inode.size
        if kind == "symlink":
            entry["linkname"] = os.fsdecode(tree.readlink(ino))
            assert inode.size == len(tree.readlink(ino))
        if kind in ("char", "block"):
            entry["device"] = (os.major(inode.rdev), os.minor(inode.rdev))
        if kind != "dir":
            first = first_names.setdefault(ino, shown)
            entry["same_inode_as"] = first if inode.nlink > 1 else None
        found[shown] = entry
    return found


def expect(entries: list[dict]) -> dict[str, dict[str, object]]:
    expected: dict[str, dict[str, object]] = {}
    for entry in entries:
        kind = entry["type"]
        wanted = {key: entry[key] for key in ("type", "mode", "uid", "gid", "nlink", "xattrs")}
        if entry["mtime"] is not None:
            wanted["mtime_ns"] = entry["mtime"] * 10**9 + entry["mtime_nsec"]
        if kind == "reg":
            wanted |= {"size": entry["size"], "sha256": entry["sha256"]}
        if kind == "symlink":
            wanted["linkname"] = entry["linkname"]
            del wanted["mode"]  # Linux has none to show
        if kind in ("char", "block"):
            wanted["device"] = (entry["devmajor"], entry["devminor"])
        if kind != "dir":
            wanted["same_inode_as"] = entry.get("same_inode_as")
        expected[entry["path"]] = wanted
    return expected


def differences(tree: TreeFile, tables: list[SegmentTable], entries: list[dict]) -> list[object]:
    expected, found = expect(entries), describe(tree, tables)
    wrong: list[object] = [(path, "missing") for path in expected if path not in found]
    wrong += [(path, "unexpected") for path in found if path not in expected]
    for path in expected.keys() & found.keys():
        for key, value in expected[path].items():
            if key == "sha256" and key not in found[path]:
                continue  # empty, or of several chunks: their digests are not the file's
            if found[path][key] != value:
                wrong.append((path, key, value, found[path][key]))
    return wrong


@cache
def index() -> list[dict]:
    vectors = json.loads((VECTORS / "index.json").read_text())["vectors"]
    return [vector for vector in vectors if vector["file"].startswith("blobs/")]


@pytest.mark.parametrize("vector", index(), ids=lambda vector: vector["name"])
def test_tree_of_a_layer_is_what_the_reference_shows(vector: dict) -> None:
    expected = json.loads((VECTORS / vector["expected"]).read_text())
    external = VECTORS / "blobs" / f"{vector['name']}.toc.tar.gz"
    toc = read_toc(
        (VECTORS / vector["file"]).read_bytes(), external.read_bytes() if external.exists() else None
    )
    tree, tables = make_tree(toc)
    lists = ("entries_toc", "entries") if expected["use"] == "either" else (expected["use"],)
    answers = [differences(tree, tables, expected[key]) for key in lists]
    assert min(answers, key=len) == []


def layer_files(layout: Path, ref: str) -> list[bytes]:
    def blob(digest: str) -> bytes:
        return (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    manifests = json.loads((layout / "index.json").read_text())["manifests"]
    (digest,) = [
        manifest["digest"]
        for manifest in manifests
        if manifest["annotations"]["org.opencontainers.image.ref.name"] == ref
    ]
    return [blob(layer["digest"]) for layer in json.loads(blob(digest))["layers"]]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merged_image_is_what_the_specification_says(flavour: str) -> None:
    expected = json.loads((VECTORS / "expected" / f"image-{flavour}.json").read_text())
    tree, tables = make_tree(*[read_toc(blob) for blob in layer_files(VECTORS / "image", flavour)])
    lists = [expected[key] for key in ("entries", "entries_toc") if key in expected]
    assert min([differences(tree, tables, entries) for entries in lists], key=len) == []


EDGES = json.loads((VECTORS / "expected" / "image-edge.json").read_text())


def through_the_link(entries: list[dict]) -> list[dict]:
    """What umoci, containerd and podman make of `through-symlink`: the link stays, the file is where it leads."""
    by_path = {entry["path"]: dict(entry) for entry in entries}
    link, target = "nectar.ambe60", "zephyr_umbe46"
    file = by_path.pop(f"{link}/g")
    by_path[f"{target}/g"] = file | {"path": f"{target}/g"}
    by_path[link] |= {
        "type": "symlink",
        "linkname": target,
        "mode": 0o777,
        "nlink": 1,
        "mtime": 1_500_000_000,
    }
    by_path[link]["mtime_nsec"] = 0
    by_path[""]["nlink"] -= 1
    return list(by_path.values())


@pytest.mark.parametrize("question", EDGES)
def test_layers_on_which_tools_disagree(question: str) -> None:
    entries = EDGES[question]["by_spec_rules"]
    if question == "through-symlink":
        entries = through_the_link(entries)
    tree, tables = make_tree(*[read_toc(blob) for blob in layer_files(VECTORS / "image-edge", question)])
    assert differences(tree, tables, entries) == []


def is_about_trees(name: str, verdict: dict) -> bool:
    prefixes = (
        "under-",
        "hl-",
        "wh-",
        "dup-",
        "name-",
        "dev-",
        "sym-",
        "xattr-",
        "num-",
        "dir-",
        "fifo-",
        "type-",
    )
    return name.startswith(prefixes) and verdict["file"].endswith(".blob")


BAD = {
    name: verdict
    for name, verdict in json.loads((VECTORS / "bad" / "expected.json").read_text())["items"].items()
    if is_about_trees(name, verdict)
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tree_is_refused_or_shown_as_the_verdict_says(name: str) -> None:
    verdict = BAD[name]
    may_refuse = verdict["must"] == "reject" or "reject" in verdict.get("also_ok", [])
    may_show = verdict["must"] != "reject" or "also_ok" in verdict
    try:
        tree, tables = make_tree(read_toc((VECTORS / verdict["file"]).read_bytes()))
    except ImageInvalid:
        assert may_refuse
        return
    assert may_show
    found = describe(tree, tables)
    shown = SHOWN.get(name)
    if shown is not None:
        assert shown(found), {path: entry["type"] for path, entry in found.items()}


SHOWN = {
    "name-abs": lambda found: "abs" in found,
    "name-inner": lambda found: "r" in found and "q" not in found,
    "name-dot": lambda found: "a/b" in found,
    "name-slashes": lambda found: "a/b" in found,
    "name-root-dir": lambda found: found[""]["mode"] == 0o700 and found[""]["uid"] == 7,
    "hl-chain-20000": lambda found: max(entry["nlink"] for entry in found.values()) > 20_000,
    "hl-later": lambda found: found["early"]["same_inode_as"] == found["dir/a"]["same_inode_as"],
    "dup-dir": lambda found: found["dir"]["mode"] == 0o700 and "dir/a" in found,
    "dup-file": lambda found: found["z"]["mode"] == 0o600 and found["z"]["size"] == 0,
    "dup-slash": lambda found: found["z"]["type"] == "dir",
    "dev-zero": lambda found: found["dev"]["type"] == "char" and found["dev"]["device"] == (0, 0),
    "xattr-overlay": lambda found: len(found) > 5,
    "wh-names": lambda found: "dir/a" in found and not any(".wh." in path for path in found),
}


def test_layers_that_contradict_themselves_are_refused_by_merging() -> None:
    for name in ("under-symlink", "under-file", "under-hardlink", "hl-missing"):
        toc = read_toc((VECTORS / BAD[name]["file"]).read_bytes())
        with pytest.raises(ImageInvalid, match="layer 1 of 1"):
            make_tree(toc)


def test_same_layers_give_the_same_bytes() -> None:
    tocs = [read_toc(blob)[0] for blob in layer_files(VECTORS / "image", "esgz")]
    inputs = [
        LayerInput(toc, SegmentLayout.build(toc, compression="gzip").extents, toc.digest) for toc in tocs
    ]
    assert build_tree(merge_layers(inputs)) == build_tree(merge_layers(inputs))
    assert isinstance(inputs[0].segment, Digest)
