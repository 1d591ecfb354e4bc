"""`p2pgz drill`."""

from __future__ import annotations

from typing import Any

import click

from p2pgz.cli.client import running_node, show_progress, show_warnings
from p2pgz.cli.context import Settings, image_request, json_option, print_json, registry_options
from p2pgz.cli.status import human_bytes
from p2pgz.errors import ChunkMissing


@click.command()
@click.argument("reference", metavar="REF")
@click.option("--fix", is_flag=True, help="Fetch what nobody has, and nothing else.")
@registry_options
@json_option
@click.pass_obj
def drill(settings: Settings, /, reference: str, fix: bool, as_json: bool, **options: Any) -> None:
    """Say which chunks of the image REF would be lost if its registry went away.

    Those are the chunks that neither this node has nor any peer that it is connected to; it looks for more peers first.
    Exit code 13 when there are any, and --fix was not given.
    """
    result = running_node(settings).call(
        "/v1/drill", image_request(reference, {**options, "fix": fix}), show_progress(settings)
    )
    show_warnings(result)
    if as_json:
        print_json({key: value for key, value in result.items() if key != "event"})
    else:
        click.echo(
            f"{result['reference']}: {result['lost_chunks']} of {result['chunks']} chunks are nowhere but in the registry "
            f"({human_bytes(result['lost_bytes'])}), {result['once_chunks']} at one node only; "
            f"{result['here_chunks']} are here, {result['peers']} peers have some"
        )
        if fix:
            click.echo(f"{result['fixed_chunks']} chunks fetched")
    if result["lost_chunks"] > result["fixed_chunks"]:
        raise ChunkMissing(
            f"{result['reference']}: {result['lost_chunks']} chunks would be lost without the registry",
            hint="`--fix` fetches them",
        )
