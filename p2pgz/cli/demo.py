"""`p2pgz demo`: a small cluster on this machine, with real processes and a registry of its own on loopback.

An image is made from files of this machine, converted, and pushed. One node starts a program of it lazily, from the
registry; a seed fetches all of it; a second node starts the program from these two; then the registry is stopped, and a
third node starts it from peers alone. Nothing is left behind. Who watches at a terminal has the nodes, and their status
pages, until he has seen enough.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pgz.cli.context import Settings, json_option, print_json

if TYPE_CHECKING:
    from p2pgz.cli.demo_nodes import DemoNode

COMMAND = "uname -s; echo hello from an image that is not here yet; ls /usr/share | head -n 3"
Say = Callable[[str], None]
Linger = Callable[..., None]
LINGER_SECONDS, DAY_SECONDS = 120.0, 86_400.0
LOOPBACK, HTTP_PORT = "127.0.0.1", 4802  # as in web.http, whose import would cost every --help a while
STAYING = """
The nodes go on {how_long}. Three things to try meanwhile:

  1. open {url} in a browser: the status page of {name}
  2. {why}
     who gave the bytes
  3. {command} status
     the same in a terminal"""
THINGS_TO_TRY = """
Three things to try now:

  1. {command} demo --stay
     the same, and the nodes stay: look at their status page. That of `{command} node` is {url}
  2. {command} mount IMAGE DIR
     an image of yours; `{command} convert IMAGE TARGET` makes it lazy first
  3. {command} doctor
     what this host lacks for that, if anything"""


@click.command()
@click.option(
    "--stay/--no-stay",
    default=None,
    help="Keep the nodes and their status pages until Ctrl-C; default: for two minutes on a terminal.",
)
@json_option
@click.pass_obj
def demo(settings: Settings, /, stay: bool | None, as_json: bool) -> None:
    """Run a registry, a seed and three nodes on this machine for some seconds, and show who gave whom what.

    An image is made of files of this machine. Each node mounts it and starts a program of it, the last one after the
    registry was stopped; without root or FUSE it reads a file instead.
    """
    # the default for SIGTERM would leave everything behind; a background job has SIGINT ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def say(text: str) -> None:
        if not (as_json or settings.quiet):
            click.echo(text, err=True)

    seconds = math.inf if stay else 0.0
    if stay is None and sys.stdout.isatty() and not (as_json or settings.quiet):
        seconds = LINGER_SECONDS

    def show(result: dict[str, Any]) -> None:
        if as_json:
            print_json(result)
        else:
            _print_table(result)

    with tempfile.TemporaryDirectory(prefix="p2pgz-demo-", dir=roomy_directory()) as name:
        try:
            _tour(
                Path(name),
                say,
                show,
                linger=partial(_linger, seconds, partial(click.echo, err=as_json)) if seconds else None,
            )
        except _SeenEnough:
            return
    if not as_json:
        click.echo(THINGS_TO_TRY.format(command=_own_command(), url=f"http://{LOOPBACK}:{HTTP_PORT}/"))


class _SeenEnough(Exception):
    """Who wanted to look at the nodes has done so."""


def roomy_directory() -> str | None:
    """The place for large temporary files: on a disk where the usual one may be a tmpfs, which a pool cannot use."""
    roomy = "/var/tmp"  # noqa: S108  # mkdtemp makes a private folder there
    return roomy if os.access(roomy, os.W_OK) else None


def _missing_for_mount() -> str:
    if os.geteuid() != 0:
        return "a chroot needs root"
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is not there (modprobe fuse; in a container pass the device)"
    return ""


def _own_command() -> str:
    """How this command was called: it need not be on the path."""
    if shutil.which("p2pgz") is not None:
        return "p2pgz"
    return sys.argv[0] if Path(sys.argv[0]).name == "p2pgz" else f"{sys.executable} -m p2pgz"


def _linger(seconds: float, say: Say, node: DemoNode, reference: str, *, mounts: bool) -> None:
    """Show the nodes for so long or until Ctrl-C; raises _SeenEnough."""
    how_long = "until Ctrl-C" if seconds == math.inf else f"for {seconds:.0f} s or until Ctrl-C"
    command = f"{_own_command()} --state-dir {node.folder / 'state'}"
    why = f"{command} find {reference.partition('@')[2]}"
    if mounts:
        node("mount", "--plain-http", "--no-fill", reference, node.root)
        (node.root / "bin/ls").read_bytes()
        why = f"{command} why {node.root}/bin/ls"
    say(STAYING.format(how_long=how_long, name=node.name, url=node.page, command=command, why=why))
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(min(seconds, DAY_SECONDS))
    raise _SeenEnough


def _tour(folder: Path, say: Say, show: Callable[[dict[str, Any]], None], *, linger: Linger | None) -> None:
    from p2pgz.cli.demo_image import write_layout
    from p2pgz.cli.demo_nodes import demo_node, running_registry

    missing = _missing_for_mount()
    if missing:
        say(f"no mounts: {missing}; reading a file instead")

    def use(node: DemoNode, reference: str) -> None:
        said = node.read_file(reference) if missing else node.run_program(reference, COMMAND)
        say("".join(f"  | {line}\n" for line in said.splitlines()).rstrip())

    with ExitStack() as stack:
        registry = stack.enter_context(running_registry(folder / "registry"))
        first, seed, second, third = (
            stack.enter_context(demo_node(folder, name)) for name in ("node 1", "seed", "node 2", "node 3")
        )
        say("packing files of this machine into an image …")
        write_layout(folder / "layout")
        repository = f"{registry.address}/demo/machine"
        reference = f"{repository}:lazy"
        say(f"converting it, and pushing it to {registry.kind} on loopback …")
        words = ("convert", "--json", "--plain-http", f"oci:{folder / 'layout'}:plain", reference)
        image_bytes = sum(layer["bytes"] for layer in json.loads(first(*words))["layers"])

        say(f"node 1 starts, alone, and takes {reference} from the registry as it is read …")
        first.join()
        say(f"its status page is {first.page} while this runs")
        use(first, reference)
        rows = [first.supplied()]

        say("a seed starts and fetches all of it …")
        seed.join(first)
        began = time.monotonic()
        [seeded] = json.loads(seed("seed", "--json", "--plain-http", reference))["seeds"]
        rows.append({**seed.supplied(), "seed_seconds": time.monotonic() - began})

        say("node 2 starts: there are peers now …")
        second.join(seed)
        use(second, reference)
        rows.append(second.supplied())

        say("the registry is stopped. node 3 starts, and takes the image by its digest …")
        registry.stop()
        third.join(seed)
        pinned = f"{repository}@{seeded['digest']}"
        use(third, pinned)
        rows.append(third.supplied())
        show(
            {
                "image_bytes": image_bytes,
                "fetched_bytes": rows[0]["registry_bytes"],
                "requests": rows[0]["registry_requests"],
                "mounted": not missing,
                "mount_seconds": rows[0]["mount_seconds"],
                "first_output_seconds": rows[0]["first_output_seconds"],
                "registry": registry.kind,
                "nodes": rows,
            }
        )
        if linger is not None:
            linger(third, pinned, mounts=not missing)


def _print_table(result: dict[str, Any]) -> None:
    click.echo(f"the image has {result['image_bytes'] / 1e6:.1f} MB, compressed; who supplied what:\n")
    click.echo(f"{'':10}{'registry':>12}{'requests':>10}{'peers':>12}{'first output':>15}")
    for row in result["nodes"]:
        seeded, first = row.get("seed_seconds", 0.0), row["first_output_seconds"]
        after = f"all in {seeded:.1f} s" if seeded else f"{first:.2f} s"
        click.echo(
            f"{row['name']:10}{row['registry_bytes'] / 1e6:>9.1f} MB{row['registry_requests']:>10}"
            f"{row['peer_bytes'] / 1e6:>9.1f} MB{after:>15}"
        )
    click.echo(
        "\nnode 3 came when the registry was stopped. Peers give chunks as they are in the files, uncompressed."
    )
