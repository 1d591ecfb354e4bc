"""`p2pgz optimize`."""

from __future__ import annotations

import os
from typing import Any

import click

from p2pgz.cli.client import running_node, show_progress, show_warnings
from p2pgz.cli.context import Settings, image_request, json_option, registry_options, unverified_option
from p2pgz.cli.convert import convert_image, options_of_layers, show_converted, writing_options
from p2pgz.errors import UsageError


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@writing_options
@registry_options
@unverified_option
@json_option
@click.pass_obj
def optimize(settings: Settings, /, source: str, target: str, as_json: bool, **options: Any) -> None:
    """Convert the image SRC to DST with the files first that it reads when it starts.

    Which files those are this host has seen when SRC was mounted and used; else its peers are asked. They lie at the front
    of their layers then, in the order in which they are read, where every lazy runtime fetches them together.
    """
    if source.startswith("file:") or target.startswith("file:"):
        raise UsageError(
            "a single layer does not start", hint="p2pgz convert --prioritized FILE file:… file:…"
        )
    names = ("plain_http", "platform", "ca_file", "hosts_dir", "user", "allow_unverified_toc")
    request = image_request(source, {name: options[name] for name in names})
    found = running_node(settings).call("/v1/startup", request, show_progress(settings))
    show_warnings(found)
    if not settings.quiet:
        seen = f"seen {found['recordings']} times here" if found["recordings"] else "as peers tell"
        click.echo(f"{len(found['paths'])} files start {source} ({seen})", err=True)
    layer_options = options_of_layers(options, tuple(map(os.fsencode, found["paths"])))
    image = convert_image(settings, source, target, layer_options, {**options, "force": True})
    show_converted(image, target, as_json=as_json)
