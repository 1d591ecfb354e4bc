"""Moves the fragments of changelog.d into a section of CHANGELOG.md: changelog.py VERSION [YYYY-MM-DD]."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

MARK = "<!-- new sections go below this line -->\n"


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: make changelog VERSION=1.2.3", file=sys.stderr)
        return 2
    version = arguments[0]
    date = arguments[1] if len(arguments) > 1 else datetime.datetime.now(datetime.UTC).date().isoformat()
    fragments = sorted(path for path in Path("changelog.d").glob("*.md") if path.name != "README.md")
    if not fragments:
        print("changelog.d holds no fragments: nothing to do", file=sys.stderr)
        return 1
    items = "".join(f"- {' '.join(path.read_text(encoding='utf-8').split())}\n" for path in fragments)
    changelog = Path("CHANGELOG.md")
    head, mark, rest = changelog.read_text(encoding="utf-8").partition(MARK)
    assert mark, "CHANGELOG.md has lost its marker line"
    changelog.write_text(f"{head}{mark}\n## {version} ({date})\n\n{items}{rest}", encoding="utf-8")
    for path in fragments:
        path.unlink()
    print(f"{len(fragments)} entries for {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
