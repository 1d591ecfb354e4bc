"""Which entries of a layer its TOC lists: names that come twice, and directories that become something else."""

import random
import time

import pytest

from p2pgz.convert.tocwriter import Written, settle
from p2pgz.convert.writer import plain_header
from p2pgz.core.tarfields import clean_name


def entry(name: bytes, kind: str = "reg") -> Written:
    header = plain_header(name, 0)
    header.kind = kind
    return Written(header, clean_name(name), [])


def listed(*entries: Written) -> list[bytes]:
    return [name for name, _ in settle(list(entries)) if name is not None]


def survivors(entries: list[Written]) -> list[bytes]:
    """What an unpacker keeps that replaces whatever is in the way."""
    tree: dict[bytes, Written] = {}
    for written in entries:
        if written.header.kind != "dir":
            for name in [name for name in tree if name.startswith(written.name + b"/")]:
                del tree[name]
        tree[written.name] = written
    return [written.header.name for written in entries if tree.get(written.name) is written]


@pytest.mark.parametrize("seed", range(60))
def test_entries_listed_are_those_that_unpacking_leaves(seed: int) -> None:
    choose = random.Random(seed)
    entries = []
    for _ in range(choose.randrange(1, 25)):
        depth = choose.randrange(1, 5)
        name = b"/".join(choose.choice([b"a", b"b", b"a-", b"a.b", b"ab"]) for _ in range(depth))
        entries.append(entry(name, choose.choice(["dir", "dir", "reg", "symlink"])))
    assert listed(*entries) == survivors(entries), seed


def test_file_that_is_a_directory_again_in_the_end_has_lost_what_was_in_it() -> None:
    entries = [entry(b"d/", "dir"), entry(b"d/x"), entry(b"d"), entry(b"d/", "dir"), entry(b"d/y")]
    assert listed(*entries) == [b"d/", b"d/y"]


def test_ancestor_covers_what_lies_deeper_than_its_own_children() -> None:
    assert listed(entry(b"a/b/c"), entry(b"a-b/c"), entry(b"a")) == [b"a-b/c", b"a"]


def test_cost_does_not_grow_with_depth() -> None:
    """Hostile layers: paths of the same length, in a few directories or in thousands, one of which becomes a file."""

    def seconds(component: bytes) -> float:
        deep = component * (32_000 // len(component))
        entries = [entry(b"%s%d" % (deep, number)) for number in range(1_000)]
        entries += [entry(b"other/f"), entry(deep[:-1])]
        begin = time.perf_counter()
        assert listed(*entries) == [b"other/f", deep[:-1]]
        return time.perf_counter() - begin

    seconds(b"d/")
    flat = min(seconds(b"d" * 3_999 + b"/") for _ in range(3))
    assert min(seconds(b"d/") for _ in range(3)) < 20 * flat  # a walk up each path took 1 000 times as long
