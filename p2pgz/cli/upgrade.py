"""`p2pgz upgrade`: the running node goes on as the installed version."""

from __future__ import annotations

import time
from typing import Any

import click

from p2pgz.cli.client import running_node
from p2pgz.cli.context import Settings, json_option, print_json
from p2pgz.errors import NodeUnavailable

UPGRADE_SECONDS = 60.0
POLL_SECONDS = 0.05


@click.command()
@json_option
@click.pass_obj
def upgrade(settings: Settings, /, as_json: bool) -> None:
    """Have the running node restart as the version that is installed now, and its file system processes after it.

    Mounts stay as they are; their readers wait for a moment at most.
    """
    client = running_node(settings, start=False)
    begin = time.monotonic()
    before = client.call("/v1/upgrade", {})
    document = _wait(settings, before, begin + UPGRADE_SECONDS)
    result = {
        "from": before["version"],
        "to": document["node"]["version"],
        "mounts": len(document["mounts"]),
        "seconds": round(time.monotonic() - begin, 3),
    }
    if as_json:
        print_json(result)
    else:
        click.echo(
            f"upgraded from {result['from']} to {result['to']} in {result['seconds']} s, {result['mounts']} mounts kept"
        )


def _wait(settings: Settings, before: dict[str, Any], deadline: float) -> dict[str, Any]:
    """The first status of the node's next life."""
    asked_at = time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        try:
            document = running_node(settings, start=False).status()
        except NodeUnavailable:
            continue
        if document["node"]["uptime_seconds"] < before["uptime_seconds"] + (time.monotonic() - asked_at) / 2:
            return document
    raise NodeUnavailable("the node did not come back", hint="see its log; `p2pgz node` starts it again")
