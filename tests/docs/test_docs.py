"""The reference pages say all there is: commands, options, keys, fields, errors, exit codes, limits. Links are right."""

from __future__ import annotations

import ast
import errno
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import msgspec
import pytest

from p2pgz import errors
from p2pgz.core import footer, media, model, tar, toc, toc_entries, toc_fields, toc_schema
from p2pgz.pool import index
from p2pgz.web import api

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
# README and CHANGELOG count as pages too; the changelog's own head is the only part we know beforehand
TREE_IS_HERE = pytest.mark.skipif(not DOCS.is_dir(), reason="documentation is not part of what is installed")

pytestmark = TREE_IS_HERE


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def text_of(name: str) -> str:
    return (REFERENCE / name).read_text("utf-8")


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.md")), ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    text = path.read_text("utf-8")
    assert load_generator().rendered(text) == text, f"{path.name}: run `make docs`"


def test_every_command_option_key_and_request_is_generated() -> None:
    marks = {
        name
        for path in REFERENCE.glob("*.md")
        for name in re.findall(r"generated: ([a-z-]+)", path.read_text())
    }
    assert marks == set(load_generator().BLOCKS)


def test_every_option_says_what_it_means() -> None:
    silent = []
    for name, command, context in load_generator().commands():
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.param_type_name != "option":
                continue
            _, meaning = parameter.get_help_record(context)  # type: ignore[misc]  # hidden ones are out
            if not re.sub(r"\[[^\]]*\]", "", meaning).strip():
                silent.append(f"{name} {parameter.opts[0]}")
    assert silent == []


def test_every_error_class_has_its_row() -> None:
    text = text_of("exit-codes.md")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]):
            rows[name] = cells[1:]
    expected = {
        cls.__name__: [
            str(cls.exit_code),
            errno.errorcode[cls.errno_value],
            "yes" if cls.retryable else "no",
        ]
        for cls in load_generator().error_classes()
    }
    assert {name: rows.get(name) for name in expected} == expected


def test_every_exit_code_is_explained() -> None:
    codes = {cls.exit_code for cls in load_generator().error_classes()} | {0, 130, 143}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of("exit-codes.md"), re.MULTILINE)}
    assert documented == codes


def test_every_endpoint_is_documented() -> None:
    text = text_of("control-api.md")
    routes = [(route.path, next(iter(route.methods - {"HEAD"}))) for route in api.create_app(Mock()).routes]
    assert [f"{method} {path}" for path, method in routes if f"`{method} {path}`" not in text] == []


def test_every_table_of_the_index_is_documented() -> None:
    text = text_of("disk-format.md")
    schema = re.sub(r"--.*", "", index._SCHEMA)
    tables = re.findall(r"CREATE TABLE (\w+)\((.*?)\)(?: WITHOUT ROWID)?;", schema, re.DOTALL)
    assert len(tables) >= 9
    for table, body in tables:
        section = re.search(rf"^\| `{table}` \|(.*)$", text, re.MULTILINE)
        assert section is not None, f"table {table}"
        columns = [part.split()[0] for part in re.split(r",\s*(?![^()]*\))", body.strip())]
        names = [name for name in columns if name.split("(")[0] not in ("PRIMARY", "UNIQUE")]
        missing = [name for name in names if not re.search(rf"\b{name}\b", section[1])]
        assert missing == [], f"columns of {table}"


def documented_limits() -> dict[str, str]:
    return dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", text_of("formats.md"), re.MULTILINE))


def as_number(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KiB|MiB|GiB|TiB|B)?", text.replace(" ", ""))
    assert match is not None, text
    return int(match[1]) << {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}.get(match[2] or "", 0)


def test_limits_of_the_formats_are_what_the_code_has() -> None:
    modules = (footer, media, model, tar, toc, toc_entries, toc_fields, toc_schema)
    actual: dict[str, int] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("MAX_") and isinstance(value, int):
                actual.setdefault(name, value)
    # tar and TOC both bound names; the page has the TOC's under this name
    actual["MAX_NAME_BYTES"] = toc_fields.MAX_NAME_BYTES
    shown = {name: as_number(text) for name, text in documented_limits().items()}
    assert {name: value for name, value in actual.items() if shown.get(name, value) != value} == {}
    wanted = {
        name
        for module in (footer, model, toc, toc_fields)
        for name in vars(module)
        if name.startswith("MAX_")
    }
    wanted |= {"MAX_LAYERS", "MAX_MANIFEST_BYTES", "MAX_CONFIG_BYTES", "MAX_INDEX_DEPTH"}
    assert sorted(wanted - shown.keys()) == []


