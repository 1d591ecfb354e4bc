"""`p2pgz pool`: what the pool holds, what it must keep, and whether it is sound."""

from __future__ import annotations

from typing import Any

import click

from p2pgz.cli.client import running_node, show_progress
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
from p2pgz.errors import IntegrityError


@click.group()
def pool() -> None:
    """Show and keep this host's chunk pool."""


@pool.command("stat")
@json_option
@click.pass_obj
def stat(settings: Settings, /, as_json: bool) -> None:
    """Show what the pool holds, and how much of it may go."""
    document = running_node(settings).status()["pool"]
    if as_json:
        print_json(document)
        return
    click.echo(
        f"{human_bytes(document['bytes'])} in {document['chunks']} chunks, {document['segments']} segments"
    )
    quota = human_bytes(document["quota_bytes"]) if document["quota_bytes"] else "none"
    click.echo(
        f"{human_bytes(document['allocated_bytes'])} on the disk, quota {quota}; {human_bytes(document['pinned_bytes'])} "
        f"pinned, {human_bytes(document['evictable_bytes'])} evictable, "
        f"{human_bytes(document['evicted_bytes'])} evicted so far"
    )
    click.echo(
        f"in {document['path']}, {human_bytes(document['free_bytes'])} free on that file system, "
        f"of which {human_bytes(document['free_floor_bytes'])} are left alone"
    )
    if document["state"] == "full":
        click.echo("FULL: chunks are served without being kept until there is room")
    if document["state"] == "failing":
        click.echo(f"FAILING: chunks are served without being kept: {document['error']}")
    for pin in document["pins"]:
        click.echo(f"pinned: {pin['ref']}  {pin['digest']}" + (" (seed)" if pin["owner"] == "seed" else ""))


@pool.command("gc")
@click.option(
    "--all", "everything", is_flag=True, help="Evict all that is not pinned, mounted images' chunks too."
)
@json_option
@click.pass_obj
def gc(settings: Settings, /, everything: bool, as_json: bool) -> None:
    """Give back what the pool need not hold.

    Files that no image refers to, what a crash left over, and, where there is a quota or a floor of free space, cold
    chunks until new ones have room. Mounted images fetch again what they still need.
    """
    request = {"all": True} if everything else {}
    result = running_node(settings).call("/v1/pool/gc", request, show_progress(settings))
    if as_json:
        print_json(_without_event(result))
        return
    freed = max(0, result["allocated_bytes_before"] - result["allocated_bytes"])
    click.echo(f"{human_bytes(freed)} freed, {human_bytes(result['allocated_bytes'])} left on the disk")
    if result["eviction_failures"]:
        click.echo(
            f"{result['eviction_failures']} segments stay: a process that may read them did not answer, or cannot be asked "
            "(the node's log says which)",
            err=True,
        )


@pool.command("scrub")
@click.option(
    "--rate",
    type=click.IntRange(min=0),
    metavar="BYTES",
    help="Bytes per second; default: as configured, 0: no limit.",
)
@json_option
@click.pass_obj
def scrub(settings: Settings, /, rate: int | None, as_json: bool) -> None:
    """Read every chunk from the disk and check it; wrong ones are fetched again.

    Exit code 12 when something was wrong, whether or not it could be repaired.
    """
    request = {} if rate is None else {"bytes_per_second": rate}
    result = _without_event(running_node(settings).call("/v1/pool/scrub", request, show_progress(settings)))
    if as_json:
        print_json(result)
    else:
        click.echo(
            f"{result['chunks']} chunks, {human_bytes(result['bytes'])} read; {len(result['wrong'])} wrong, "
            f"{result['refetched_chunks']} of them fetched again"
        )
    if result["wrong"]:
        raise IntegrityError(
            f"{len(result['wrong'])} chunks had changed on the disk: {', '.join(result['wrong'][:3])}",
            hint="they are fetched again; look after the disk",
        )


@pool.command("pin")
@click.argument("reference")
@registry_options
@unverified_option
@json_option
@click.pass_obj
def pin(settings: Settings, /, reference: str, as_json: bool, **options: Any) -> None:
    """Keep an image's chunks whatever the quota says. Fetches nothing by itself."""
    request = image_request(reference, options)
    result = running_node(settings).call("/v1/pool/pin", request, show_progress(settings))
    if as_json:
        print_json(_without_event(result))
    else:
        click.echo(f"pinned {result['reference']} {result['digest']}, up to {human_bytes(result['bytes'])}")


@pool.command("unpin")
@click.argument("reference")
@json_option
@click.pass_obj
def unpin(settings: Settings, /, reference: str, as_json: bool) -> None:
    """Let a pinned image be evicted again. REFERENCE as in `pool stat`, or the manifest's digest."""
    result = running_node(settings).call("/v1/pool/unpin", {"reference": absolute_reference(reference)})
    if as_json:
        print_json(_without_event(result))
    else:
        click.echo("\n".join(f"unpinned {digest}" for digest in result["unpinned"]))


def _without_event(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "event"}
