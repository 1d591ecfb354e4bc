"""`p2pgz node`: the daemon."""

from __future__ import annotations

import json
import os
import sys

import click

from p2pgz.cli.context import Settings
from p2pgz.errors import P2pgzError


@click.command()
@click.option(
    "--listen", multiple=True, metavar="MULTIADDR", help="Where peers reach this node; default: port 4801."
)
@click.option(
    "--bootstrap",
    multiple=True,
    metavar="MULTIADDR",
    help="A node to begin with; may be given several times.",
)
@click.option("--mdns", is_flag=True, help="Look for peers on the local network.")
@click.option("--no-peers", is_flag=True, help="Have no peers.")
@click.option(
    "--http",
    default="",
    metavar="HOST:PORT",
    help="Where status page and metrics are; default: 127.0.0.1:4802.",
)
@click.option("--ephemeral", is_flag=True, help="End after the last mount (what `p2pgz mount` starts).")
@click.option("--ready-fd", type=int, hidden=True, help="Write one line here once the node answers.")
@click.option("--replace-fs", is_flag=True, hidden=True, help="Exchange all file system processes.")
@click.pass_obj
def node(
    settings: Settings,
    /,
    ephemeral: bool,
    ready_fd: int | None,
    replace_fs: bool,
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    mdns: bool,
    no_peers: bool,
    http: str,
) -> None:
    """Run the node in the foreground. SIGTERM ends it; mounts go on with the bytes that are here. SIGHUP lets it read its
    configuration again."""
    import gc

    # What is imported stays: looking at it over and over takes a seventh of the start, which readers may be waiting for
    gc.disable()

    import trio

    from p2pgz import node as daemon
    from p2pgz.node import configcheck
    from p2pgz.telemetry import log

    def tell(event: dict[str, object]) -> None:
        if ready_fd is not None:
            os.write(ready_fd, json.dumps(event).encode() + b"\n")
            os.close(ready_fd)

    try:
        flags = {
            "peers.listen": list(listen),
            "peers.bootstrap": list(bootstrap),
            "peers.mdns": mdns,
            "peers.enabled": "never" if no_peers else "",
            "http.listen": http,
        }
        given = {key: value for key, value in flags.items() if value}
        loaded = settings.load(given)
        configcheck.check(loaded, files=False)
        had_file = settings.config_path.exists()
        log.set_up(loaded.config.log.level)
        # Opening an image makes some hundred thousand objects without cycles: with the default thresholds the collector
        # looks at all of them again and again (0.09 of 0.52 s for 50 000 entries), on the event loop
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        gc.enable()
        restart = trio.run(
            daemon.run_node,
            loaded.config,
            # a file that is gone is a mistake, not a configuration of defaults: those admit everybody
            lambda: configcheck.check(settings.load(given, must_exist=had_file), files=False),
            settings.state_path,
            settings.run_path,
            ephemeral,
            replace_fs,
            tell,
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except P2pgzError as error:
        from p2pgz.web.api import error_event

        tell(error_event(error))
        raise
    if restart:
        # same process id, for whoever watches over it; the ready pipe was for the first start
        os.execv(  # noqa: S606  # our own interpreter and our own arguments
            sys.executable, [sys.executable, *_restart_arguments(sys.orig_argv[1:])]
        )


def _restart_arguments(arguments: list[str]) -> list[str]:
    """The command line again, without what belonged to that start only."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word == "--ready-fd":
            next(words, None)
        elif word != "--replace-fs" and not word.startswith("--ready-fd="):
            kept.append(word)
    return [*kept, "--replace-fs"]
