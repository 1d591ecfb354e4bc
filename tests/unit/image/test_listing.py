"""`p2pgz ls` rows."""

from __future__ import annotations

import json

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.model import Entry, Toc
from p2pgz.errors import ImageNotFound
from p2pgz.image.listing import LISTED_PATH_BYTES_MAX, format_rows, list_directory
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree


def tree_of(*entries: Entry) -> TreeFile:
    digest = Digest.of(b"")
    return TreeFile(build_tree(merge_layers([LayerInput(Toc(digest, list(entries)), {}, digest)])))


TREE = tree_of(
    Entry(name=b"bin", kind="symlink", mode=0o777, link=b"usr/bin"),
    Entry(name=b"dev/null", kind="char", mode=0o666, dev_major=1, dev_minor=3),
    Entry(name=b"usr/bin/su", kind="reg", mode=0o4755, uid=1000, mtime=1_500_000_000),
    Entry(name=b"usr/bin/su2", kind="hardlink", link=b"usr/bin/su"),
    Entry(name=b"usr/\x1b[2J\n\xff\xc3\xa9", kind="fifo", mtime=10**14),
)


def test_lines_look_like_ls() -> None:
    assert format_rows(list_directory(TREE, b"/")) == [
        "lrwxrwxrwx 1 0 0    7 1970-01-01 00:00:00 bin -> usr/bin",
        "drwxr-xr-x 2 0 0 4096 1970-01-01 00:00:00 dev",
        "drwxr-xr-x 3 0 0 4096 1970-01-01 00:00:00 usr",
    ]
    assert format_rows(list_directory(TREE, b"bin/")) == [
        "-rwsr-xr-x 2 1000 0 0 2017-07-14 02:40:00 su",
        "-rwsr-xr-x 2 1000 0 0 2017-07-14 02:40:00 su2",
    ]
    assert format_rows(list_directory(TREE, b"dev/null")) == [
        "crw-rw-rw- 1 0 0 1, 3 1970-01-01 00:00:00 dev/null"
    ]


def test_names_cannot_play_with_the_terminal() -> None:
    lines = format_rows(list_directory(TREE, b"usr"))
    assert lines[0].endswith("@100000000000000 \\x1b[2J\\n\\xffé")
    assert all(line.isprintable() for line in lines)


def test_recursive_listing_goes_depth_first() -> None:
    names = [row.name for row in list_directory(TREE, b"", recursive=True)]
    assert names[:4] == [b"bin", b"dev", b"dev/null", b"usr"]
    assert names[5:] == [b"usr/bin", b"usr/bin/su", b"usr/bin/su2"]


def test_json_keeps_names_exactly() -> None:
    rows = [row.to_json() for row in list_directory(TREE, b"/", recursive=True)]
    by_name = {row["name"]: row for row in json.loads(json.dumps(rows))}
    assert by_name["usr/\x1b[2J\n\udcffé"]["type"] == "fifo"
    assert by_name["bin"]["target"] == "usr/bin"
    assert by_name["dev/null"]["device"] == [1, 3]
    assert by_name["usr/bin/su"]["inode"] == by_name["usr/bin/su2"]["inode"]
    assert by_name["usr/bin/su"]["mode"] == 0o4755


def test_listing_of_a_very_deep_tree_ends() -> None:
    tree = tree_of(Entry(name=b"/".join([b"dd"] * 20_000), kind="fifo"))
    rows = list_directory(tree, b"", recursive=True)
    assert max(len(row.name) for row in rows) < LISTED_PATH_BYTES_MAX + 4


def test_missing_path() -> None:
    with pytest.raises(ImageNotFound, match="nothing"):
        list_directory(TREE, b"usr/nothing")
