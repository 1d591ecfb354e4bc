"""A small image as the node keeps it on disk (tree file, one segment, its table, presence), and a node's half of a mount.

`Content` is written down chunk by chunk; which chunks are there at first is the test's choice, and `Supplier` makes the rest
present on demand, counts what it was asked for, and can be made to hang or fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout, SegmentTable
from p2pgz.core.model import Chunk, Entry, Toc
from p2pgz.errors import SourceUnavailable
from p2pgz.image.erofs import write_metadata
from p2pgz.image.merge import LayerInput, merge_layers
from p2pgz.image.treebuild import build_tree
from p2pgz.image.treefile import TreeFile
from p2pgz.mount.attach import move_mount
from p2pgz.mount.hosting import ErofsPart
from p2pgz.mount.segment_client import SegmentClient
from p2pgz.mount.session import FsHost, FsSession, SegmentFiles, SessionOptions
from p2pgz.mount.umount import find_mounts, unmount
from p2pgz.pool.presence import Presence

CHUNK_BYTES = 64 << 10
MODE = "tree"
"""how `mounted` mounts; tests/e2e/erofs runs the same tests with "erofs\""""


class ImageOnDisk:
    """Entries and contents in, files out."""

    def __init__(self, folder: Path, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.folder = folder
        self.contents: dict[bytes, bytes] = {}
        self._chunk_bytes = chunk_bytes
        self._entries: list[Entry] = []
        self._chunks: list[bytes] = []

    def add(self, name: bytes, kind: str = "dir", content: bytes = b"", **attributes: object) -> None:
        """One entry; a regular file's content becomes chunks."""
        chunks = []
        for start in range(0, len(content), self._chunk_bytes):
            piece = content[start : start + self._chunk_bytes]
            n = len(self._chunks)
            chunks.append(Chunk(Digest.of(piece).raw, start, len(piece), n * 100, n * 100 + 100, 0))
            self._chunks.append(piece)
        if kind == "reg":
            self.contents[name] = content
        attributes.setdefault("mode", 0o755)
        self._entries.append(
            Entry(name=name, kind=kind, size=len(content), chunks=tuple(chunks), **attributes)  # type: ignore[arg-type]
        )

    def write(self) -> ImageOnDisk:
        """Make the files; no chunk is present."""
        toc = Toc(Digest.of(repr(self._entries).encode()), self._entries)
        layout = SegmentLayout.build(toc, compression="none")
        table_bytes = layout.to_bytes()
        self.table = SegmentTable(table_bytes)
        self.folder.mkdir(exist_ok=True, parents=True)
        self.table_path, self.data_path = self.folder / "a.chunks", self.folder / "a.seg"
        self.tree_path = self.folder / "a.tree"
        self.table_path.write_bytes(table_bytes)
        with self.data_path.open("wb") as file:
            file.truncate(layout.segment_bytes)
        self.tree_path.write_bytes(build_tree(merge_layers([LayerInput(toc, layout.extents, toc.digest)])))
        self.metadata_path = self.folder / "a.p2pgz-erofs"
        self.metadata_path.write_bytes(write_metadata(TreeFile(self.tree_path.read_bytes())))
        self.presence = Presence.create(self.table.chunk_count)
        return self

    def supply(self, n: int) -> None:
        """Chunk n comes."""
        with self.data_path.open("r+b") as file:
            os.pwrite(file.fileno(), self._chunks[n], self.table.segment_offset[n])
        self.presence.set(n)

    def supply_all(self) -> ImageOnDisk:
        for n in range(self.table.chunk_count):
            self.supply(n)
        return self

    def chunks_of(self, name: bytes) -> range:
        """The chunk numbers of a file."""
        first = 0
        for entry in self._entries:
            if entry.name == name:
                return range(first, first + len(entry.chunks))
            first += len(entry.chunks)
        raise KeyError(name)

    def segment_files(self) -> SegmentFiles:
        return SegmentFiles(
            table_path=self.table_path,
            data_path=self.data_path,
            presence_fd=self.presence.fd,
            presence_count=self.presence.count,
        )

    def options(self, **changes: object) -> SessionOptions:
        fields: dict[str, object] = {
            "tree_path": self.tree_path,
            "segments": [self.segment_files()] if self.table.chunk_count else [],  # as the tree lists them
            "source_name": "registry.example/test:1",
            "read_deadline_seconds": 20.0,
        }
        return SessionOptions(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class Supplier:
    """What a node does for a mount. `hold` keeps requests waiting until it is set again; `failing` refuses them."""

    image: ImageOnDisk
    requests: list[tuple[int, int, int, int]] = field(default_factory=list)
    cancelled: int = 0
    failing: bool = False
    open: trio.Event = field(default_factory=trio.Event)
    asked: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.open.set()

    def hold(self) -> None:
        self.open = trio.Event()

    async def ensure(self, segment: int, first: int, count: int, priority: int) -> None:
        self.requests.append((segment, first, count, priority))
        self.asked.set()
        try:
            await self.open.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if self.failing:
            raise SourceUnavailable("the registry is on holiday")
        for n in range(first, first + count):
            self.image.supply(n)


async def call(function: object, *arguments: object) -> object:
    """Anything that touches a mount runs in a thread: the requests it causes are answered by this loop."""
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)  # type: ignore[arg-type]


async def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """A program that uses a mount."""
    return await trio.run_process(
        [str(word) for word in command], capture_stdout=True, capture_stderr=True, check=False, **options
    )


@dataclass
class Mounted:
    directory: Path
    session: FsSession
    supplier: Supplier
    host: FsHost


@asynccontextmanager
async def mounted(image: ImageOnDisk, directory: Path, **options: object) -> AsyncIterator[Mounted]:
    """Mount, and unmount at the end unless the test did; checks that the process ended well."""
    directory.mkdir(exist_ok=True)
    supplier = Supplier(image)
    async with FsHost.open() as host, SegmentClient.open() as segments:
        if MODE == "erofs":
            opening = ErofsPart(bytes(image.metadata_path), [])
            session = await segments.start_session(opening, image.options(**options), supplier.ensure)
        else:
            session = await host.start_session(image.options(**options), supplier.ensure)
        descriptor = session.take_mount_fd()
        move_mount(descriptor, directory)
        os.close(descriptor)
        try:
            yield Mounted(directory, session, supplier, host)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                if is_mounted(directory):
                    await call(lambda: unmount(directory, lazy=True))
                await session.wait_closed()


def is_mounted(directory: Path) -> bool:
    return str(directory) in {mount.directory for mount in find_mounts()}
