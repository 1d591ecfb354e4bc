"""`p2pgz why`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from p2pgz.cli.client import running_node
from p2pgz.cli.context import Settings, absolute, json_option, print_json
from p2pgz.cli.status import human_bytes
from p2pgz.errors import ImageNotFound

PEER_LETTERS = 12  # of a peer id's end, which is what differs


@click.command()
@click.argument("path", metavar="PATH", type=click.Path())
@json_option
@click.pass_obj
def why(settings: Settings, /, path: str, as_json: bool) -> None:
    """Show where the bytes of a mounted file came from: each chunk, who gave it, how long it took.

    For a chunk that is not here: who would be asked for it now. PATH may be a directory, also that of the mount; then the
    chunks of all files below it are added up. Nothing is fetched. Of an image's reference: why containerd unpacked
    layers of it instead of taking this node's mount.
    """
    chunks: list[dict[str, Any]] = []

    def seen(event: dict[str, Any]) -> None:
        if event.get("event") != "chunks":
            return
        if as_json:
            chunks.extend(event["chunks"])
            return
        for chunk in event["chunks"]:
            click.echo(f"{chunk['n']:>7}  {human_bytes(chunk['bytes']):>10}  {_told(chunk)}")

    client = running_node(settings, start=False)
    target = absolute(path)
    try:
        result = client.call("/v1/why", {"path": str(target)}, seen)
    except ImageNotFound:
        # as typed it may lead through a symlink; what is in the mount is left alone, since links there are the image's
        real = Path(os.path.realpath(target.parent), target.name)
        if real == target:
            if _show_unpacked(client.status()["unpacked"], path, as_json=as_json):
                return
            raise
        result = client.call("/v1/why", {"path": str(real)}, seen)
    if as_json:
        facts = {key: value for key, value in result.items() if key != "event"}
        print_json({**facts, "chunks": chunks} if facts["bytes"] is not None else facts)
        return
    for line in _summary(result["summary"]):
        click.echo(line)
    if not result["summary"]:
        click.echo("no bytes")


def _show_unpacked(entries: list[dict[str, Any]], name: str, *, as_json: bool) -> bool:
    """The layers of an image that containerd unpacked; whether there are any."""
    found = [entry for entry in entries if name in (entry["reference"], entry["reference"].partition("@")[0])]
    if as_json and found:
        print_json({"reference": name, "unpacked": found})
    elif found:
        for entry in found:
            click.echo(f"layer {entry['layer']} was unpacked by containerd: {entry['reason']}")
    return bool(found)


def _told(chunk: dict[str, Any]) -> str:
    """What is to be said of one chunk."""
    state = chunk["state"]
    if state == "here":
        if chunk["source"] == "before":
            return "here before this node started"
        hedges = f", {chunk['hedges']} more asked" if chunk["hedges"] else ""
        return f"from {_named(chunk['source'], chunk['from'])} in {chunk['seconds']:.3f} s{hedges}"
    if state == "unchecked":
        return "on the disk, checked before it is used"
    if state == "zeros":
        return "zeros, nobody is asked"
    if state == "fetching":
        asked = " and ".join(chunk.get("asked", [])) or "nobody yet"
        return f"on its way for {chunk.get('seconds', 0):.3f} s: {asked} asked"
    peers = [
        f"peer …{p['peer_id'][-PEER_LETTERS:]} ({p['wait_seconds']:.3f} s)" for p in chunk["next"]["peers"]
    ]
    registry = chunk["next"]["registry"]
    asked = ", then ".join([*peers, *([registry] if registry else [])])
    return f"missing; asked would be: {asked}" if asked else "missing, and no source is known"


def _named(source: str, name: str) -> str:
    if source == "peer":
        return f"peer {name}"
    return name or "this host's pool"


STATES = {
    "here": "here",
    "unchecked": "on the disk, to be checked",
    "zeros": "zeros",
    "fetching": "on its way",
    "missing": "missing",
}
SOURCES = {
    "before": "from before this node started",
    "pool": "from this host's pool",
    "peer": "from peers",
    "registry": "from the registry",
}


def _summary(summary: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    lines = []
    for state, sources in summary.items():
        for source, counts in sources.items():
            what = "chunk" if counts["chunks"] == 1 else "chunks"
            told = f"{counts['chunks']} {what}, {human_bytes(counts['bytes'])} {STATES.get(state, state)}"
            if state in ("here", "missing", "fetching"):
                told += f", {'would come ' if state == 'missing' else ''}{SOURCES.get(source, source)}"
            lines.append(told)
    return lines
