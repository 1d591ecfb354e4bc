"""What the pages show is understood by what it is for: every `p2pgz` command line is parsed by the command itself, whether a
test runs it or not; every TOML block is a configuration; every variable is one; Sphinx builds all pages without a warning.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
import yaml

from p2pgz.cli import cli
from p2pgz.config import ENVIRONMENT_OTHERS, Config, flatten

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("README.md"), *ROOT.glob("CONTRIBUTING.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?:    [^\n]*(?:\n|$)|\n(?=    ))+)")
QUOTED = re.compile(r"`(p2pgz [^`]+)`")

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="documentation is not part of what is installed")


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The fenced blocks in these languages; `""` are the indented ones, and those that say no language."""
    for info, body in FENCE.findall(text):
        if (info.split() or [""])[0] in languages:
            yield body
    if "" in languages:
        yield from INDENTED.findall(FENCE.sub("", text))


def commands(script: str) -> Iterator[list[str]]:
    """The words of each call of `p2pgz` in a script, wherever it stands on its line."""
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        lexer = shlex.shlex(line.strip(), posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError:
            continue  # a line of output, with an apostrophe
        for start, word in enumerate(words):
            before = words[start - 1] if start else ""
            if word != "p2pgz" or not is_command_position(words[:start], before):
                continue
            end = next(
                (
                    at
                    for at in range(start + 1, len(words))
                    if set(words[at]) <= set("();<>|&")
                    or (words[at] == "2" and words[at + 1 : at + 2] == [">"])
                ),
                len(words),
            )
            yield words[start + 1 : end]


def is_command_position(before: list[str], last: str) -> bool:
    return (
        not before
        or set(last) <= set("();|&")
        or last
        in {
            "do",
            "then",
            "until",
            "while",
            "if",
            "!",
            "time",
            "timeout",
            "$",
            "exec",
            "sudo",
            "ExecStart=",
            "--",
        }
        or all("=" in word for word in before)
    )


def shown() -> list[tuple[str, list[str], bool]]:
    """Every command line on any page, and whether it is whole: a sentence may be about `p2pgz mount --suid`."""
    found = []
    for path in PAGES:
        name = str(path.relative_to(ROOT))
        text = path.read_text("utf-8")
        # the reference of the command line is generated: its lines are usages
        scripts = [] if path.name == "cli.md" else list(blocks(text, "", "sh", "bash", "console"))
        for is_whole, some in ((True, scripts), (False, QUOTED.findall(text))):
            found += [(name, words, is_whole) for script in some for words in commands(script)]
    return found


def parse(words: list[str]) -> None:
    """Parse one command line as the command would, and run nothing; raises click.ClickException."""
    command: click.Command = cli
    context = cli.make_context("p2pgz", list(words) or ["--help"], resilient_parsing=not words)
    rest = [*context._protected_args, *context.args]
    while isinstance(command, click.Group) and rest:
        name, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        assert name is not None
        command = inner
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []


def test_every_command_line_is_understood() -> None:
    lines = shown()
    assert len(lines) > 200
    wrong = []
    for page, shown_words, is_whole in lines:
        words = [word.replace("…", "x").replace("...", "x") for word in shown_words]
        if not words or "COMMAND" in words:
            continue
        try:
            parse(words)
        except click.exceptions.Exit:  # --help, --version
            pass
        except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
            if is_whole:
                wrong.append(f"{page}: p2pgz {shlex.join(words)}: an argument is missing")
        except click.ClickException as error:
            message = error.format_message()
            is_file = isinstance(error, click.BadParameter) and "does not exist" in message
            if not is_file and (is_whole or "requires an argument" not in message):
                wrong.append(f"{page}: p2pgz {shlex.join(words)}: {message}")
    assert wrong == []


def test_mistakes_would_be_noticed() -> None:
    for line in ("p2pgz mount --nosuch REF DIR", "p2pgz nosuch", "p2pgz cat REF", "p2pgz pool nosuch"):
        ((_, *words),) = [["p2pgz", *found] for found in commands(f"sudo {line} | head >x &")]
        with pytest.raises(click.ClickException):
            parse(words)
    assert list(commands("A=1 p2pgz ls x 2>/dev/null; p2pgz status # p2pgz no")) == [["ls", "x"], ["status"]]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_piece_of_configuration_is_one(path: Path) -> None:
    text = path.read_text("utf-8")
    for block in blocks(text, "toml"):
        document = tomllib.loads(block)
        if "host" in document or "server" in document:
            continue  # a hosts.toml
        msgspec.convert(document, Config)
    for block in blocks(text, "yaml"):
        list(yaml.safe_load_all(block))
    keys = flatten(msgspec.to_builtins(Config()))
    for name in set(re.findall(r"\bP2PGZ_[A-Z_]*__[A-Z_]+\b", text)) - {"P2PGZ_SECTION__KEY"}:
        assert name.removeprefix("P2PGZ_").lower().replace("__", ".") in keys, name
    for name in set(re.findall(r"\bP2PGZ_[A-Z]+_DIR\b", text)):
        assert name in {"P2PGZ_STATE_DIR", *ENVIRONMENT_OTHERS} or name.startswith("P2PGZ_TEST"), name


def test_every_page_is_in_the_book_and_sphinx_has_no_complaint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "dummy", DOCS, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
