"""containerd's filter language: what its clients send, and what nobody should."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.errors import SnapshotError
from p2pgz.snapshotter.filters import MAX_FILTERS, matches, parse_filters

FIELDS = {
    ("name",): "sha256:aa",
    ("parent",): "",
    ("kind",): "committed",
    ("labels", "containerd.io/snapshot.ref"): "sha256:aa",
    ("labels", "plain"): 'a "quoted" one',
}


def matching(*texts: str) -> bool:
    return matches(parse_filters(texts), FIELDS.get)


@pytest.mark.parametrize(
    "text",
    [
        "",
        'labels."containerd.io/snapshot.ref"==sha256:aa,parent==""',  # what containerd asks after ALREADY_EXISTS
        "name==sha256:aa",
        "name~=^sha256:",
        "name~=/^sha256:a+$/",
        "kind!=view",
        "labels.plain",
        r'labels.plain=="a \"quoted\" one"',
        r'name=="sha256\x3aaa"',
        "labels.missing!=anything",
        'labels."containerd.io/snapshot.ref"',
    ],
)
def test_what_matches(text: str) -> None:
    assert matching(text)


@pytest.mark.parametrize(
    "text",
    [
        "name==sha256:a",
        "kind==view",
        "labels.missing",
        "name==sha256:aa,kind==view",
        "name~=^aa",
        'parent=="x"',
        "size==1",
    ],
)
def test_what_does_not_match(text: str) -> None:
    assert not matching(text)


def test_of_several_filters_one_is_enough_and_none_means_all() -> None:
    assert matching("kind==view", "kind==committed")
    assert matching()


@pytest.mark.parametrize(
    "text",
    [
        "==",
        "name=",
        "name===",
        "name==a b",
        "name==a,",
        ",",
        'name=="open',
        "name..x",
        "1name",
        "name~=(",
        "name=~a",
        'name=="\\q"',
    ],
)
def test_what_cannot_be_parsed_is_an_invalid_argument(text: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        matching(text)
    assert caught.value.status == "INVALID_ARGUMENT"


def test_too_many_and_too_long_ones_are_refused() -> None:
    for texts in (["name"] * (MAX_FILTERS + 1), ["name==" + "a" * 20_000], ["name~=" + "a" * 300]):
        with pytest.raises(SnapshotError):
            parse_filters(texts)


@given(st.text(alphabet='nam.e=!~,"\\/|x1 \n(', max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(SnapshotError):
        matching(text)
