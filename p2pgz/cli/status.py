"""`p2pgz status`."""

from __future__ import annotations

from typing import Any

import click

from p2pgz.cli.client import running_node
from p2pgz.cli.context import Settings, json_option, print_json


def human_bytes(count: float) -> str:
    """`1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@click.command()
@json_option
@click.pass_obj
def status(settings: Settings, /, as_json: bool) -> None:
    """Show the node, its mounts and where their bytes came from."""
    document = running_node(settings, start=False).status()
    if as_json:
        print_json(document)
        return
    node, pool = document["node"], document["pool"]
    click.echo(f"node {node['version']}, up {node['uptime_seconds']:.0f} s, pid {node['pid']}")
    if node.get("http"):
        click.echo(f"page {node['http'][0]}")
    if node["peer_id"]:
        click.echo(f"peers: {len({peer['peer_id'] for peer in document['peers']})} connected")
    for mount in document["mounts"]:
        share = 100 * mount["present_bytes"] / mount["bytes"] if mount["bytes"] else 100
        click.echo(
            f"{mount['dir'] or '(not attached)'}  {mount['ref']}  {mount['mode']}  {mount['state']}  "
            f"{human_bytes(mount['present_bytes'])} of {human_bytes(mount['bytes'])} here ({share:.0f} %)"
        )
        _show_start(mount.get("startup") or {})
    if unpacked := document["unpacked"]:
        click.echo(
            f"{len(unpacked)} layers unpacked by containerd, the last one because: {unpacked[-1]['reason']}"
        )
    if not document["mounts"]:
        click.echo("no mounts")
    for seed in document["seeds"]:
        click.echo(
            f"seed {seed['ref']}  {seed['state']}  "
            f"{human_bytes(seed['present_bytes'])} of {human_bytes(seed['bytes'])}"
        )
    full = {"full": "; FULL: nothing more is kept", "failing": f"; FAILING: {pool['error']}"}.get(
        pool["state"], ""
    )
    click.echo(f"pool: {human_bytes(pool['bytes'])} in {pool['chunks']} chunks{full}")
    for source, counts in document["sources"].items():
        click.echo(
            f"from {source}: {counts['chunks']} chunks, {human_bytes(counts['bytes'])}" + _requests(counts)
        )
    cluster = document.get("cluster", {"members": 0})
    if cluster["members"] > 1:
        zone = f", this one in zone {cluster['zone']}" if cluster["zone"] else ""
        deaths = f"; found dead so far: {cluster['deaths']}" if cluster["deaths"] else ""
        click.echo(f"cluster: {cluster['members']} members{zone}{deaths}")
    if document["config"]["refused"]:
        click.echo(f"configuration not taken: {document['config']['refused']}")
    if document["config"]["waiting_for_restart"]:
        click.echo(f"waiting for a restart: {', '.join(document['config']['waiting_for_restart'])}")
    if document["node"]["faulty_peers"]:
        faults = ", ".join(f"{count} {fault}" for fault, count in node["faults"].items() if count)
        click.echo(f"peers out of their place: {len(node['faulty_peers'])}; faults so far: {faults}")


def _show_start(start: dict[str, Any]) -> None:
    """How well the start-up list has guessed, if there was one."""
    if not start.get("listed_chunks"):
        return
    hits = 100 * start["hit_chunks"] / start["read_chunks"] if start["read_chunks"] else 0
    click.echo(
        f"  start: {human_bytes(start['prefetched_bytes'])} fetched ahead by a list of {start['listed_chunks']} chunks, "
        f"which named {hits:.0f} % of what was read"
    )


def _requests(counts: dict[str, Any]) -> str:
    if "requests" not in counts:
        return ""
    return f", {counts['requests']} requests, {human_bytes(counts['wire_bytes'])} received"
