"""Gate on the tree itself: what may stand at the top level, how long a module may be, and what no file may
mention.

Reads only what git knows (tracked, or new and not ignored), so that build products do not count.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "changelog.d",
    "configs",
    "constraints.txt",
    "docker",
    "docs",
    "p2pgz",
    "pyproject.toml",
    "tests",
}
MODULE_MAX_LINES = (
    400  # a longer one wants to be two; 600 is the hard stop for one that argues its case in its head
)
MODULE_HARD_MAX_LINES = 600
FORBIDDEN = {
    r"(?<![\w./-])/work/": "a path of somebody's machine",
    r"https?://[^/\s]*pypi\.": "the address of a package registry",
    r"(?i)\bfiles\.pythonhosted\b": "the address of a package registry",
    r"--index-url|--extra-index-url": "the address of a package registry",
}
TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".cfg", ".yml", ".yaml", ".service", ""}


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    return sorted({Path(name.decode()) for name in listing.split(b"\0") if name})


def main() -> int:
    faults, notes = [], []
    for path in tracked():
        if not path.is_file():
            continue
        if path.parts[0] not in TOP_LEVEL:
            faults.append(f"{path}: {path.parts[0]} does not belong at the top level")
        if (
            path.suffix not in TEXT
            or path.parts[:2] == ("tests", "vectors")
            or path == Path(".ci/check_tree.py")
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.count("\n")
        if path.parts[0] == "p2pgz" and path.suffix == ".py" and lines > MODULE_MAX_LINES:
            target = faults if lines > MODULE_HARD_MAX_LINES else notes
            target.append(f"{path}: {lines} lines, the limit is {MODULE_MAX_LINES}")
        for pattern, reason in FORBIDDEN.items():
            for found in re.finditer(pattern, text):
                line = text.count("\n", 0, found.start()) + 1
                faults.append(f"{path}:{line}: {found.group()!r} is {reason}")
    for line in notes:
        print("note:", line)
    for line in faults:
        print("fault:", line)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
