"""`p2pgz seed`: images that a node fetches whole, keeps, and gives to its peers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from p2pgz.cli.client import NodeClient, running_node, show_warnings
from p2pgz.cli.context import (
    Settings,
    absolute_reference,
    image_request,
    json_option,
    print_json,
    registry_options,
    unverified_option,
)
from p2pgz.cli.status import human_bytes
from p2pgz.errors import P2pgzError, PartlyDone, UsageError


@click.command()
@click.argument("references", metavar="REF...", nargs=-1)
@click.option("--watch", is_flag=True, help="Follow the tag: fetch what it means later, too.")
@click.option("--list", "listing", is_flag=True, help="Show the seeds of this node.")
@click.option("--remove", is_flag=True, help="Keep these images no longer.")
@registry_options
@unverified_option
@json_option
@click.pass_obj
def seed(
    settings: Settings,
    /,
    references: tuple[str, ...],
    watch: bool,
    listing: bool,
    remove: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fetch all of each image REF, keep it whatever the pool's quota says, and give it to peers.

    Needs a running `p2pgz node`. Returns when all is here; if it is interrupted the node goes on by itself, and takes its
    seeds up again whenever it starts. Without --watch an image stays the one that the tag means now.
    """
    if listing + remove + watch > 1 or listing == bool(references):
        raise UsageError(
            "name the images to seed or to remove, or ask for the list",
            hint="p2pgz seed [--watch] REF..., p2pgz seed --remove REF..., p2pgz seed --list",
        )
    client = running_node(settings, start=False)
    if listing:
        _list(client, as_json=as_json)
        return
    results: list[dict[str, Any]] = []
    failures: list[P2pgzError] = []
    for reference in references:
        try:
            if remove:
                results += _remove(client, reference, options["platform"])
            else:
                request = image_request(reference, {**options, "watch": watch})
                results.append(_seed(settings, client, request, quiet=as_json))
        except P2pgzError as error:
            if len(references) > 1:
                click.echo(f"p2pgz: {error}", err=True)
            failures.append(error)
    if as_json and results:
        print_json({"seeds": results} if not remove else {"removed": results})
    if failures:
        if not results:
            raise failures[0]
        raise PartlyDone(f"{len(failures)} of {len(references)} images failed: {failures[0].what}")


def _seed(settings: Settings, client: NodeClient, request: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    result = client.call("/v1/seeds", request, _progress(settings))
    result.pop("event")
    show_warnings(result)
    if not quiet:
        follows = ", its tag is followed" if result["watch"] else ""
        click.echo(
            f"{result['ref']}  {result['digest']}: {human_bytes(result['bytes'])} in {len(result['layers'])} layers "
            f"after {result['seconds']:.1f} s{follows}"
        )
    return result


def _progress(settings: Settings) -> Callable[[dict[str, Any]], None] | None:
    """A line for each layer, and on a terminal one that changes; a log gets a line when the state does."""
    if settings.quiet:
        return None
    terminal = sys.stderr.isatty()
    shown = ""

    def show(event: dict[str, Any]) -> None:
        nonlocal shown
        clear = "\r\033[K" if terminal else ""
        for layer in event.get("new_layers", ()):
            click.echo(
                f"{clear}layer {layer['digest'][7:19]}  {human_bytes(layer['bytes'])}  complete", err=True
            )
        if terminal:
            click.echo(clear + event["text"], err=True, nl=event.get("state") == "complete")
        elif event.get("state") != shown:
            shown = event.get("state", "")
            click.echo(event["text"], err=True)

    return show


def _remove(client: NodeClient, reference: str, platform: str) -> list[dict[str, Any]]:
    request = {"reference": absolute_reference(reference), "platform": platform}
    removed: list[dict[str, Any]] = client.call("/v1/seeds/remove", request)["removed"]
    for key in removed:
        click.echo(f"removed {key['reference']} ({key['platform']})", err=True)
    return removed


def _list(client: NodeClient, *, as_json: bool) -> None:
    seeds = client.status()["seeds"]
    if as_json:
        print_json({"seeds": seeds})
        return
    for row in seeds:
        share = 100 * row["present_bytes"] / row["bytes"] if row["bytes"] else 0
        follows = ", follows its tag" if row["watch"] else ""
        click.echo(
            f"{row['ref']}  {row['digest'] or '(not looked up yet)'}  {row['state']}  "
            f"{human_bytes(row['present_bytes'])} of {human_bytes(row['bytes'])} ({share:.0f} %), "
            f"{row['origin']}{follows}"
        )
        if row["error"]:
            click.echo(f"    {row['error']}")
    if not seeds:
        click.echo("no seeds")
