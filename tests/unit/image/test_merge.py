"""Merging rules, one test per rule that the vectors do not settle, and hostile layers."""

from __future__ import annotations

import hashlib
import struct
import time

import pytest

from p2pgz.core.content import FileRef, content_key
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.errors import ImageInvalid
from p2pgz.image import merge
from p2pgz.image.merge import LayerInput, MergedTree, merge_layers
from p2pgz.image.treefile import TreeFile, build_tree

CHUNK_BYTES = 100


def directory(name: str, mode: int = 0o755, **more) -> Entry:
    return Entry(name=name.encode(), kind="dir", mode=mode, mtime=5, **more)


def file(name: str, content: str = "", *, chunk_count: int = 1, mode: int = 0o644, at: int = 0) -> Entry:
    digests = [hashlib.sha256(f"{content} {n}".encode()).digest() for n in range(chunk_count)]
    chunks = tuple(
        Chunk(digest, n * CHUNK_BYTES, CHUNK_BYTES, at + n, at + n + 1, 0) for n, digest in enumerate(digests)
    )
    return Entry(name=name.encode(), kind="reg", mode=mode, size=CHUNK_BYTES * chunk_count, chunks=chunks)


def symlink(name: str, target: str) -> Entry:
    return Entry(name=name.encode(), kind="symlink", mode=0o777, link=target.encode())


def hardlink(name: str, target: str) -> Entry:
    return Entry(name=name.encode(), kind="hardlink", link=target.encode())


def marker(name: str) -> Entry:
    return Entry(name=name.encode(), kind="reg", mode=0o600)


def layer(*entries: Entry) -> LayerInput:
    toc = Toc(Digest.of(repr(entries).encode()), list(entries))
    return LayerInput(toc, SegmentLayout.build(toc, compression="gzip").extents, toc.digest)


def merged(*layers: list[Entry]) -> MergedTree:
    return merge_layers([layer(*entries) for entries in layers])


def tree_of(*layers: list[Entry]) -> TreeFile:
    return TreeFile(build_tree(merged(*layers)))


def paths(tree: TreeFile) -> list[str]:
    found, todo = [], [(b"", 1)]
    while todo:
        path, ino = todo.pop()
        for name, child, _ in tree.entries(ino):
            full = path + b"/" + name if path else name
            found.append(full.decode())
            todo.append((full, child))
    return sorted(found)


def test_layer_may_say_nothing() -> None:
    tree = tree_of([], [])
    assert paths(tree) == []
    assert (tree.inode(1).mode, tree.inode(1).nlink, tree.inode(1).mtime_ns) == (0o40755, 2, 0)


def test_implied_directory_keeps_the_lower_directory() -> None:
    tree = tree_of([directory("d", 0o700)], [file("d/f")])
    assert tree.inode(tree.walk(b"d")).mode == 0o40700


def test_directory_entry_after_its_children_in_the_layer() -> None:
    tree = tree_of([file("d/f"), directory("d", 0o711)])
    assert paths(tree) == ["d", "d/f"]
    assert tree.inode(tree.walk(b"d")).mode == 0o40711


def test_file_over_a_directory_removes_what_was_below() -> None:
    assert paths(tree_of([file("d/a/b")], [file("d")])) == ["d"]
    assert paths(tree_of([file("d/a/b"), file("d")])) == ["d"]


def test_directory_over_a_symlink_replaces_it_even_if_listed_after_its_children() -> None:
    lower = [directory("usr/lib"), symlink("lib", "usr/lib")]
    assert paths(tree_of(lower, [file("lib/x"), directory("lib")])) == ["lib", "lib/x", "usr", "usr/lib"]
    assert paths(tree_of(lower, [directory("lib"), file("lib/x")])) == ["lib", "lib/x", "usr", "usr/lib"]


@pytest.mark.parametrize(
    "target", ["usr/lib", "/usr/lib", "../../usr/lib", "./usr//lib/", "via", "usr/../usr/lib"]
)
def test_path_through_a_lower_symlink_stays_inside_the_root(target: str) -> None:
    lower = [file("usr/lib/old"), symlink("lib", target), symlink("via", "usr/lib")]
    assert paths(tree_of(lower, [file("lib/x/y")])) == [
        *("lib", "usr", "usr/lib", "usr/lib/old", "usr/lib/x", "usr/lib/x/y", "via")
    ]


def test_lower_symlink_to_nothing_gets_the_directories_it_names() -> None:
    assert paths(tree_of([symlink("run", "/var/run")], [file("run/pid")])) == [
        "run",
        "var",
        "var/run",
        "var/run/pid",
    ]


def test_symlinks_in_circles_and_to_files_are_replaced_and_reported() -> None:
    lower = [symlink("a", "b"), symlink("b", "a"), symlink("f", "file"), file("file")]
    tree = merged(lower, [file("a/x"), file("f/x")])
    assert paths(TreeFile(build_tree(tree))) == ["a", "a/x", "b", "f", "f/x", "file"]
    assert len(tree.warnings) == 2
    assert "layer 2 of 2: symlink 'a'" in tree.warnings[0]


