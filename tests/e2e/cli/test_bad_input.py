"""Every bad input of the vectors through the command: refused with a message, or mounted and only the named files fail.

Whatever the verdict: the node lives on, within its memory, and a refused image leaves nothing mounted.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pgz.core.media import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, TOC_DIGEST_ANNOTATION
from tests.e2e.cli.conftest import VECTORS, start_node
from tests.e2e.cli.layouts import Layout, diff_id, digest_of, layer_type
from tests.e2e.cli.running import Done, P2pgz, below, forget_peak, peak_memory_mib, umount, until
from tests.e2e.cli.test_vectors import CHECK

pytestmark = [pytest.mark.root]

ITEMS: dict[str, dict[str, Any]] = json.loads((VECTORS / "bad" / "expected.json").read_text())["items"]
LAYERS = {name: item for name, item in ITEMS.items() if item["file"].endswith(".blob")}
DOCUMENTS = {name: item for name, item in ITEMS.items() if "role" in item}
# The layer that the bad ones were made of; only its TOC digest is wrong in the manifest of that item
GOOD_BLOB = (VECTORS / ITEMS["toc-digest-mismatch"]["file"]).read_bytes()
INVALID, NOT_FOUND = 12, 10
# The largest legitimate work here is a chunk of some MiB; the TOC of 400 000 entries is the widest that is accepted
MEMORY_MIB = 700
# In the documents' own words: digests and sizes that stand for the good layer, its config, its TOC and its manifest
STANDS_FOR_LAYER, STANDS_FOR_CONFIG, STANDS_FOR_TOC = ("sha256:" + digit * 64 for digit in "123")
SHOWN_ENTRIES_MAX = 1000  # of a tree that is walked whole; the bombs' trees are only opened


def good_layer() -> tuple[list[dict[str, Any]], str]:
    """The tree that must be seen, and the TOC's digest: that of `badbase` with the contents of these very files."""
    entries = json.loads((VECTORS / "expected" / "badbase.esgz64k.json").read_text())["entries"]
    with tarfile.open(fileobj=io.BytesIO(GOOD_BLOB)) as tar:
        contents = {member.name: tar.extractfile(member) for member in tar if member.isreg()}
        digests = {name: digest_of(file.read()) for name, file in contents.items() if file}
    for entry in entries:
        if entry["type"] == "reg":
            name = "dir/a" if entry["path"] == "dir/hard" else entry["path"]
            entry["sha256"] = digests[name].removeprefix("sha256:")
    return entries, digests["stargz.index.json"]


GOOD_ENTRIES, GOOD_TOC = good_layer()


@pytest.fixture(autouse=True)
def _node_lives_on(shared: P2pgz) -> Iterator[None]:
    pid = shared.node_pid()
    forget_peak(pid)
    yield
    assert shared.node_pid() == pid
    peak = peak_memory_mib(pid)
    assert peak < MEMORY_MIB, f"the node grew to {peak} MiB"


def verdict(item: dict[str, Any]) -> tuple[bool, bool, bool]:
    """What may happen: refused at once, mounted with failing reads, mounted and all right."""
    answers = [item["must"], *item.get("also_ok", [])]
    reject = "reject" in answers
    when = item.get("when", "either" if reject else "never")
    accept = any(answer.startswith("accept") for answer in answers)
    return reject and when in ("open", "either"), reject and when in ("read", "either"), accept


def check_refusal(p2pgz: P2pgz, done: Done, root: Path, *, codes: tuple[int, ...] = (INVALID,)) -> None:
    """The message says what, where and what to do, and nothing is mounted."""
    assert done.code in codes, done.err
    assert done.err.startswith("p2pgz: ")
    assert len(done.err.splitlines()) > 1, "no hint"
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    assert str(root.parent) in done.err, "which image?"
    assert below(root.parent) == []
    assert list(root.iterdir()) == []
    if p2pgz.node_pid():
        until(lambda: p2pgz.mounts() == [], "nothing mounted")


