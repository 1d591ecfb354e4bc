"""Merging against a model so simple that it can be seen to be right: a dict of paths, changed entry by entry."""

from __future__ import annotations

import stat

from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.model import Entry, Toc
from p2pgz.errors import ImageInvalid
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import ROOT_INO, TreeFile, build_tree

NAMES = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
KINDS = st.sampled_from(["dir", "fifo", "fifo", "hardlink", "whiteout", "opaque", "symlink"])

Step = tuple[str, bytes, bytes, int]
LAYERS = st.lists(st.lists(st.tuples(KINDS, PATHS, PATHS, st.integers(0, 0o7777)), max_size=6), max_size=4)
Tree = dict[bytes, tuple[str, object]]


def entry_of(step: Step) -> Entry:
    kind, path, other, mode = step
    head, _, name = path.rpartition(b"/")
    if kind == "whiteout":
        return Entry(name=(head + b"/" if head else b"") + b".wh." + name, kind="reg")
    if kind == "opaque":
        return Entry(name=path + b"/.wh..wh..opq", kind="reg")
    # symlinks lead to themselves: what leads nowhere is replaced, and the model need not walk links
    link = {"hardlink": other, "symlink": name}.get(kind, b"")
    return Entry(name=path, kind=kind, mode=mode, link=link)


def below(path: bytes, tree: Tree) -> list[bytes]:
    return [other for other in tree if other.startswith(path + b"/")]


def ancestors(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:n]) for n in range(1, len(parts))]


def apply_naively(tree: Tree, steps: list[Step], index: int) -> Tree | None:
    """The tree after one more layer, None if it is to be refused. Values are (kind, identity of the inode)."""
    tree = dict(tree)
    for kind, path, _, _ in steps:
        if kind in ("whiteout", "opaque"):
            for other in below(path, tree):
                del tree[other]
            if kind == "whiteout":
                tree.pop(path, None)
    own: set[bytes] = set()
    waiting: list[tuple[bytes, bytes]] = []
    for n, (kind, path, other, mode) in enumerate(steps):
        if kind in ("whiteout", "opaque"):
            continue
        for ancestor in ancestors(path):
            if tree.get(ancestor, ("dir",))[0] != "dir":
                if ancestor in own:
                    return None
                del tree[ancestor]
            tree.setdefault(ancestor, ("dir", 0o755))
        if kind == "dir":
            tree[path] = ("dir", mode)
            own.discard(path)
            continue
        for child in below(path, tree):
            del tree[child]
            own.discard(child)
        tree[path] = (kind, (index, n, mode))
        if kind == "hardlink":
            if other in own and tree[other][0] not in ("hardlink", "dir"):
                tree[path] = tree[other]
            else:
                waiting.append((path, other))
        own.add(path)
    targets = dict(waiting)
    for path in [path for path in tree if tree[path][0] == "hardlink"]:
        seen = set()
        while tree.get(path, ("dir",))[0] == "hardlink":
            if path in seen:
                return None
            seen.add(path)
            path = targets[path]
        if tree.get(path, ("dir",))[0] == "dir":
            return None
    while any(value[0] == "hardlink" for value in tree.values()):
        for path, other in targets.items():
            if tree.get(path, ("",))[0] == "hardlink" and tree[other][0] != "hardlink":
                tree[path] = tree[other]
    return tree


def shown(tree: TreeFile) -> Tree:
    found: Tree = {}
    todo = [(b"", ROOT_INO)]
    while todo:
        path, ino = todo.pop()
        for name, child, _ in tree.entries(ino):
            full = path + b"/" + name if path else name
            inode = tree.inode(child)
            if stat.S_ISDIR(inode.mode):
                found[full] = ("dir", stat.S_IMODE(inode.mode))
                todo.append((full, child))
            else:
                found[full] = ("other", child)
    return found


def identities(tree: Tree) -> dict[bytes, object]:
    """Directories by mode; everything else by the first path that is the same inode."""
    first: dict[object, bytes] = {}
    return {
        path: tree[path] if tree[path][0] == "dir" else first.setdefault(tree[path][1], path)
        for path in sorted(tree)
    }


@given(LAYERS)
@example([[("fifo", b"a", b"", 1)], [("hardlink", b"b", b"a", 0), ("whiteout", b"a", b"", 0)]])
@example([[("hardlink", b"a", b"b", 0), ("hardlink", b"b", b"c", 0), ("fifo", b"c", b"", 0)]])
@settings(max_examples=300)
def test_merging_agrees_with_a_dict_of_paths(layers: list[list[Step]]) -> None:
    expected: Tree | None = {}
    for index, steps in enumerate(layers):
        if expected is not None:
            expected = apply_naively(expected, steps, index)
    inputs = []
    for index, steps in enumerate(layers):
        digest = Digest.of(bytes([index]))
        inputs.append(LayerInput(Toc(digest, [entry_of(step) for step in steps]), {}, digest))
    try:
        tree = TreeFile(build_tree(merge_layers(inputs)))
    except ImageInvalid:
        assert expected is None
        return
    assert expected is not None
    assert identities(shown(tree)) == identities(expected)
    assert [tree.lookup(ROOT_INO, name) for name, _, _ in tree.entries(ROOT_INO)] == [
        ino for _, ino, _ in tree.entries(ROOT_INO)
    ]
