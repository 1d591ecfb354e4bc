"""Reading the test vectors' expected results into the words of `testing.trees`."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any


def expected_document(path: Path) -> dict[str, Any]:
    """One file of `expected/`."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def expected_tree(entries: list[dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    """A list of expected entries, as `testing.trees.describe` writes a tree."""
    tree: dict[bytes, dict[str, Any]] = {}
    for entry in entries:
        kind = entry["type"]
        same = entry.get("same_inode_as")
        wanted: dict[str, Any] = {
            "type": kind,
            "nlink": entry["nlink"],
            "same": os.fsencode(same) if same and same != entry["path"] else None,
        }
        if not entry.get("implied"):
            wanted |= {
                "mode": entry["mode"] if kind != "symlink" else None,
                "uid": entry["uid"],
                "gid": entry["gid"],
                "mtime": entry["mtime"],
                "mtime_nsec": entry["mtime_nsec"],
                "size": entry["size"] if kind == "reg" else None,
                "sha256": entry["sha256"] if kind == "reg" else None,
                "linkname": os.fsencode(entry["linkname"]) if kind == "symlink" else None,
                "xattrs": {
                    os.fsencode(key): base64.b64decode(value) for key, value in entry["xattrs"].items()
                },
                "device": (entry["devmajor"], entry["devminor"]) if kind in ("char", "block") else None,
            }
        tree[os.fsencode(entry["path"])] = wanted
    return tree
