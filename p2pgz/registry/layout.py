"""OCI image layouts on disk, a directory or a tar archive of one, as ImageSource and ImageSink (image layout spec 1.1).

File names are made from parsed digests only, so nothing in an index can lead outside. Documents are checked against their
descriptors; blob ranges are not verified, as with a registry. `archive` knows where a tar's members are; a directory's files
are opened as they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.media import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    REF_NAME_ANNOTATION,
    SIZE_UNKNOWN,
    Descriptor,
    Index,
    check_document,
    parse_manifest_or_index,
)
from p2pgz.core.reference import Reference
from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import ImageInvalid, ImageNotFound, SourceUnavailable
from p2pgz.registry.options import RegistryStats

MAX_DOCUMENT_BYTES = 128 << 20  # as for registries: read into memory
PIECE_BYTES = 256 << 10  # one pread in a thread: 60 us for the hop, about as much for the copy
MAX_MARKER_BYTES = 4096  # of the file oci-layout
LAYOUT_VERSION = "1.0.0"  # the only one there is


class Files(Protocol):
    """The files of a layout, by their name in it. Blocking; called in threads, several at a time."""

    def size(self, name: str) -> int:
        """Bytes of a regular file; raises FileNotFoundError."""
        ...

    def read(self, name: str, start: int, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end."""
        ...


