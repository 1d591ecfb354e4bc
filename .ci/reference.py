"""Writes the parts of docs/reference/ that the code knows best, between `<!-- generated: NAME -->` and `<!-- end -->`.

`make docs` writes them; with `--check` nothing is written and the status says whether a page is out of date
(tests/docs/test_docs.py does the same). Text outside the markers is written by hand and left alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from p2pgz import cli, config, errors
from p2pgz.node.live import AT_ONCE
from p2pgz.web import api
from p2pgz.web.metrics import METRICS

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
# every command takes them: they stand in the section of `p2pgz` alone
SHARED_OPTIONS = {option.name for option in cli.cli.params} - {"version"}
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command with its full name: groups first, then what is in them."""
    root = click.Context(cli.cli, info_name="p2pgz", auto_envvar_prefix="P2PGZ")
    yield "p2pgz", cli.cli, root
    for name in cli.cli.list_commands(root):
        command = cli.cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root)
        yield f"p2pgz {name}", command, context
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                below = command.get_command(context, inner)
                assert below is not None
                yield f"p2pgz {name} {inner}", below, click.Context(below, info_name=inner, parent=context)


def prose(text: str) -> str:
    """A docstring as Markdown: paragraphs on one line, click's unwrapped blocks as code."""
    parts = []
    for paragraph in text.strip().split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        unwrapped = lines[0] == "\b"
        parts.append("\n".join(f"    {line}" for line in lines[1:]) if unwrapped else " ".join(lines))
    return "\n\n".join(parts)


def cli_block() -> list[str]:
    """One section for each command: usage, what it does, options."""
    lines: list[str] = []
    for name, command, context in commands():
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"### `{name}`", "", f"    {name} {usage}".rstrip(), "", prose(command.help or ""), ""]
        own = [p for p in command.params if command is cli.cli or p.name not in SHARED_OPTIONS]
        rows = [row for p in own if isinstance(p, click.Option) and (row := option_row(p, context))]
        if rows:
            lines += [*table(("option", "meaning", "environment variable"), rows), ""]
    return lines


def option_row(option: click.Option, context: click.Context) -> tuple[str, str, str] | None:
    """One row of a command's table; None for an option that is no part of the interface."""
    if option.hidden:
        return None
    record = option.get_help_record(context)
    assert record is not None
    spelled, meaning = record
    return f"`{spelled}`", meaning.strip(), f"`{name}`" if (name := variable(option, context)) else ""


def variable(option: click.Option, context: click.Context) -> str:
    """The environment variable of an option, or nothing."""
    if isinstance(option.envvar, str):
        return option.envvar
    if option.name in ("help", "version") or context.auto_envvar_prefix is None:
        return ""
    return f"{context.auto_envvar_prefix}_{(option.name or '').upper()}"


def config_block() -> list[str]:
    """One table for each section of the configuration, and for each list of tables."""
    lines: list[str] = []
    default = config.Config()
    for field, doc in zip(
        msgspec.structs.fields(config.Config), config._field_docs(config.Config), strict=True
    ):
        section = getattr(default, field.name)
        if isinstance(section, msgspec.Struct):
            lines += [f"### `[{field.name}]`", "", one_line(type(section).__doc__), ""]
            lines += [*key_table(field.name, section), ""]
        elif isinstance(section, list) and (shape := item_struct(field.type)) is not None:
            lines += [f"### `[[{field.name}]]`", "", one_line(shape.__doc__), "", one_line(doc), ""]
            keys = zip(msgspec.structs.fields(shape), config._field_docs(shape), strict=True)
            rows = [(f"`{key.name}`", type_name(key.type), one_line(doc)) for key, doc in keys]
            lines += [*table(("key", "type", "meaning"), rows), ""]
    return lines


def key_table(name: str, section: msgspec.Struct) -> list[str]:
    """The keys of one section."""
    keys = zip(msgspec.structs.fields(type(section)), config._field_docs(type(section)), strict=True)
    rows = [
        (
            f"`{key.name}`",
            type_name(key.type),
            f"`{config._toml(getattr(section, key.name))}`",
            one_line(doc),
            "at once" if f"{name}.{key.name}" in AT_ONCE else "at start",
            f"`P2PGZ_{name.upper()}__{key.name.upper()}`",
        )
        for key, doc in keys
    ]
    return table(("key", "type", "default", "meaning", "changes", "environment variable"), rows)


