"""Writing OCI image layouts: a directory, or a tar archive that is written once when the sink closes.

A directory is safe to read and to write by others at any time: blobs and index.json appear by rename, and other tags stay.
An archive is made in a directory beside its file and appears by rename, too; what was in it before is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    REF_NAME_ANNOTATION,
    Descriptor,
    parse_manifest_or_index,
)
from p2pgz.core.reference import Reference
from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import ImageInvalid, SourceUnavailable
from p2pgz.registry.archive import ArchiveFiles
from p2pgz.registry.layout import LAYOUT_VERSION, PIECE_BYTES, blob_name
from p2pgz.registry.options import RegistryStats


class LayoutSink:
    """The sink of `open_sink` for `oci:`. Makes the directory if it is not there."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.stats = RegistryStats()
        self._folder = folder
        self._updating = trio.Lock()

    async def prepare(self) -> None:
        """Make the directory a layout; raises SourceUnavailable when that cannot be."""
        await self._in_thread(self._prepare)

    def _prepare(self) -> None:
        (self._folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        if not (self._folder / "oci-layout").exists():
            _replace(self._folder / "oci-layout", json.dumps({"imageLayoutVersion": LAYOUT_VERSION}).encode())

    async def has_blob(self, digest: str) -> bool:
        """Whether the layout has the blob."""
        return bool(await self._in_thread((self._folder / blob_name(Digest.parse(digest))).is_file))

    async def put_blob(self, descriptor: Descriptor, read: Callable[[], AsyncIterator[bytes]]) -> None:
        """Write a blob whose bytes must be what the descriptor says."""
        path = self._folder / blob_name(descriptor.digest)
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        hasher = hashlib.sha256()
        size = 0
        try:
            passing = cast("AsyncGenerator[bytes, None]", read())
            async with await trio.open_file(temporary, "xb") as file, aclosing(passing) as pieces:
                async for piece in pieces:
                    size += len(piece)
                    hasher.update(piece)
                    await file.write(piece)
            if size != descriptor.size or hasher.digest() != descriptor.digest.raw:
                raise ImageInvalid(
                    f"{self.name}: {descriptor.digest} of {descriptor.size} bytes came as {size} bytes of other content"
                )
            await self._in_thread(temporary.replace, path)
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: {path.name}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.stats.sent_bytes += size

    async def put_document(self, document: bytes, media_type: str, reference: Reference | None) -> Descriptor:
        """Write a manifest or index; with a tagged reference index.json names it, in place of what had the tag."""
        descriptor = Descriptor(media_type=media_type, digest=Digest.of(document), size=len(document))
        await self._in_thread(_replace, self._folder / blob_name(descriptor.digest), document)
        self.stats.sent_bytes += len(document)
        if reference is not None:
            async with self._updating:
                await self._in_thread(self._name_it, descriptor, reference.tag)
        return descriptor

    def _name_it(self, descriptor: Descriptor, tag: str) -> None:
        path = self._folder / "index.json"
        index: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        with suppress(FileNotFoundError):
            with path.open("rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
            parse_manifest_or_index(data, where=f"{self.name}: index.json")  # nothing odd is written back
            index = parse_strict(data, where=f"{self.name}: index.json")
        entry: dict[str, Any] = {
            "mediaType": descriptor.media_type,
            "digest": str(descriptor.digest),
            "size": descriptor.size,
        }
        if tag:
            entry["annotations"] = {REF_NAME_ANNOTATION: tag}
        kept = [
            other
            for other in index["manifests"]
            if _tag_of(other) != tag or (not tag and other["digest"] != entry["digest"])
        ]
        index["manifests"] = [*kept, entry]
        _replace(path, json.dumps(index, indent=1, ensure_ascii=False).encode())

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await trio.to_thread.run_sync(work, *arguments)
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: cannot be written: {error.strerror}") from error


def _tag_of(entry: dict[str, Any]) -> str:
    return str((entry.get("annotations") or {}).get(REF_NAME_ANNOTATION, ""))


def _replace(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@asynccontextmanager
async def open_archive_sink(name: str, path: Path) -> AsyncIterator[LayoutSink]:
    """A sink whose blobs become the tar archive `path` when the context ends well, together with what it held before."""
    try:
        folder = Path(
            await trio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        )
    except OSError as error:
        raise SourceUnavailable(f"{name}: cannot be written: {error.strerror}") from error
    try:
        sink = LayoutSink(name, folder)
        if path.exists():
            await trio.to_thread.run_sync(_unpack, path, folder, name)
        await sink.prepare()
        yield sink
        try:
            await trio.to_thread.run_sync(_pack, folder, path)
        except OSError as error:
            raise SourceUnavailable(f"{name}: cannot be written: {error.strerror}") from error
    finally:
        with trio.CancelScope(shield=True):  # bounded by the local disk
            await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


def _unpack(path: Path, folder: Path, name: str) -> None:
    """Copy an archive's layout files; member names are ours, since `ArchiveFiles` knows no others."""
    with ArchiveFiles.open(path, name) as files:
        for member in files.names():
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for start in range(0, files.size(member), PIECE_BYTES):
                    file.write(files.read(member, start, PIECE_BYTES))


def _pack(folder: Path, path: Path) -> None:
    """Write the archive: the small files first, in a fixed order with fixed metadata: equal layouts are equal archives."""
    temporary = folder / "archive.tar"
    blobs = sorted(
        f"blobs/sha256/{blob.name}"
        for blob in (folder / "blobs" / "sha256").iterdir()
        if len(blob.name) == 64
    )
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("oci-layout", "index.json", *blobs):
            if not (folder / name).exists():
                continue
            member = tarfile.TarInfo(name)
            member.size = (folder / name).stat().st_size
            member.mode = 0o644
            with (folder / name).open("rb") as file:
                archive.addfile(member, file)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