def test_circle_that_made_directories_on_the_way_leaves_none() -> None:
    tree = tree_of([symlink("a", "new/../a")], [file("a/x")])
    assert paths(tree) == ["a", "a/x"]


def test_symlink_that_the_layer_replaces_is_not_followed_any_more() -> None:
    lower = [file("usr/x"), directory("opt"), symlink("lib", "usr")]
    with pytest.raises(ImageInvalid, match="below 'lib'"):
        merged(lower, [file("lib/a"), symlink("lib", "opt"), file("lib/b")])
    tree = tree_of(lower, [file("lib/a"), symlink("lib", "opt")])
    assert paths(tree) == ["lib", "opt", "usr", "usr/a", "usr/x"]
    assert tree.readlink(tree.walk(b"lib", follow=False)) == b"opt"


def test_whiteout_through_a_lower_symlink() -> None:
    lower = [file("usr/lib/x"), symlink("lib", "usr/lib")]
    assert paths(tree_of(lower, [marker("lib/.wh.x")])) == ["lib", "usr", "usr/lib"]
    assert paths(tree_of(lower, [marker("lib/.wh..wh..opq")])) == ["lib", "usr", "usr/lib"]
    # the layer makes lib a directory of its own: nothing of usr/lib is meant
    assert paths(tree_of(lower, [directory("lib"), marker("lib/.wh..wh..opq")])) == [
        "lib",
        "usr",
        "usr/lib",
        "usr/lib/x",
    ]


def test_whiteout_of_what_is_not_there_does_nothing() -> None:
    upper = [
        marker("no/.wh.x"),
        marker("f/.wh.x"),
        marker("dangling/.wh.x"),
        marker("dangling/no/.wh..wh..opq"),
    ]
    lower = [file("f"), symlink("dangling", "nowhere")]
    assert paths(tree_of(lower, upper)) == ["dangling", "f"]


def test_hostile_whiteouts_have_no_effect() -> None:
    names = [
        ".wh.",
        ".wh..",
        ".wh...",
        "d/.wh.",
        "d/.wh..",
        "d/.wh...",
        "d/.wh..wh.f",
        ".wh..wh.plnk/9.8",
        ".wh..wh..opq/f",
    ]
    lower = [file("d/f"), file("d/.f")]
    assert paths(tree_of(lower, [marker(name) for name in names])) == ["d", "d/.f", "d/f"]


def test_whiteout_of_a_whiteout_name() -> None:
    lower = [file("d/.wh.x/inner")]
    assert paths(tree_of(lower)) == ["d", "d/.wh.x", "d/.wh.x/inner"]


def test_hard_link_keeps_the_file_that_was_there_when_it_was_made() -> None:
    tree = tree_of([file("a", "old"), hardlink("b", "a"), file("a", "new", at=9)])
    assert tree.walk(b"a") != tree.walk(b"b")
    assert [tree.inode(tree.walk(name)).nlink for name in (b"a", b"b")] == [1, 1]


def test_hard_link_to_a_lower_layer_and_its_removal() -> None:
    tree = tree_of([file("a")], [hardlink("b", "a"), hardlink("c", "b")], [marker(".wh.a")])
    assert paths(tree) == ["b", "c"]
    assert tree.walk(b"b") == tree.walk(b"c")
    assert tree.inode(tree.walk(b"b")).nlink == 2


def test_hard_link_replaced_later_in_its_layer() -> None:
    tree = tree_of([file("a")], [hardlink("b", "a"), file("b", "other")])
    assert tree.inode(tree.walk(b"a")).nlink == 1


def test_hard_link_through_a_symlink() -> None:
    tree = tree_of([file("usr/lib/x"), symlink("lib", "usr/lib")], [hardlink("y", "lib/x")])
    assert tree.walk(b"y") == tree.walk(b"usr/lib/x")


def test_parent_of_a_hard_linked_file_is_one_of_its_directories() -> None:
    tree = tree_of([file("a/x"), hardlink("b/x", "a/x")])
    assert tree.parent(tree.walk(b"b/x")) in (tree.walk(b"a"), tree.walk(b"b"))


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([hardlink("a", "b"), hardlink("b", "c"), hardlink("c", "a")], "itself"),
        ([hardlink("a", "a")], "itself"),
        ([hardlink("a", "gone")], "not there"),
        ([hardlink("a", "gone/x")], "not there"),
        ([directory("d"), hardlink("a", "d")], "directory"),
        ([hardlink("a", "")], "directory"),
        ([file("f"), file("f/x")], "below 'f'"),
        ([symlink("s", "/etc"), file("s/passwd")], "below 's'"),
        ([file("f"), hardlink("h", "f"), file("h/x")], "below 'h'"),
        ([hardlink("h", "f"), file("h/x"), file("f")], "below 'h'"),
        ([file("")], "root"),
        ([symlink("", "etc")], "root"),
    ],
)
def test_layer_that_contradicts_itself_is_refused(entries: list[Entry], what: str) -> None:
    with pytest.raises(ImageInvalid, match=what):
        merged([file("old")], entries)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ImageInvalid, match="socket"):
        tree_of([Entry(name=b"s", kind="socket")])