def one_line(text: str | None) -> str:
    """A docstring as it fits into a table."""
    return " ".join((text or "").split())


def item_struct(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a list holds, if it does."""
    item = getattr(msgspec.inspect.type_info(kind), "item_type", None)
    return item.cls if isinstance(item, msgspec.inspect.StructType) else None


def type_name(kind: Any) -> str:
    """How a type is written for people who write TOML."""
    info = msgspec.inspect.type_info(kind)
    inner = getattr(info, "type", info)
    names = {
        msgspec.inspect.StrType: "text",
        msgspec.inspect.BoolType: "true or false",
        msgspec.inspect.IntType: "integer",
        msgspec.inspect.FloatType: "number",
        msgspec.inspect.ListType: "list",
    }
    if isinstance(inner, msgspec.inspect.UnionType):
        return " or ".join(names.get(type(item), "table") for item in inner.types)
    if isinstance(inner, msgspec.inspect.LiteralType):
        return " or ".join(config._toml(value) for value in inner.values)
    name = names.get(type(inner), "table")
    if (least := getattr(inner, "ge", None)) is not None:
        return f"{name} ≥ {least}"
    if (above := getattr(inner, "gt", None)) is not None:
        return f"{name} > {above}"
    if isinstance(inner, msgspec.inspect.ListType):
        return f"list of {type_name_of(inner.item_type, names)}"
    return name


def type_name_of(info: Any, names: dict[type, str]) -> str:
    """The plural for a list's items."""
    return {"text": "texts", "integer": "integers", "number": "numbers"}.get(
        names.get(type(info), ""), "tables"
    )


def default_block() -> list[str]:
    """What `p2pgz config default` prints."""
    return ["```toml", config.dump_default().rstrip(), "```"]


def request_block() -> list[str]:
    """The fields of each request of the control API."""
    lines: list[str] = []
    for name, shape in vars(api).items():
        if not (name.endswith("Request") and isinstance(shape, type) and issubclass(shape, msgspec.Struct)):
            continue
        lines += [f"**{name}**: {one_line(shape.__doc__)}", ""]
        rows = [
            (
                f"`{field.name}`",
                "required"
                if field.default is msgspec.NODEFAULT
                else f"`{msgspec.json.encode(field.default).decode()}`",
            )
            for field in msgspec.structs.fields(shape)
        ]
        lines += [*table(("field", "default"), rows), ""] if rows else ["No fields.", ""]
    return lines


def metric_block() -> list[str]:
    """One row for each metric."""
    rows = []
    for metric in METRICS:
        labels = [
            f"`{name}`" + (": " + ", ".join(values) if values else "")
            for name, values in metric.labels.items()
        ]
        rows.append((f"`{metric.full_name}`", metric.kind, metric.meaning, "; ".join(labels)))
    return table(("metric", "kind", "meaning", "labels"), rows)


def error_classes() -> list[type[errors.P2pgzError]]:
    """The tree of errors, base first, in the order of the source."""
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.P2pgzError)
    ]


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "commands": cli_block,
    "config": config_block,
    "default-file": default_block,
    "requests": request_block,
    "metrics": metric_block,
}


def rendered(text: str) -> str:
    """A page with its generated parts made anew."""

    def make(match: re.Match[str]) -> str:
        return f"{match[1]}\n" + "\n".join(BLOCKS[match[2]]()).strip() + f"\n\n{match[3]}"

    return BLOCK.sub(make, text)


def main() -> int:
    """Write the pages, or with --check only say which are out of date."""
    stale = []
    for path in sorted(REFERENCE.glob("*.md")):
        text = path.read_text("utf-8")
        fresh = rendered(text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(fresh, "utf-8")
    if "--check" not in sys.argv:
        print("written:", ", ".join(stale) or "nothing, all pages were up to date")
        return 0
    if stale:
        print("out of date, run `make docs`:", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
