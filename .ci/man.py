"""Writes the man pages of all commands into a folder: `.ci/man.py FOLDER`. Called by `.ci/packages`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

from p2pgz import __version__
from p2pgz.cli import cli


def main(folder: Path) -> None:
    """One page for `p2pgz` and one for each command, as `--help` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    context = click.Context(cli, info_name="p2pgz")
    # the library looks at what is loaded; ours is loaded when it is called
    cli.commands = {
        name: command for name in cli.list_commands(context) if (command := cli.get_command(context, name))
    }
    write_man_pages("p2pgz", cli, version=__version__, target_dir=str(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