@pytest.mark.parametrize("number", [{"mtime": 2**63}, {"uid": 2**32}, {"gid": -1}, {"size": 2**64}])
def test_numbers_beyond_their_width_are_refused(number: dict[str, int]) -> None:
    with pytest.raises(ImageInvalid, match="beyond what file systems hold"):
        tree_of([Entry(name=b"f", kind="reg", **number)])


def test_attributes_of_overlayfs_are_data() -> None:
    tree = tree_of([file("d/x")], [directory("d", xattrs={b"trusted.overlay.opaque": b"y"})])
    assert paths(tree) == ["d", "d/x"]
    assert tree.xattrs(tree.walk(b"d")) == {b"trusted.overlay.opaque": b"y"}


def test_equal_files_of_an_image_share_one_place() -> None:
    tree = tree_of([file("a", "same"), file("b", "other", at=5)], [file("a", "same", mode=0o755)])
    assert len(tree.segments) == 2
    same = tree_of([file("a", "same"), file("b", "same", at=5)], [file("c", "same", mode=0o755)])
    assert len({same.extent(same.walk(name)) for name in (b"a", b"b", b"c")}) == 1
    assert len(same.segments) == 1
    assert same.inode(same.walk(b"c")).mode == 0o100755


def test_file_that_another_segment_holds_is_referred_to_there() -> None:
    entries = [file("one", "one"), file("two", "two", chunk_count=3, at=10), file("three", "three", at=20)]
    other = Digest.of(b"other")
    places = {
        content_key(entries[0].chunks): FileRef(other, 8192, 7, 1),
        content_key(entries[1].chunks): FileRef(other, 40960, 9, 3),
    }
    asked: list[bytes] = []

    def shared(keys: list[bytes]) -> dict[bytes, FileRef]:
        asked.extend(keys)
        return {key: places[key] for key in keys if key in places}

    tree = TreeFile(build_tree(merged(entries), shared_files=shared, info=b"kept"))
    assert sorted(asked) == sorted(content_key(entry.chunks) for entry in entries)
    one, two, three = (tree.extent(tree.walk(name)) for name in (b"one", b"two", b"three"))
    assert tree.segments[one.segment] == tree.segments[two.segment] == other
    assert (one[1:], two[1:]) == ((8192, 7, 1), (40960, 9, 3))
    assert tree.segments[three.segment] != other
    assert tree.info == b"kept"


def test_content_key_tells_cuts_apart() -> None:
    whole, halves = file("x", "a").chunks, file("x", "a", chunk_count=2).chunks
    assert content_key(whole) == whole[0].digest
    assert content_key(halves) != content_key(halves[::-1])


def test_file_made_of_another_files_digests_does_not_take_its_place() -> None:
    victim = file("victim", chunk_count=2)
    for size_format in ("<Q", ">Q"):
        content = b"".join(struct.pack(size_format, chunk.size) + chunk.digest for chunk in victim.chunks)
        assert content_key(victim.chunks) != hashlib.sha256(content).digest()
    key = content_key(victim.chunks)
    tree = TreeFile(
        build_tree(merged([victim]), shared_files=lambda keys: {key: FileRef(Digest.of(b""), 0, 0, 1)})
    )
    assert tree.extent(tree.walk(b"victim")).chunk_count == 2


def test_deep_trees_need_no_recursion() -> None:
    deep = b"/".join([b"d"] * 100_000)
    tree = TreeFile(
        build_tree(
            merge_layers(
                [
                    layer(Entry(name=deep + b"/f", kind="fifo")),
                    layer(
                        Entry(name=deep + b"/.wh.f", kind="reg"),
                        Entry(name=deep + b"/h", kind="hardlink", link=b"x"),
                    ),
                ][:1]
            )
        )
    )
    assert tree.inode_count == 100_002
    assert tree.walk(deep + b"/f") == tree.inode_count


def test_chain_of_hard_links_in_the_worst_order_takes_linear_time() -> None:
    count = 50_000
    started = time.process_time()
    chain = [hardlink(f"l{n}", f"l{n + 1}") for n in range(count)]
    tree = tree_of([*chain, file(f"l{count}")])
    assert tree.inode(2).nlink == count + 1
    assert time.process_time() - started < 5


def test_symlinks_that_would_take_hours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "LINK_STEPS_MAX", 5_000)
    lower = [directory("d"), symlink("s0", "./" * 50 + "d")] + [
        symlink(f"s{n}", f"s{n - 1}") for n in range(1, 39)
    ]
    upper = [entry for n in range(200) for entry in (directory(f"s38/n{n}"), file(f"s38/n{n}"))]
    assert "d/n1" in paths(tree_of(lower, upper[:20]))
    with pytest.raises(ImageInvalid, match="too many symlinks"):
        merged(lower, upper)


def test_file_that_its_segment_has_no_place_for_is_refused() -> None:
    placeless = layer(file("f"))._replace(extents={})
    with pytest.raises(ImageInvalid, match="no place"):
        build_tree(merge_layers([placeless]))
