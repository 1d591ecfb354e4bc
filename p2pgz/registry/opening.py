"""From a reference to a source or sink: the door of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pgz.core.reference import Reference
from p2pgz.errors import ImageNotFound
from p2pgz.registry.archive import ArchiveFiles
from p2pgz.registry.client import open_client
from p2pgz.registry.layout import DirectoryFiles, LayoutSource
from p2pgz.registry.layout_sink import LayoutSink, open_archive_sink
from p2pgz.registry.options import RegistryOptions, RetryPolicy
from p2pgz.registry.push import RegistrySink
from p2pgz.registry.source import Pace, RegistrySource


@asynccontextmanager
async def open_source(
    reference: Reference,
    options: RegistryOptions,
    *,
    retry: RetryPolicy | None = None,
    pace: Pace | None = None,
) -> AsyncIterator[RegistrySource | LayoutSource]:
    """Where the image of this reference is read from; for a registry nothing is asked yet."""
    if reference.transport == "registry":
        async with open_client(reference.host, reference.repository, options, retry) as client:
            yield RegistrySource(client, pace)
    elif reference.transport == "oci":
        folder = Path(reference.path)
        if not folder.is_dir():
            raise ImageNotFound(
                f"{reference.name}: no such directory", hint="oci-archive:FILE is for archives"
            )
        source = LayoutSource(reference.name, DirectoryFiles(folder))
        await source.check()
        yield source
    else:
        opening = ArchiveFiles.open(Path(reference.path), reference.name)
        # indexing reads every header: not on the event loop
        files = await trio.to_thread.run_sync(opening.__enter__)
        try:
            source = LayoutSource(reference.name, files)
            await source.check()
            yield source
        finally:
            opening.__exit__(None, None, None)


@asynccontextmanager
async def open_sink(
    reference: Reference, options: RegistryOptions, *, mount_from: str = "", retry: RetryPolicy | None = None
) -> AsyncIterator[RegistrySink | LayoutSink]:
    """Where the image of this reference is written to. `mount_from`: see RegistrySink; layouts do not look at it."""
    if reference.transport == "registry":
        async with open_client(reference.host, reference.repository, options, retry) as client:
            yield RegistrySink(client, mount_from=mount_from)
    elif reference.transport == "oci":
        sink = LayoutSink(reference.name, Path(reference.path))
        await sink.prepare()
        yield sink
    else:
        async with open_archive_sink(reference.name, Path(reference.path)) as archive:
            yield archive
