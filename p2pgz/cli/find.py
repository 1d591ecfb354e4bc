"""`p2pgz find`."""

from __future__ import annotations

from typing import Any

import click

from p2pgz.cli.client import running_node
from p2pgz.cli.context import Settings, json_option, print_json

# what is said of each way to know of a provider
WAYS = {
    "pool": "this node",
    "bitmap": "connected, says that it has it",
    "itself": "answers that it has it",
    "record": "named by",
    "pointer": "has the TOC with it, by a pointer at",
}


@click.command()
@click.argument("digest", metavar="DIGEST|CID")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to look at most.",
)
@json_option
@click.pass_obj
def find(settings: Settings, /, digest: str, timeout: float, as_json: bool) -> None:
    """Show who provides a chunk, TOC, manifest, config or plain layer, and how that is known.

    DIGEST is `sha256:…` or its hexadecimal digits, CID one of any codec by sha2-256. Providers are printed as they are
    found: the peer, how it was found, its addresses. Exit code 10 when there is none. Images that are not for every peer
    are not found.
    """
    providers: dict[str, dict[str, Any]] = {}

    def seen(event: dict[str, Any]) -> None:
        if event.get("event") != "provider":
            return
        peer = event["peer_id"]
        fresh: dict[str, Any] = {"peer_id": peer, "addrs": [], "found": []}
        known = providers.setdefault(peer, fresh)
        new = [address for address in event["addrs"] if address not in known["addrs"]]
        known["addrs"] += new
        way = {"how": event["found"]}
        way.update((key, event[key]) for key in ("server", "toc") if key in event)
        known["found"].append(way)
        if not as_json:
            where = f" {event['server']}" if "server" in event else ""
            toc = f" to {event['toc']}" if "toc" in event else ""
            click.echo(
                f"{peer}  {WAYS.get(event['found'], event['found'])}{where}{toc}  {' '.join(event['addrs'])}"
            )

    client = running_node(settings, start=False)
    result = client.call("/v1/find", {"digest": digest, "timeout_seconds": timeout}, seen)
    if as_json:
        print_json(
            {
                **{key: value for key, value in result.items() if key != "event"},
                "providers": list(providers.values()),
            }
        )
    elif not result["finished"] and not settings.quiet:
        click.echo(f"there may be more: not everybody answered within {timeout:g} s", err=True)
