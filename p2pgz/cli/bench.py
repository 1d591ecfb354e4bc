"""`p2pgz bench`: how fast lazy images are on this host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from p2pgz.cli.context import (
    Settings,
    absolute_reference,
    json_option,
    print_json,
    registry_options,
)
from p2pgz.cli.demo import roomy_directory
from p2pgz.errors import UsageError

PARTS = ("stages", "start", "reads")


@click.command()
@click.argument("ref", required=False)
@click.option(
    "--run", "command", default="", metavar="COMMAND", help="What a start is: run by the image's /bin/sh."
)
@click.option(
    "--until", default="", metavar="TEXT", help="A text in its output that ends the clock; default: any."
)
@click.option(
    "--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Of each measurement."
)
@click.option(
    "--peer", "peers", multiple=True, metavar="MULTIADDR", help="A node that has the image; default: started."
)
@click.option(
    "--only", type=click.Choice(PARTS), multiple=True, help="Measure this part only (may be repeated)."
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "tree", "erofs"]),
    default="auto",
    show_default=True,
    help="Of the mount.",
)
@click.option("--directory", metavar="DIR", help="Where to measure: a disk with room for the image twice.")
@click.option("--plot", metavar="FILE", help="Draw the result too (.png or .svg).")
@registry_options
@json_option
@click.pass_obj
def bench(
    settings: Settings,
    /,
    ref: str | None,
    command: str,
    until: str,
    runs: int,
    peers: tuple[str, ...],
    only: tuple[str, ...],
    mode: str,
    directory: str | None,
    plot: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this host: the stages of the way, and with REF cold starts of that image and reads of it.

    A cold start is timed with an empty pool, from the registry alone, from a peer alone, and with both; without --run it
    ends when the whole image has been read. Reads are timed beside the same tree unpacked on the disk. Nodes and
    directories of the benchmark's own are used, and removed. Root sees cold caches and may --run.
    """
    from p2pgz.bench import reads, report, stages, start

    chosen = only or (PARTS if ref else ("stages",))
    _check(ref, command, until, chosen)
    if plot:
        report.check_plot(Path(plot))
    words = _words(options)

    def say(text: str) -> None:
        if not settings.quiet and not as_json:
            click.echo(text, err=True)

    place = directory or roomy_directory()
    if place is not None and not Path(place).is_dir():
        raise UsageError(f"--directory {place}: there is no such folder")
    reference = absolute_reference(ref) if ref else ""
    found: tuple[Any, Any, Any] = ([], [], [])
    with tempfile.TemporaryDirectory(prefix="p2pgz-bench-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if "stages" in chosen:
            found[0].extend(stages.measure(folder))
        if "start" in chosen:
            program = start.Program(command, until) if command else None
            found[1].extend(
                start.measure(
                    reference,
                    words,
                    folder / "start",
                    program=program,
                    runs=runs,
                    peers=peers,
                    say=say,
                )
            )
        if "reads" in chosen:
            found[2].extend(reads.measure(reference, words, folder / "reads", mode=mode, runs=runs, say=say))
    result = report.document(*found)
    if plot:
        report.plot(result, Path(plot))
    if as_json:
        print_json(result)
    else:
        click.echo(report.tables(result))


def _check(ref: str | None, command: str, until: str, chosen: tuple[str, ...]) -> None:
    if not ref and set(chosen) - {"stages"}:
        raise UsageError("start and reads are measured with an image", hint="p2pgz bench REF --only start")
    if until and not command:
        raise UsageError("--until goes with --run")
    if command and os.geteuid():
        raise UsageError("--run needs root: it runs in a chroot", hint="without it the whole image is read")


def _words(options: dict[str, Any]) -> list[str]:
    """The registry options as they were typed, for the commands that are run."""
    names = {"ca_file": "--tlscacert"}
    words: list[str] = []
    for key, value in options.items():
        option = names.get(key, "--" + key.replace("_", "-"))
        if value is True:
            words.append(option)
        elif value:
            words += [option, str(Path(value).absolute()) if key in {"ca_file", "hosts_dir"} else str(value)]
    return words