def wrong(root: Path, failing: set[str]) -> list[Any]:
    """The differences from the good tree that the verdict does not name."""
    found = CHECK.check(GOOD_ENTRIES, root)
    allowed = [
        difference
        for difference in found
        if difference[0] in failing
        and difference[1] == "content"
        and getattr(difference[3], "errno", 0) == errno.EIO
    ]
    assert {difference[0] for difference in allowed} in (failing, set()), allowed
    return [difference for difference in found if difference not in allowed]


def read_errno(path: Path) -> int:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno or -1
    return 0


def reads_fail(root: Path, paths: set[str]) -> bool:
    """Whether every one of these files gives EIO, somewhere, rather than bytes that nobody verified."""
    failed = {path for path in paths if read_errno(root / path) == errno.EIO}
    assert failed in (paths, set()), f"only {failed} failed"
    return failed == paths


def look_at_everything(root: Path) -> None:
    """Walk and read all of a small tree: no error, nothing outside, and what the good tree has too has its bytes."""
    good = {entry["path"]: entry for entry in GOOD_ENTRIES}
    count = 0
    for folder, folders, names in os.walk(root, onerror=lambda error: pytest.fail(str(error))):
        count += len(folders) + len(names)
        if count > SHOWN_ENTRIES_MAX:
            return
        for name in names:
            path = Path(folder, name)
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):
                data = path.read_bytes()
                assert len(data) == info.st_size
                known = good.get(str(path.relative_to(root)))
                if known and known["type"] == "reg" and known["size"] == info.st_size:
                    assert digest_of(data) == "sha256:" + known["sha256"], path


def add_layer(layout: Layout, item: dict[str, Any]) -> str:
    annotations = dict(item.get("annotations", {}))
    if item["toc_digest"]:
        annotations[TOC_DIGEST_ANNOTATION] = item["toc_digest"]
    external = item.get("external_toc")
    return layout.add(
        "bad",
        (VECTORS / item["file"]).read_bytes(),
        annotations=annotations,
        external_toc=(VECTORS / external).read_bytes() if external else None,
    )


@pytest.fixture(scope="module")
def node_without(disk: Path) -> Iterator[Callable[[str], P2pgz]]:
    """Nodes whose pools never hold the right bytes of a file: where another image brought them, reads succeed."""
    nodes: dict[str, P2pgz] = {}
    for path in sorted({path for item in LAYERS.values() for path in item.get("paths", ())}):
        nodes[path] = start_node(Path(tempfile.mkdtemp(dir=disk)))
    yield nodes.__getitem__
    for p2pgz in nodes.values():
        p2pgz.close()


@pytest.mark.parametrize("name", [name for name in LAYERS if "paths" in LAYERS[name]])
def test_layer_with_damaged_content(
    shared: P2pgz, node_without: Callable[[str], P2pgz], p2pgz: P2pgz, home: Path, name: str
) -> None:
    item = LAYERS[name]
    root = home / "root"
    root.mkdir()
    reference = add_layer(Layout(home / "layout"), item)
    may_refuse, may_fail, may_accept = verdict(item)
    if name != "payload-flip-mid":  # one bad chunk among good ones, which other images of that node bring
        p2pgz = shared if may_accept else node_without(item["paths"][0])
    done = p2pgz.run("mount", "--suid", "--dev", "--no-fill", reference, root)
    if done.code:
        assert may_refuse, done.err
        check_refusal(p2pgz, done, root)
        return
    try:
        paths = set(item["paths"])
        failed = reads_fail(root, paths)
        assert may_fail if failed else may_accept, f"reads failed: {failed}"
        # the TOC may also lie about the size of a file that cannot be read
        lies = {(path, "size") for path in paths} if failed else set()
        assert {difference[:2] for difference in wrong(root, paths if failed else set())} <= lies
        assert peak_memory_mib(p2pgz.node_pid()) < MEMORY_MIB
    finally:
        umount(root)


