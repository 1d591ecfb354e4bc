"""Reading images without mounting them: `ls`, `cat`, `get`, `verify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from p2pgz.cli.client import running_node, show_progress, show_warnings
from p2pgz.cli.context import (
    Settings,
    absolute,
    image_request,
    json_option,
    print_json,
    registry_options,
    unverified_option,
)
from p2pgz.errors import IntegrityError


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("path", metavar="[PATH]", default="/")
@click.option("-R", "--recursive", is_flag=True, help="With everything below.")
@registry_options
@unverified_option
@json_option
@click.pass_obj
def ls(
    settings: Settings, /, reference: str, path: str, recursive: bool, as_json: bool, **options: Any
) -> None:
    """List PATH (default: the root) of the image REF."""
    client = running_node(settings)
    request = image_request(reference, {**options, "path": path, "recursive": recursive})
    result = client.call("/v1/files", request, show_progress(settings))
    show_warnings(result)
    if as_json:
        print_json(result["entries"])
        return
    for line in result["lines"]:
        click.echo(line)


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("path", metavar="PATH")
@registry_options
@unverified_option
@click.pass_obj
def cat(settings: Settings, /, reference: str, path: str, **options: Any) -> None:
    """Print the file PATH of the image REF."""
    client = running_node(settings)
    _pour(client.read("/v1/content", image_request(reference, {**options, "path": path})))


@click.command()
@click.argument("digest", metavar="DIGEST")
@click.pass_obj
def get(settings: Settings, /, digest: str) -> None:
    """Print the chunk, TOC, manifest or config that DIGEST (sha256:… or a CID) names, if it can be had."""
    from p2pgz.core.digest import Digest

    client = running_node(settings)
    _pour(client.read("/v1/chunks", {"digest": str(Digest.parse_any(digest))}))


def _pour(pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@click.command()
@click.argument("what", metavar="REF|DIR")
@registry_options
@unverified_option
@json_option
@click.pass_obj
def verify(settings: Settings, /, what: str, as_json: bool, **options: Any) -> None:
    """Check every byte of the image REF, or of the one mounted at DIR, against its digest.

    Of a reference all bytes are fetched. Of a mount the bytes that are here are read from the disk and hashed again, and
    what is missing is counted.
    """
    client = running_node(settings)
    if what.startswith(("/", "./", "../")) or Path(what).is_dir():
        request: dict[str, Any] = {"directory": str(absolute(what))}
    else:
        request = image_request(what, options)
    result = client.call("/v1/verify", request, show_progress(settings))
    show_warnings(result)
    if as_json:
        print_json({key: value for key, value in result.items() if key != "event"})
    else:
        click.echo(
            f"{result['reference']}: {result['right_chunks']} chunks right ({result['right_bytes']} bytes), "
            f"{result['missing_chunks']} not here, {len(result['wrong'])} wrong"
        )
        for wrong in result["wrong"]:
            click.echo(f"wrong: {wrong}")
    if result["wrong"]:
        raise IntegrityError(
            f"{result['reference']}: {len(result['wrong'])} chunks are wrong",
            hint="they are fetched again when read",
        )
