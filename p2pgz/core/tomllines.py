"""On which line of a TOML text each key stands, for messages about it. Called by `config` with texts that tomllib has read.

tomllib says nothing about places. This looks for lines that begin like a header or a key; inside of multi-line strings and
arrays there are none. Whatever is not found has no line, which costs a message its line number and nothing else.
"""

from __future__ import annotations

import re
from typing import Final

_PART: Final = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_NAME: Final = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_NAME})\s*\]")
_KEY: Final = re.compile(rf"\s*({_NAME})\s*=(.*)")
_ONE_PART: Final = re.compile(_PART)
_STRINGS: Final = re.compile(r'"""|' + r"'''|" + r'"(?:[^"\\]|\\.)*"' + r"|'[^']*'|#.*")


def key_lines(text: str) -> dict[str, int]:
    """`pool.quota_bytes`, `mounts[1].directory` → number of the line; tables and their items as well."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    open_string, depth = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if not open_string and not depth:
            if header := _HEADER.match(line):
                table = _dotted(header[2])
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                    found.setdefault(table, number)
                    table = f"{table}[{counts[table]}]"
                found.setdefault(table, number)
                continue
            key = _KEY.match(line)
            if key is None:
                continue
            found.setdefault(f"{table}.{_dotted(key[1])}" if table else _dotted(key[1]), number)
            line = key[2]
        open_string, depth = _state_after(line, open_string, depth)
    return found


def _dotted(name: str) -> str:
    return ".".join(part.strip("\"'") for part in _ONE_PART.findall(name))


def _state_after(line: str, open_string: str, depth: int) -> tuple[str, int]:
    """The multi-line string that is open at the end of a line, and how many brackets are."""
    while True:
        if open_string:
            _, closed, line = line.partition(open_string)
            if not closed:
                return open_string, depth
            open_string = ""
        token = _STRINGS.search(line)
        plain = line[: token.start()] if token else line
        depth = max(0, depth + sum(plain.count(c) for c in "[{") - sum(plain.count(c) for c in "]}"))
        if token is None:
            return "", depth
        line = line[token.end() :]
        if token[0] in ('"""', "'''"):
            open_string = token[0]