@pytest.mark.parametrize("name", [name for name in LAYERS if "paths" not in LAYERS[name]])
def test_layer(shared: P2pgz, home: Path, name: str) -> None:
    item = LAYERS[name]
    root = home / "root"
    root.mkdir()
    reference = add_layer(Layout(home / "layout"), item)
    may_refuse, _, may_accept = verdict(item)
    done = shared.run("mount", "--suid", "--dev", "--no-fill", reference, root)
    if done.code:
        assert may_refuse, done.err
        check_refusal(shared, done, root)
        return
    assert may_accept, "must have been refused"
    try:
        look_at_everything(root)
        if name in SHOWN:
            SHOWN[name](root)
        elif "the same tree" in item["must"]:
            assert wrong(root, set()) == []
    finally:
        umount(root)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _expect(*conditions: bool) -> None:
    assert all(conditions), conditions


SHOWN = {
    "name-up": lambda root: _expect((root / "x").is_file()),
    "name-upup": lambda root: _expect((root / "b").is_file()),
    "name-abs": lambda root: _expect((root / "abs").is_file()),
    "name-inner": lambda root: _expect((root / "r").is_file()),
    "name-dot": lambda root: _expect((root / "a/b").is_file()),
    "name-slashes": lambda root: _expect((root / "a/b").is_file()),
    "name-deepup": lambda root: _expect((root / "etc/x").is_file()),
    "name-root-dir": lambda root: _expect(_mode(root) == 0o700, root.stat().st_uid == 7),
    "hl-up": lambda root: _expect((root / "dir/hard").samefile(root / "dir/a")),
    "hl-later": lambda root: _expect((root / "early").samefile(root / "dir/a")),
    "hl-chain-20000": lambda root: _expect(max(path.stat().st_nlink for path in root.iterdir()) > 20_000),
    "dup-dir": lambda root: _expect(_mode(root / "dir") == 0o700, (root / "dir/a").is_file()),
    "dup-file": lambda root: _expect(_mode(root / "z") == 0o600, (root / "z").stat().st_size == 0),
    "dup-slash": lambda root: _expect((root / "z").is_dir()),
    "num-mode-type": lambda root: _expect(_mode(root / "z") == 0o644, (root / "z").is_file()),
    "num-mode-lie": lambda root: _expect(_mode(root / "z") == 0o755, (root / "z").is_file()),
    "num-mtime-year9999": lambda root: _expect((root / "z").stat().st_mtime == 253402300799),
    "num-mtime-offset": lambda root: _expect((root / "z").stat().st_mtime == 1577836800),
    "num-mtime-nano": lambda root: _expect((root / "z").stat().st_mtime_ns // 10**9 == 1577836800),
    "dev-zero": lambda root: _expect((root / "dev").is_char_device(), (root / "dev").stat().st_rdev == 0),
    "fifo-size": lambda root: _expect(
        all(path.stat().st_size == 0 for path in root.iterdir() if path.is_fifo())
    ),
    "xattr-null": lambda root: _expect(os.getxattr(root / "z", "user.a") == b""),
    "wh-names": lambda root: _expect((root / "dir/a").is_file(), not list(root.rglob(".wh.*"))),
    "toc-entries-null": lambda root: _expect(list(root.iterdir()) == []),
    "same-offset": lambda root: _expect((root / "dir/b").read_bytes() == (root / "dir/a").read_bytes()),
}


def test_other_chunks_of_a_damaged_file_stay_readable(p2pgz: P2pgz, home: Path) -> None:
    root = home / "root"
    root.mkdir()
    p2pgz.ok("mount", "--no-fill", add_layer(Layout(home / "layout"), LAYERS["payload-flip-mid"]), root)
    chunk = 64 << 10
    with (root / "dir/three").open("rb", buffering=0) as file:
        first = os.pread(file.fileno(), chunk, 0)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), chunk, chunk)
        last = os.pread(file.fileno(), chunk, 2 * chunk)
    umount(root)
    assert len(first) == chunk
    assert last


def test_layer_without_a_toc_digest_mounts_with_the_opt_in(shared: P2pgz, home: Path) -> None:
    root = home / "root"
    root.mkdir()
    reference = add_layer(Layout(home / "layout"), LAYERS["toc-digest-absent"])
    assert "--allow-unverified-toc" in shared.fails(INVALID, "mount", reference, root)
    shared.ok("mount", "--suid", "--dev", "--allow-unverified-toc", reference, root)
    assert wrong(root, set()) == []
    umount(root)
    shared.fails(INVALID, "mount", reference, root)  # the opt-in was for that mount, not for ever


