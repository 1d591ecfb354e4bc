"""`p2pgz export`, `import`, `inventory`: images in files, for hosts that reach neither a registry nor a peer."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import click

from p2pgz.cli.client import running_node, show_progress
from p2pgz.cli.context import Settings, image_request, json_option, print_json, registry_options
from p2pgz.cli.status import human_bytes
from p2pgz.errors import UsageError

PIECE_BYTES: Final = 256 << 10
# Of a file, between two words of progress
SHOW_BYTES: Final = 16 << 20

output_option = click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Where to write; -: standard output.",
)


@click.command()
@click.argument("reference", metavar="REF")
@output_option
@click.option(
    "--missing-from",
    default="",
    metavar="FILE|PEER",
    help="Leave out what the other side has: its `p2pgz inventory`, or a connected peer by its id or address.",
)
@click.option("--as", "name", default="", metavar="NAME", help="What to call the image there; default: REF.")
@registry_options
@json_option
@click.pass_obj
def export(
    settings: Settings,
    /,
    reference: str,
    output: str,
    missing_from: str,
    name: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the image REF into a file: manifest, config, TOCs and chunks, each named by its digest.

    `p2pgz import` takes it in on a host without a registry; the image can then be mounted there by the same name, and
    its digest. What is not in this host's pool is fetched first.
    """
    request = image_request(reference, {**options, "name": name})
    body: Iterator[bytes] = iter(())
    with contextlib.ExitStack() as stack:
        if missing_from:
            if not Path(missing_from).exists() and "/" not in missing_from and missing_from != "-":
                request["peer"] = missing_from
            else:
                request["inventory_name"] = missing_from
                body = _pieces(stack.enter_context(_opened(missing_from)))
        client = running_node(settings)
        pieces = client.read("/v1/export", request, body)
        count = _write(output, _counted(pieces, "written", show_progress(settings)))
    if as_json and output != "-":
        print_json({"reference": reference, "file": output, "file_bytes": count})
    elif output != "-":
        click.echo(f"{reference} -> {output} ({human_bytes(count)})")


@click.command("import")
@click.argument("file", metavar="FILE")
@click.option(
    "--digest", default="", metavar="DIGEST", help="Take this manifest only: what the sender told you."
)
@click.option(
    "--check", is_flag=True, help="Look whether the file is whole and say what is in it; take nothing."
)
@json_option
@click.pass_obj
def import_(settings: Settings, /, file: str, digest: str, check: bool, as_json: bool) -> None:
    """Take an image out of a FILE of `p2pgz export`; -: standard input.

    All of it or nothing: the image can be mounted, by name and by digest, once every byte is here and verified. It is
    pinned then, since it cannot be fetched again; `p2pgz pool unpin` lets it go. A FILE is checked whole before the node
    is given any of it.
    """
    progress = show_progress(settings)
    found: dict[str, Any] = {}
    if file != "-":
        found = _check(file, digest, progress)
    elif check:
        raise UsageError("standard input can be read once", hint="save it as a file for --check")
    if not check:
        with _opened(file) as stream:
            client = running_node(settings)
            sent = _counted(_pieces(stream), "taken in", progress)
            found = client.send("/v1/import", {"name": file, "digest": digest}, sent)
            found.pop("event")
    if as_json:
        print_json(found)
        return
    left_out = f", {found['left_out_chunks']} left out" if found["left_out_chunks"] else ""
    click.echo(
        f"{found['reference']}  {found['digest']}  {found['platform']}: {found['chunks']} chunks "
        f"({human_bytes(found['chunk_bytes'])}){left_out}"
    )


@click.command()
@output_option
@click.pass_obj
def inventory(settings: Settings, /, output: str) -> None:
    """Write the digests of this host's chunks into a file.

    Carried to a host that has a registry, it lets `p2pgz export --missing-from` leave out what is here already.
    """
    _write(output, running_node(settings).read("/v1/inventory", {}))


def _check(file: str, digest: str, progress: Any) -> dict[str, Any]:
    """Read all of a file and hash every byte; returns what its head says, and raises what is wrong with it."""
    from p2pgz.core.exportfile import ExportReader
    from p2pgz.errors import ExportInvalid

    reader = ExportReader(file)
    shown = 0
    with _opened(file) as stream:
        for piece in _pieces(stream):
            for _ in reader.feed(piece):
                head = reader.head
                if head is not None and digest and head.manifest != digest:
                    raise ExportInvalid(
                        f"{file}: it is {head.manifest}, not {digest}",
                        hint="this is another file than the one that you mean, or somebody has changed it",
                    )
                if progress is not None and reader.chunk_bytes - shown > SHOW_BYTES:
                    shown = reader.chunk_bytes
                    progress({"text": f"checked {human_bytes(shown)}"})
        reader.finish()
    head = reader.head
    assert head is not None
    return {
        "reference": head.reference,
        "digest": head.manifest,
        "platform": head.platform,
        "chunks": head.chunks,
        "chunk_bytes": head.chunk_bytes,
        "left_out_chunks": head.left_out_chunks,
    }


@contextlib.contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    if file == "-":
        yield sys.stdin.buffer
        return
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}") from error
        yield stream


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    while piece := stream.read(PIECE_BYTES):
        yield piece


def _counted(pieces: Iterator[bytes], what: str, progress: Any) -> Iterator[bytes]:
    """The same pieces; on a terminal people see how many bytes have passed."""
    count = shown = 0
    for piece in pieces:
        yield piece
        count += len(piece)
        if progress is not None and count - shown >= SHOW_BYTES:
            shown = count
            progress({"text": f"{human_bytes(count)} {what}"})
    if progress is not None:
        progress({"text": ""})


def _write(output: str, pieces: Iterator[bytes]) -> int:
    """Write a file, whole or not at all; returns its size."""
    if output == "-":
        count = 0
        for piece in pieces:
            count += sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return count
    path = Path(output)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{output} is not a regular file", hint="-o - writes to standard output")
        with partial.open("xb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            count = stream.tell()
        partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"{output}: {error.strerror}", hint="write it elsewhere, or free some space"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return count
