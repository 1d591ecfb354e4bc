"""JSON documents of strangers, read strictly: what two readers could understand differently is refused.

For manifests, indexes, configs and credential files. Duplicate keys, NaN, byte order marks, trailing data,
lone surrogates and endless nesting raise ImageInvalid naming `where`; an HTML page says that it is one.
(TOCs have their own, faster reader.)
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from p2pgz.errors import ImageInvalid

MAX_INTEGER_DIGITS = (
    20  # int64 has 19; int() refuses above 4300 with an error of its own, and is quadratic before
)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_strict(data: bytes, *, where: str) -> Any:
    """The value of a JSON document;

    raises ImageInvalid for anything that is not exactly one unambiguous value.
    """
    if data.lstrip()[:1] == b"<":
        raise ImageInvalid(
            f"{where}: an HTML or XML page instead of JSON: {data.strip()[:60]!r}",
            hint="a proxy, a login page or a web server answers in place of the registry",
        )
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_int=_parse_int, parse_constant=_refuse_constant
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    except UnicodeError as error:
        raise ImageInvalid(f"{where}: not UTF-8") from error
    except RecursionError as error:
        raise ImageInvalid(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise ImageInvalid(f"{where}: not JSON: {str(error)[:120]}") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add() is None
        raise ValueError(f"the key {double[:60]!r} stands twice in one object")
    return found


def _parse_int(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