class DirectoryFiles:
    """A layout that is a directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        with self._open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, start: int, count: int) -> bytes:
        with self._open(name) as file:
            return read_fully(file.fileno(), start, count)

    def _open(self, name: str) -> BinaryIO:
        path = self._folder / name
        # a FIFO would block for ever, a device may do worse
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb", buffering=0)
        if not path.is_file():
            file.close()
            raise FileNotFoundError(2, "not a regular file", str(path))
        return file


def read_fully(descriptor: int, start: int, count: int) -> bytes:
    """pread that is short at the end of the file only."""
    data = os.pread(descriptor, count, start)
    while data and len(data) < count:
        more = os.pread(descriptor, count - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


class LayoutSource:
    """The source of `open_source` for `oci:` and `oci-archive:`."""

    def __init__(self, name: str, files: Files) -> None:
        self.name = name
        self.stats = RegistryStats()
        self._files = files

    async def check(self) -> None:
        """Raise ImageNotFound or ImageInvalid when this is not an image layout."""
        marker = await self._read(
            "oci-layout", MAX_MARKER_BYTES, missing=f"{self.name}: not an OCI image layout"
        )
        document = parse_strict(marker, where=f"{self.name}: oci-layout")
        version = document.get("imageLayoutVersion") if isinstance(document, dict) else None
        if version != LAYOUT_VERSION:
            raise ImageInvalid(
                f"{self.name}: imageLayoutVersion is {str(version)[:40]!r}, not {LAYOUT_VERSION}"
            )

    async def resolve(self, reference: Reference) -> Descriptor:
        """The descriptor that index.json has for the tag; without a tag its only image."""
        if reference.digest is not None:
            return await self._by_digest(reference.digest)
        index = await self._index()
        images = [entry for entry in index.manifests if entry.media_type in MANIFEST_TYPES | INDEX_TYPES]
        if not reference.tag:
            if len(images) == 1:
                return images[0]
            raise ImageNotFound(
                f"{self.name}: {len(images)} images, and no tag says which", hint=_known(images)
            )
        for entry in images:
            if entry.annotations.get(REF_NAME_ANNOTATION) == reference.tag:
                return entry
        # containerd and podman write the whole reference
        ending = [
            entry
            for entry in images
            if entry.annotations.get(REF_NAME_ANNOTATION, "").endswith(f":{reference.tag}")
        ]
        if len(ending) == 1:
            return ending[0]
        raise ImageNotFound(f"{self.name}: no tag {reference.tag}", hint=_known(images))

    async def _by_digest(self, digest: Digest) -> Descriptor:
        for entry in (await self._index()).manifests:
            if entry.digest == digest:
                return entry
        size = await self._size(digest)
        if size > MAX_MANIFEST_BYTES:
            raise ImageInvalid(f"{self.name}: {digest} is no manifest: {size} bytes")
        return Descriptor(media_type="", digest=digest, size=size)

    async def _index(self) -> Index:
        data = await self._read("index.json", MAX_MANIFEST_BYTES, missing=f"{self.name}: has no index.json")
        index = parse_manifest_or_index(data, where=f"{self.name}: index.json")
        if not isinstance(index, Index):
            raise ImageInvalid(f"{self.name}: index.json is not an index")
        return index

    async def document(self, descriptor: Descriptor) -> bytes:
        """The bytes of a document, verified."""
        is_manifest = descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES or descriptor.size == SIZE_UNKNOWN
        most = MAX_MANIFEST_BYTES if is_manifest else MAX_DOCUMENT_BYTES
        if descriptor.size > most:
            raise ImageInvalid(
                f"{self.name}: {descriptor.digest}: a document of {descriptor.size} bytes, the limit is {most}"
            )
        data = await self._read(blob_name(descriptor.digest), most, missing=self._no_blob(descriptor.digest))
        check_document(descriptor, data, where=self.name)
        return data

    @asynccontextmanager
    async def blob(self, descriptor: Descriptor, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Stream exactly the bytes `start` .. `end` of a blob, not verified."""
        if not 0 <= start <= end <= descriptor.size:
            raise ValueError(f"{start}..{end} is not a range of a blob of {descriptor.size} bytes")
        async with aclosing(self._stream(descriptor, start, end)) as pieces:
            yield pieces

    async def _stream(self, descriptor: Descriptor, start: int, end: int) -> AsyncGenerator[bytes, None]:
        if start == end:
            return
        size = await self._size(descriptor.digest)
        if size != descriptor.size:
            raise SourceUnavailable(
                f"{self.name}: {descriptor.digest} has {size} bytes there, not {descriptor.size}"
            )
        self.stats.requests += 1
        name = blob_name(descriptor.digest)
        while start < end:
            count = min(end - start, PIECE_BYTES)
            try:
                piece = await trio.to_thread.run_sync(self._files.read, name, start, count)
            except OSError as error:
                raise SourceUnavailable(f"{self.name}: {descriptor.digest}: {error.strerror}") from error
            if len(piece) != count:
                raise SourceUnavailable(
                    f"{self.name}: {descriptor.digest} was cut short at {start + len(piece)}"
                )
            start += count
            self.stats.received_bytes += count
            yield piece

    async def _size(self, digest: Digest) -> int:
        try:
            return await trio.to_thread.run_sync(self._files.size, blob_name(digest))
        except FileNotFoundError as error:
            raise ImageNotFound(self._no_blob(digest)) from error
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: {digest}: {error.strerror}") from error

    def _no_blob(self, digest: Digest) -> str:
        return f"{self.name}: no blob {digest}"

    async def _read(self, name: str, limit_bytes: int, *, missing: str) -> bytes:
        try:
            data = await trio.to_thread.run_sync(self._files.read, name, 0, limit_bytes + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageNotFound(missing) from error
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: {name}: {error.strerror}") from error
        self.stats.requests += 1
        self.stats.received_bytes += len(data)
        if len(data) > limit_bytes:
            raise ImageInvalid(f"{self.name}: {name} is longer than {limit_bytes} bytes")
        return data


def blob_name(digest: Digest) -> str:
    """The file of a blob in a layout."""
    return f"blobs/sha256/{digest.hex}"


def _known(images: list[Descriptor]) -> str:
    tags = sorted(entry.annotations.get(REF_NAME_ANNOTATION, str(entry.digest)) for entry in images)
    return f"there is: {', '.join(tags[:20])}" if tags else "there are no images in it"
