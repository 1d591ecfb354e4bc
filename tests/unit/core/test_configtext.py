"""What a configuration file says where, and everything that is wrong with it at once."""

from __future__ import annotations

import tomllib
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.structcheck import Mistake, mistakes, without
from p2pgz.core.tomllines import key_lines

TEXT = '''version = 1
# a = comment
[pool]
quota_bytes = "8GB"   # key = no
text = """
inside = 1
[not.a.header]
""" # closed
"quoted" = 'x = [1'
a.b = 2
list = [
  "x = 1",
  [1,
   2], { y = 3 },
]
single = \'\'\'
also = inside\'\'\'
after = "esc \\" ] = "

  [ deep . "er" ]
x=1
[[mounts]]
directory = "/a"
[[mounts]]
directory = "/b"
'''


def test_keys_are_found_on_their_lines():
    assert key_lines(TEXT) == {
        "version": 1,
        "pool": 3,
        "pool.quota_bytes": 4,
        "pool.text": 5,
        "pool.quoted": 9,
        "pool.a.b": 10,
        "pool.list": 11,
        "pool.single": 16,
        "pool.after": 18,
        "deep.er": 20,
        "deep.er.x": 21,
        "mounts": 22,
        "mounts[0]": 22,
        "mounts[0].directory": 23,
        "mounts[1]": 24,
        "mounts[1].directory": 25,
    }
    assert set(tomllib.loads(TEXT)["pool"]) == {
        "quota_bytes",
        "text",
        "quoted",
        "a",
        "list",
        "single",
        "after",
    }


@given(st.text(alphabet="ab=[]{}\"'#.\n \\", max_size=80))
def test_any_text_has_lines_or_none(text):
    assert all(1 <= number <= text.count("\n") + 1 for number in key_lines(text).values())


class Item(msgspec.Struct, frozen=True):
    name: str
    mode: Literal["a", "b"] = "a"


class Table(msgspec.Struct, frozen=True):
    flag: bool = False
    size_bytes: int = 0
    wait_seconds: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    texts: list[str] = []


class Whole(msgspec.Struct, frozen=True):
    table: Table = Table()
    items: list[Item] = []
    either: int | str = 0


def test_a_right_document_has_no_mistakes():
    document = {
        "table": {"flag": True, "size_bytes": "7", "texts": ["x"]},
        "items": [{"name": "n"}],
        "either": "x",
    }
    assert mistakes(document, Whole) == []
    msgspec.convert(document, Whole, strict=False)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"tablet": {}}, [Mistake("tablet", "no such key", "did you mean table?")]),
        ({"zzz": 1}, [Mistake("zzz", "no such key")]),
        ({"table": 1}, [Mistake("table", "is a table, not 1", "write [table] and its keys below it")]),
        (
            {"items": 1},
            [Mistake("items", "is a list of tables, not 1", "write [[items]] and its keys below it")],
        ),
        (
            {"items": [1]},
            [Mistake("items", "is a list of tables, not [1]", "write [[items]] and its keys below it")],
        ),
        ({"items": [{"mode": "a"}]}, [Mistake("items[0].name", "is missing")]),
        ({"items": [{"name": "n", "mode": "c"}]}, [Mistake("items[0].mode", "'c': expected one of a, b")]),
        (
            {"table": {"flag": "maybe"}},
            [Mistake("table.flag", "'maybe': expected true or false, got a text")],
        ),
        (
            {"table": {"size_bytes": "8GB"}},
            [
                Mistake(
                    "table.size_bytes",
                    "'8GB': expected a whole number, got a text",
                    "a number of bytes, without a unit",
                )
            ],
        ),
        ({"table": {"wait_seconds": 0}}, [Mistake("table.wait_seconds", "0: expected a number > 0.0")]),
        (
            {"table": {"texts": ["x", 5]}},
            [Mistake("table.texts", "['x', 5]: expected a text, got a whole number (item 2)")],
        ),
        (
            {"table": {"flag": "x" * 99}},
            [Mistake("table.flag", f"'{'x' * 59}…: expected true or false, got a text")],
        ),
    ],
)
def test_each_mistake_says_where_and_what(document, expected):
    assert mistakes(document, Whole) == expected
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(document, msgspec.defstruct("Strict", [("x", Whole)]), strict=False)


def test_all_are_found_at_once_and_what_is_left_is_right():
    document = {
        "table": {"flag": "maybe", "size": 1, "size_bytes": 2},
        "items": [{"mode": "c"}, {"name": "n"}],
        "either": 1,
    }
    found = {mistake.key for mistake in mistakes(document, Whole)}
    assert found == {"table.flag", "table.size", "items[0].mode", "items[0].name"}
    left = without(document, found)
    assert left == {"table": {"size_bytes": 2}, "either": 1}
    assert mistakes(left, Whole) == []
