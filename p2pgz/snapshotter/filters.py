"""containerd's filter language, as `List` takes it: `labels."a/b"==c,parent==""`, `kind!=view`, `name~=^sha256`.

Called by the service for each List. Pure; what cannot be parsed is a SnapshotError with INVALID_ARGUMENT. The selectors of
one filter must all match, of several filters any one. An operator and value may be missing: the field must then exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from p2pgz.errors import SnapshotError

# Nobody sends more than one with a few selectors; a regular expression of a stranger may not be a program
MAX_FILTERS: Final = 64
MAX_LETTERS: Final = 16_384
MAX_PATTERN_LETTERS: Final = 256

FieldOf = Callable[[tuple[str, ...]], str | None]
"""the value of a field by its path; None when it does not exist"""

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_ALTERNATIVE = re.compile(r"/[^/\n]*/|\|[^|\n]*\|")  # for patterns, which have quotes and backslashes in them
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r'[^\s,"]+')
_HEX_ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})")


class Selector(NamedTuple):
    """One condition; no `operator`: the field exists."""

    path: tuple[str, ...]
    operator: str
    value: str
    pattern: re.Pattern[str] | None = None

    def matches(self, field: FieldOf) -> bool:
        """Whether an object, seen through `field`, meets it."""
        found = field(self.path)
        if self.pattern is not None:
            return self.pattern.search(found or "") is not None
        if self.operator == "==":
            return found == self.value
        if self.operator == "!=":
            return (found or "") != self.value
        return found is not None


Filter = tuple[Selector, ...]


def parse_filters(texts: Sequence[str]) -> list[Filter]:
    """The filters of one request; none: everything matches."""
    if len(texts) > MAX_FILTERS or sum(map(len, texts)) > MAX_LETTERS:
        raise _refused("too many or too long filters", "")
    return [_Parser(text).filter() if text else () for text in texts]


def matches(filters: Sequence[Filter], field: FieldOf) -> bool:
    """Whether an object meets any of the filters."""
    return not filters or any(all(selector.matches(field) for selector in one) for one in filters)


def _refused(what: str, text: str) -> SnapshotError:
    return SnapshotError("INVALID_ARGUMENT", f"filter {text[:200]!r}: {what}")


class _Parser:
    """Walks over one filter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def filter(self) -> Filter:
        selectors = [self._selector()]
        while self._at < len(self._text):
            self._expect(",")
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._field())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return Selector(tuple(path), "", "")
        operator = self._take(_OPERATOR)
        if operator not in ("==", "!=", "~="):
            raise self._error("an operator (== != ~=) is expected")
        value = self._quoted()
        if value is None and operator == "~=" and (raw := self._take(_ALTERNATIVE)) is not None:
            value = raw[1:-1]
        if value is None:
            value = self._take(_VALUE)
        if value is None:
            raise self._error("a value is expected")
        return Selector(tuple(path), operator, value, self._pattern(value) if operator == "~=" else None)

    def _pattern(self, text: str) -> re.Pattern[str]:
        if len(text) > MAX_PATTERN_LETTERS:
            raise self._error("the pattern is too long")
        try:
            return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._error(f"not a pattern: {error}") from error

    def _field(self) -> str:
        quoted = self._quoted()
        found = quoted if quoted is not None else self._take(_FIELD)
        if found is None:
            raise self._error("a field is expected")
        return found

    def _quoted(self) -> str | None:
        raw = self._take(_QUOTED)
        if raw is None:
            return None
        try:  # Go's quoting is JSON's, but for \\x
            text: str = json.loads(_HEX_ESCAPE.sub(r"\\u00\1", raw))
        except ValueError as error:
            raise self._error("wrong quoting") from error
        return text

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _expect(self, letter: str) -> None:
        if not self._text.startswith(letter, self._at):
            raise self._error(f"{letter!r} is expected")
        self._at += 1

    def _error(self, what: str) -> SnapshotError:
        return _refused(f"{what} at letter {self._at + 1}", self._text)