def document_of(item: dict[str, Any]) -> bytes:
    data = (VECTORS / item["file"]).read_bytes()
    return gzip.decompress(data) if item["file"].endswith(".gz") else data


def layer_count(document: bytes) -> int:
    try:
        return len(json.loads(document)["layers"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return 1


def add_document(layout: Layout, item: dict[str, Any]) -> str:
    """The document in its place, its stand-ins for the good layer, config and manifest replaced by those."""
    toc = GOOD_TOC
    layer = layout.store(GOOD_BLOB, layer_type(GOOD_BLOB), annotations={TOC_DIGEST_ANNOTATION: toc})
    document = document_of(item)
    if item["role"] == "config":
        bad_config = layout.store(document, OCI_CONFIG)
        layout.tag("bad", layout.manifest([layer], bad_config))
        return layout.reference("bad")
    if item["role"] == "index":
        good = layout.manifest([layer], layout.config([diff_id(GOOD_BLOB)]))
        document = stand_in(document, STANDS_FOR_LAYER, 500, good)
        layout.tag("bad", layout.store(document, OCI_INDEX))
        return layout.reference("bad")
    config = layout.config([diff_id(GOOD_BLOB)] * layer_count(document))
    document = stand_in(document, STANDS_FOR_LAYER, 1000, layer)
    document = stand_in(document, STANDS_FOR_CONFIG, 300, config)
    document = document.replace(STANDS_FOR_TOC.encode(), toc.encode())
    descriptor = layout.store(document, OCI_MANIFEST, digest=item.get("declared_digest", ""))
    descriptor["size"] += item.get("declared_size_delta", 0)
    layout.tag("bad", descriptor)
    return layout.reference("bad")


def stand_in(document: bytes, digest: str, size: int, real: dict[str, Any]) -> bytes:
    document = document.replace(digest.encode(), real["digest"].encode())
    return re.sub(rb'("size": ?)%d(?=[\s,}])' % size, rb"\g<1>%d" % real["size"], document)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document(shared: P2pgz, home: Path, name: str) -> None:
    item = DOCUMENTS[name]
    root = home / "root"
    root.mkdir()
    reference = add_document(Layout(home / "layout"), item)
    may_refuse, _, may_accept = verdict(item | {"when": "open"})
    done = shared.run("mount", "--suid", "--dev", "--no-fill", reference, root)
    if done.code:
        assert may_refuse, done.err
        codes = (NOT_FOUND,) if name in NOTHING_FITS else (INVALID,)
        check_refusal(shared, done, root, codes=codes)
        return
    assert may_accept, "must have been refused"
    try:
        if name == "manifest-no-layers":
            assert list(root.iterdir()) == []
        else:
            assert wrong(root, set()) == []
    finally:
        umount(root)


NOTHING_FITS = {"index-other-platform", "index-empty"}


def test_what_another_platform_has_is_listed(shared: P2pgz, home: Path) -> None:
    (home / "root").mkdir()
    reference = add_document(Layout(home / "layout"), DOCUMENTS["index-other-platform"])
    said = shared.fails(NOT_FOUND, "mount", reference, home / "root")
    assert "plan9/riscv64" in said
    assert "--platform" in said


def test_names_that_are_not_utf8_survive_every_command(shared: P2pgz, home: Path) -> None:
    blob = (VECTORS / "blobs" / "latin1.gz.tar.gz").read_bytes()
    reference = Layout(home / "layout").add("latin1", blob)
    expected = json.loads((VECTORS / "expected" / "latin1.gz.json").read_text())["entries"]
    listed = shared.ok("ls", "-R", "--json", reference).json()
    assert {entry["name"] for entry in listed} >= {entry["path"] for entry in expected if entry["path"]}
    file = next(entry for entry in expected if entry["type"] == "reg" and not entry["path"].isprintable())
    printed = shared.ok("cat", reference, file["path"]).out
    assert digest_of(printed.encode("utf-8", "surrogateescape")) == "sha256:" + file["sha256"]
