"""`p2pgz convert`."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pgz.cli.context import (
    Settings,
    absolute,
    absolute_reference,
    json_option,
    print_json,
    registry_options,
)
from p2pgz.errors import ImageNotFound, UsageError

if TYPE_CHECKING:
    from p2pgz.convert.convert import ConvertedImage, LayerProgress
    from p2pgz.convert.layer import LayerOptions
    from p2pgz.convert.writer import WrittenLayer

F = TypeVar("F", bound=Callable[..., Any])


def writing_options(command: F) -> F:
    """How layers are written."""
    options = [
        click.option(
            "--format",
            "layer_format",
            type=click.Choice(["estargz", "zstd:chunked", "zstd:chunked-stargz"]),
            default="estargz",
            show_default=True,
            help="estargz: for every runtime; zstd:chunked: podman's; zstd:chunked-stargz: stargz-snapshotter's.",
        ),
        click.option(
            "--chunk-size", type=int, default=None, metavar="BYTES", help="Chunk size; default: 1 MiB."
        ),
        click.option(
            "--level", type=int, default=None, help="Compression level: 1-12 (libdeflate), 1-22 (zstd)."
        ),
        click.option(
            "--threads",
            type=click.IntRange(1, 64),
            default=2,
            show_default=True,
            help="Compressing threads; the result is the same.",
        ),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@writing_options
@click.option(
    "--prioritized",
    type=click.Path(exists=True),
    metavar="FILE",
    help="List of files to put first, a path a line.",
)
@click.option("--force", is_flag=True, help="Convert layers again that have the format already.")
@registry_options
@json_option
@click.pass_obj
def convert(settings: Settings, /, source: str, target: str, as_json: bool, **options: Any) -> None:
    """Convert the image SRC to DST: its layers become lazily readable and stay valid layers for every runtime.

    SRC and DST are a registry reference, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, or both `file:LAYER`, one layer as tar,
    tar.gz or tar.zst. The same input and options give the same bytes.
    """
    layer_options = options_of_layers(options, _read_list(options["prioritized"]))
    if source.startswith("file:") or target.startswith("file:"):
        _convert_file(settings, source, target, layer_options, as_json=as_json)
        return
    image = convert_image(settings, source, target, layer_options, options)
    show_converted(image, target, as_json=as_json)


def options_of_layers(options: dict[str, Any], prioritized: tuple[bytes, ...]) -> LayerOptions:
    """What `writing_options` gave, checked."""
    from p2pgz.convert.layer import LayerOptions
    from p2pgz.convert.writer import DEFAULT_CHUNK_BYTES

    layer_options = LayerOptions(
        format=options["layer_format"],
        chunk_bytes=options["chunk_size"] or DEFAULT_CHUNK_BYTES,
        level=options["level"],
        prioritized=prioritized,
        threads=options["threads"],
    )
    layer_options.check()
    return layer_options


def show_converted(image: ConvertedImage, target: str, *, as_json: bool) -> None:
    """The result of a conversion."""
    for warning in image.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json(
            {
                "digest": str(image.descriptor.digest),
                "layers": [
                    {
                        "source": str(layer.source.digest),
                        "digest": str(layer.target.digest),
                        "bytes": layer.target.size,
                        "kept": layer.written is None,
                    }
                    for layer in image.layers
                ],
                "warnings": list(image.warnings),
            }
        )
    else:
        click.echo(f"{target}@{image.descriptor.digest}")


def _read_list(path: str | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    return tuple(line for line in Path(path).read_bytes().splitlines() if line)


def _convert_file(
    settings: Settings, source: str, target: str, options: LayerOptions, *, as_json: bool
) -> None:
    from p2pgz.convert.file import convert_file

    if not (source.startswith("file:") and target.startswith("file:")):
        raise UsageError(
            "file: is for a single layer on both sides",
            hint="p2pgz convert file:LAYER.tar.gz file:OUT.tar.gz, or name an image on both sides",
        )
    source_path, target_path = absolute(source.removeprefix("file:")), absolute(target.removeprefix("file:"))
    if not source_path.is_file():
        raise ImageNotFound(f"{source_path}: no such file")
    # SIGTERM as Ctrl-C: by an exception, so that nothing half-written stays
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _bars(settings) as bars:
        bar = bars(source_path.name, source_path.stat().st_size)
        written = convert_file(source_path, target_path, options, progress=lambda done: bar(done, "convert"))
    _print_layer(target_path, written, as_json=as_json)


def _print_layer(target: Path, written: WrittenLayer, *, as_json: bool) -> None:
    for warning in written.warnings:
        click.echo(f"warning: {warning}", err=True)
    facts = {
        "digest": str(written.digest),
        "bytes": written.size,
        "diff_id": str(written.diff_id),
        "annotations": written.annotations,
    }
    if as_json:
        print_json(facts)
        return
    click.echo(f"{target}: {written.digest}, {written.size} bytes")
    for key, value in written.annotations.items():
        click.echo(f"{key}={value}")


def convert_image(
    settings: Settings, source: str, target: str, layer_options: LayerOptions, options: dict[str, Any]
) -> ConvertedImage:
    """Convert by these options: those of `registry_options`, and `force`."""
    import trio

    from p2pgz.convert import convert as converting
    from p2pgz.core.platform import Platform
    from p2pgz.core.reference import parse_reference
    from p2pgz.registry import RegistryOptions, open_sink, open_source
    from p2pgz.telemetry import log

    # without this structlog's own default would write debug lines to standard output, among the results
    log.set_up("debug" if settings.verbose else "warning", text=True)
    registry = settings.load().config.registry
    source_reference, target_reference = (
        parse_reference(absolute_reference(text)) for text in (source, target)
    )
    convert_options = converting.ConvertOptions(
        layer=layer_options,
        platform=Platform.parse(options["platform"]) if options["platform"] else None,
        force=options["force"],
    )

    def registry_of(host: str) -> RegistryOptions:
        return RegistryOptions(
            plain_http=options["plain_http"] or host in registry.plain_http,
            ca_file=options["ca_file"] or registry.ca_file,
            hosts_dir=options["hosts_dir"] or registry.hosts_dir,
            docker_config=registry.docker_config,
            user=options["user"] or None,
        )

    async def run() -> ConvertedImage:
        same_host = source_reference.host == target_reference.host
        mount_from = source_reference.repository if same_host else ""
        with _bars(settings) as bars:
            shown: dict[object, Callable[[int, str], None]] = {}

            def report(progress: LayerProgress) -> None:
                bar = shown.get(progress.digest)
                if bar is None:
                    bar = shown[progress.digest] = bars(progress.digest.hex[:12], progress.total_bytes)
                bar(progress.done_bytes, progress.state)

            async with open_source(source_reference, registry_of(source_reference.host)) as opened_source:
                await opened_source.resolve(source_reference)  # before anything is made at the target
                target_options = registry_of(target_reference.host)
                async with open_sink(target_reference, target_options, mount_from=mount_from) as sink:
                    return await converting.convert_image(
                        opened_source,
                        source_reference,
                        sink,
                        target_reference,
                        convert_options,
                        report=report,
                    )

    return trio.run(_until_signal, run)


async def _until_signal(run: Callable[[], Awaitable[ConvertedImage]]) -> ConvertedImage:
    """Run to the end, or cancel at SIGINT and SIGTERM: trio's own KeyboardInterrupt waits for the layer in hand."""
    import trio

    made: list[ConvertedImage] = []
    failed: list[Exception] = []
    caught: list[int] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    caught.append(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                made.append(await run())
            except Exception as error:  # noqa: BLE001  # raised below, outside of the nursery's group
                failed.append(error)
            nursery.cancel_scope.cancel()
    if caught and not made:
        if caught[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + caught[0])
    if failed:
        raise failed[0]
    return made[0]


@contextmanager
def _bars(settings: Settings) -> Iterator[Callable[[str, int], Callable[[int, str], None]]]:
    """A progress bar per layer on a terminal; nothing elsewhere. Callable from worker threads."""
    if settings.quiet or not sys.stderr.isatty():
        yield lambda name, total: lambda done, state: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def add(name: str, total: int) -> Callable[[int, str], None]:
            task = progress.add_task(name, total=total or None, state="")

            def update(done: int, state: str) -> None:
                progress.update(task, completed=done, state=state)

            return update

        yield add