def source_texts() -> list[str]:
    """All texts of the product, with … where a value is put in."""
    texts = []
    for path in sorted((ROOT / "p2pgz").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_command_that_is_named_exists() -> None:
    names = {name for name, _, _ in load_generator().commands()}
    groups = {name for name, command, _ in load_generator().commands() if hasattr(command, "commands")}
    pages = [path.read_text("utf-8") for path in PAGES if path.name != "CHANGELOG.md"]
    wrong = set()
    for text in [*source_texts(), *pages]:
        for words in re.findall(r"`p2pgz ([a-z]+(?: [a-z]+)?)", text):
            command, _, inner = words.partition(" ")
            full = f"p2pgz {words}" if inner and f"p2pgz {command}" in groups else f"p2pgz {command}"
            if full not in names:
                wrong.add(full)
    assert sorted(wrong) == []


def test_troubleshooting_quotes_messages_that_exist() -> None:
    texts = source_texts()
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "how-to" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    gone = []
    for message in quoted:
        fragments = [part.strip() for part in message.split("…") if len(part.strip()) > 5]
        assert fragments, message
        if not all(any(fragment in text for text in texts) for fragment in fragments):
            gone.append(message)
    assert gone == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in LINK.findall(path.read_text("utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        if not page.exists() or (anchor and anchor not in anchors(page.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


def test_every_page_can_be_reached_from_the_readme() -> None:
    readme = ROOT / "README.md"
    reached, todo = {readme}, [readme]
    while todo:
        page = todo.pop()
        for target in LINK.findall(page.read_text("utf-8")):
            path = (page.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file() and path not in reached:
                reached.add(path)
                todo.append(path)
    assert [str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md") if path not in reached] == []


def test_status_document_is_described_field_by_field() -> None:
    text = text_of("control-api.md")
    shown = set(re.findall(r"^\| `([a-z_.\[\]]+)` \|", text, re.MULTILINE))
    shown |= {name.partition("[]")[0] for name in shown}  # a list whose items' fields are
    assert sorted(status_fields() - shown) == []


def status_fields() -> set[str]:
    """The fields of the status document, read from the keys in the source of what makes it."""
    from p2pgz.pool.pool import PoolStats

    fields = {f"pool.{name}" for name in PoolStats.__dataclass_fields__}
    makers = (
        ("node/node.py", "status", ""),
        ("node/upkeep.py", "status", "pool."),
        ("node/peering.py", "status", "node."),
        ("node/live.py", "status", "config."),
        ("telemetry/process.py", "figures", "node."),
        ("p2p/exchange.py", "status", "peers[]."),
        ("p2p/exchange.py", "faulty_peers", "node.faulty_peers[]."),
        ("node/seeds.py", "status", "seeds[]."),
        ("mount/startup.py", "status", "mounts[].startup."),
    )
    for name, function, prefix in makers:
        for node in ast.walk(ast.parse((ROOT / "p2pgz" / name).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                for child in ast.walk(node):
                    if isinstance(child, ast.Dict) and is_outermost(child, node):
                        fields |= keys_of(child, prefix)
    mounts = ast.parse((ROOT / "p2pgz" / "mount" / "mounts.py").read_text("utf-8"))
    for node in ast.walk(mounts):
        if isinstance(node, ast.Dict) and {"ref", "dir"} <= keys_of(node, ""):
            fields |= keys_of(node, "mounts[].")
    return fields


def is_outermost(child: ast.Dict, function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Return)
        and (node.value is child or (isinstance(node.value, ast.ListComp) and node.value.elt is child))
        for node in ast.walk(function)
    )


def keys_of(node: ast.Dict, prefix: str) -> set[str]:
    found = set()
    for key, value in zip(node.keys, node.values, strict=True):
        if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
            continue
        if isinstance(value, ast.Dict):
            found |= keys_of(value, f"{prefix}{key.value}.")
        elif not isinstance(value, ast.Call):  # what a call gives is described by its own function
            found.add(prefix + key.value)
    return found


def test_the_json_of_a_failure_is_as_described() -> None:
    event = api.error_event(errors.ImageNotFound("what", hint="hint"))
    text = text_of("control-api.md")
    assert [name for name in event if f'"{name}"' not in text] == []
    assert msgspec.json.encode(event)
