"""The tree that one layer alone shows, for comparing a `Toc` with what it should be.

A plain model, written for being obviously right: a dictionary of paths. The merge of layers in `image` is
another thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from p2pgz.core.model import Entry, Toc


@dataclass(slots=True)
class Node:
    """One inode. `entry` is None for a directory that only children imply."""

    entry: Entry | None
    names: set[bytes] = field(default_factory=set)


def layer_tree(toc: Toc, *, links_see: str = "tar") -> dict[bytes, Node]:
    """All names of a layer, whiteouts left out.

    Entries are applied in order, as extracting a tar does. A hard link shares what its target is at that
    moment ("tar"), or what it is after all entries ("toc").
    """
    tree: dict[bytes, Node] = {b"": Node(None, {b""})}
    late: list[Entry] = []
    for entry in toc.entries:
        if entry.name.rpartition(b"/")[2].startswith(b".wh."):
            continue
        if entry.kind == "hardlink" and links_see == "toc":
            late.append(entry)
            continue
        _apply(tree, entry)
    while late:
        ready = [entry for entry in late if entry.link in tree]
        if not ready:
            raise AssertionError(f"hard links without targets: {[entry.name for entry in late]}")
        late = [entry for entry in late if entry.link not in tree]
        for entry in ready:
            _apply(tree, entry)
    return tree


def _apply(tree: dict[bytes, Node], entry: Entry) -> None:
    parts = entry.name.split(b"/") if entry.name else []
    for depth in range(1, len(parts)):
        parent = b"/".join(parts[:depth])
        if parent not in tree:
            tree[parent] = Node(None, {parent})
    old = tree.get(entry.name)
    old_is_directory = old is not None and (old.entry is None or old.entry.kind == "dir")
    if old is not None:
        if old_is_directory and entry.kind == "dir":
            old.entry = entry
            return
        old.names.discard(entry.name)
        for name in [name for name in tree if name.startswith(entry.name + b"/")]:
            tree.pop(name).names.discard(name)
    node = tree[entry.link] if entry.kind == "hardlink" else Node(entry)
    node.names.add(entry.name)
    tree[entry.name] = node


def describe(tree: dict[bytes, Node], content_digest: Callable[[Entry], str]) -> dict[bytes, dict[str, Any]]:
    """The tree in the words of the test vectors; `content_digest` gives the hex sha256 of a file."""
    described: dict[bytes, dict[str, Any]] = {}
    children = _subdirectories(tree)
    for name, node in sorted(tree.items()):
        entry = node.entry
        directory = entry is None or entry.kind == "dir"
        first = min(node.names)
        found: dict[str, Any] = {
            "type": entry.kind if entry else "dir",
            "nlink": 2 + children.get(name, 0) if directory else len(node.names),
            "same": None if directory or first == name else first,
        }
        if entry is not None:
            found |= {
                "mode": entry.mode if entry.kind != "symlink" else None,
                "uid": entry.uid,
                "gid": entry.gid,
                "mtime": entry.mtime,
                "mtime_nsec": entry.mtime_nsec,
                "size": entry.size if entry.kind == "reg" else None,
                "sha256": content_digest(entry) if entry.kind == "reg" else None,
                "linkname": entry.link if entry.kind == "symlink" else None,
                "xattrs": entry.xattrs,
                "device": (entry.dev_major, entry.dev_minor) if entry.kind in ("char", "block") else None,
            }
        described[name] = found
    return described


def _subdirectories(tree: dict[bytes, Node]) -> dict[bytes, int]:
    counts: dict[bytes, int] = {}
    for name, node in tree.items():
        if name and (node.entry is None or node.entry.kind == "dir"):
            parent = name.rpartition(b"/")[0]
            counts[parent] = counts.get(parent, 0) + 1
    return counts


def differences(wanted: dict[bytes, dict[str, Any]], found: dict[bytes, dict[str, Any]]) -> Iterable[str]:
    """One line for each thing that is not as wanted; keys that the wanted side lacks are not looked at."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            yield f"{name!r}: {'missing' if name in wanted else 'unexpected'}"
            continue
        for key, value in wanted[name].items():
            if found[name].get(key) != value:
                yield f"{name!r}: {key}: wanted {value!r}, found {found[name].get(key)!r}"
