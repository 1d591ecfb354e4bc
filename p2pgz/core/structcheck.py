"""Everything that is wrong with a document that is to become a struct, not the first thing only. Called by `config`.

msgspec stops at the first mistake; people would mend one, start, and meet the next. The types are msgspec's, and so are the
rules: each value by itself is converted by it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

VALUE_MAX_CHARACTERS: Final = 60
_WORDS: Final = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}
_AT: Final = re.compile(r" - at `\$\[(\d+)\]`$")
_UNITS: Final = {"_bytes": "bytes", "_bytes_per_second": "bytes a second", "_seconds": "seconds"}


class Mistake(NamedTuple):
    """One thing that is wrong: where, what, and what would be right."""

    key: str
    message: str
    hint: str = ""


def mistakes(document: Mapping[str, Any], shape: type[msgspec.Struct], prefix: str = "") -> list[Mistake]:
    """All that keeps the document from becoming a `shape`, in the document's order."""
    fields = {field.name: field for field in msgspec.structs.fields(shape)}
    found: list[Mistake] = []
    for name, value in document.items():
        key = prefix + name
        field = fields.get(name)
        if field is None:
            close = difflib.get_close_matches(name, fields, n=1)
            found.append(Mistake(key, "no such key", f"did you mean {prefix + close[0]}?" if close else ""))
            continue
        found += _mistakes_of(key, value, field.type)
    missing = [name for name, field in fields.items() if field.required and name not in document]
    return found + [Mistake(prefix + name, "is missing") for name in missing]


def _mistakes_of(key: str, value: Any, wanted: Any) -> list[Mistake]:
    info = msgspec.inspect.type_info(wanted)
    if isinstance(info, msgspec.inspect.StructType):
        if isinstance(value, Mapping):
            return mistakes(value, info.cls, f"{key}.")
        return [Mistake(key, f"is a table, not {_shown(value)}", f"write [{key}] and its keys below it")]
    if isinstance(info, msgspec.inspect.ListType) and isinstance(info.item_type, msgspec.inspect.StructType):
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            return [
                Mistake(
                    key, f"is a list of tables, not {_shown(value)}", f"write [[{key}]] and its keys below it"
                )
            ]
        shape = info.item_type.cls
        return [found for n, item in enumerate(value) for found in mistakes(item, shape, f"{key}[{n}].")]
    if isinstance(info, msgspec.inspect.LiteralType):
        allowed = ", ".join(map(str, info.values))
        return [] if value in info.values else [Mistake(key, f"{_shown(value)}: expected one of {allowed}")]
    try:
        msgspec.convert(value, wanted, strict=False)
    except msgspec.ValidationError as error:
        return [Mistake(key, f"{_shown(value)}: {_in_words(str(error))}", _unit_hint(key, value))]
    return []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_MAX_CHARACTERS else f"{text[:VALUE_MAX_CHARACTERS]}…"


def _in_words(text: str) -> str:
    """msgspec's message for people who write TOML."""
    text = _AT.sub(lambda match: f" (item {int(match[1]) + 1})", text)
    for name, words in _WORDS.items():
        text = text.replace(f"`{name}`", words)
    return text[:1].lower() + text[1:]


def _unit_hint(key: str, value: Any) -> str:
    """A number with a unit, where there must be none."""
    if isinstance(value, str):
        for ending in sorted(_UNITS, key=len, reverse=True):
            if key.endswith(ending):
                return f"a number of {_UNITS[ending]}, without a unit"
    return ""


def without(document: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """The document without these keys; of a list of tables with a mistake, without all of it."""
    kept: dict[str, Any] = {}
    for name, value in document.items():
        key = prefix + name
        if key in keys or any(other.startswith(f"{key}[") for other in keys):
            continue
        kept[name] = without(value, keys, f"{key}.") if isinstance(value, Mapping) else value
    return kept
