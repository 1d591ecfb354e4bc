"""What the node remembers beside chunks: objects, images, tags, pins, mounts and heat. All in the index.

Objects are TOCs, manifests and configs by digest; they are checked again when read. The records are plain
values; what they mean for eviction and restart is decided by `node` and the eviction policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog
import trio
import zstandard

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.errors import StateError
from p2pgz.pool.index import Index
from p2pgz.pool.segment import SHARED_DOMAIN, Segment

log = structlog.get_logger(component="pool")

# The TOC of 300 000 entries has 109 MB
MAX_OBJECT_BYTES = 512 << 20
# TOCs shrink to a tenth, and a smaller database is read and written faster; small documents are not worth it
_PACK_FROM_BYTES = 4096
_PACK_LEVEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """An image that this host has opened. Times are seconds since 1970."""

    manifest: Digest
    reference: str
    tree_path: str
    segments: tuple[Digest, ...]
    created: float
    last_mount: float = 0.0
    domain: str = SHARED_DOMAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRecord:
    """The manifest that a reference meant for a platform when a registry was last asked. Times are seconds since 1970."""

    reference: str
    platform: str
    digest: Digest
    resolved: float


USER: Final = "user"
"""the owner of what people pin themselves"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRecord:
    """An image that is kept. It stays pinned until its last owner lets go of it."""

    manifest: Digest
    owner: str
    reference: str
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRecord:
    """An image that this node keeps whole for others. `request` is a document of the node's."""

    reference: str
    platform: str
    origin: str
    request: str
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    """A mount of this node; `options` is a document of the node's."""

    id: str
    directory: str
    manifest: Digest
    options: str
    since: float


class Catalog:
    """Reads are synchronous, except of objects."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def put_object(self, digest: Digest, data: bytes, *, domain: str = SHARED_DOMAIN) -> None:
        """Keep a document under its digest; raises ValueError when it is another one's. Idempotent."""
        if len(data) > MAX_OBJECT_BYTES:
            raise StateError(f"{digest}: {len(data)} bytes are too many for the index")

        def pack() -> tuple[bytes, bool]:
            if hashlib.sha256(data).digest() != digest.raw:
                raise ValueError(f"these bytes are not {digest}")
            if len(data) >= _PACK_FROM_BYTES:
                packed = zstandard.ZstdCompressor(level=_PACK_LEVEL).compress(data)
                if len(packed) < len(data):
                    return packed, True
            return data, False

        stored, packed = await trio.to_thread.run_sync(pack)
        await self._index.write_spare(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO objects(domain, digest, size, packed, data) VALUES(?, ?, ?, ?, ?)",
                (domain, digest.raw, len(data), int(packed), stored),
            )
        )

    async def get_object(self, digest: Digest, *, domain: str = SHARED_DOMAIN) -> bytes | None:
        """A document by its digest, checked; None when it is not here or damaged (it is dropped then)."""
        sql = "SELECT size, packed, data FROM objects WHERE domain = ? AND digest = ?"
        rows = self._index.rows(sql, (domain, digest.raw))
        if not rows:
            await trio.lowlevel.checkpoint()
            return None
        size, packed, stored = rows[0]

        def unpack() -> bytes | None:
            data: bytes = stored
            if packed:
                try:
                    with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
                        data = reader.read(min(size, MAX_OBJECT_BYTES) + 1)
                except zstandard.ZstdError:
                    return None
            return data if hashlib.sha256(data).digest() == digest.raw else None

        checked = await trio.to_thread.run_sync(unpack)
        if checked is None:
            log.error("index.object_damaged", digest=str(digest), effect="it is fetched again")
            await self._execute("DELETE FROM objects WHERE domain = ? AND digest = ?", (domain, digest.raw))
        return checked

    async def put_image(self, image: ImageRecord) -> None:
        """Remember an image, replacing what was known of it."""
        segments = b"".join(segment.raw for segment in image.segments)
        await self._execute(
            "INSERT OR REPLACE INTO images(domain, manifest, reference, tree_path, segments, created, last_mount)"
            " VALUES(?, ?, ?, ?, ?, ?, ?)",
            (
                image.domain,
                image.manifest.raw,
                image.reference,
                image.tree_path,
                segments,
                image.created,
                image.last_mount,
            ),
        )

    def images(self, manifest: Digest | None = None) -> list[ImageRecord]:
        """All images, or those with this manifest."""
        sql = "SELECT domain, manifest, reference, tree_path, segments, created, last_mount FROM images"
        where, bindings = ("", ()) if manifest is None else (" WHERE manifest = ?", (manifest.raw,))
        return [
            ImageRecord(
                domain=domain,
                manifest=Digest(raw),
                reference=reference,
                tree_path=tree_path,
                segments=tuple(
                    Digest(segments[at : at + SHA256_BYTES]) for at in range(0, len(segments), SHA256_BYTES)
                ),
                created=created,
                last_mount=last_mount,
            )
            for domain, raw, reference, tree_path, segments, created, last_mount in self._index.rows(
                sql + where, bindings
            )
        ]

    async def remove_image(self, manifest: Digest, *, domain: str = SHARED_DOMAIN) -> None:
        """Forget an image."""
        await self._execute("DELETE FROM images WHERE domain = ? AND manifest = ?", (domain, manifest.raw))

    async def set_tag(self, tag: TagRecord) -> None:
        """Remember what a reference means."""
        await self._execute(
            "INSERT OR REPLACE INTO tags(reference, platform, digest, resolved) VALUES(?, ?, ?, ?)",
            (tag.reference, tag.platform, tag.digest.raw, tag.resolved),
        )

    def tag(self, reference: str, platform: str) -> TagRecord | None:
        """What a reference meant for a platform when it was last resolved."""
        for raw, resolved in self._index.rows(
            "SELECT digest, resolved FROM tags WHERE reference = ? AND platform = ?", (reference, platform)
        ):
            return TagRecord(reference=reference, platform=platform, digest=Digest(raw), resolved=resolved)
        return None

    async def pin(self, manifest: Digest, reference: str, since: float, *, owner: str = USER) -> None:
        """Keep an image's chunks whatever the quota says. Idempotent."""
        await self._execute(
            "INSERT OR IGNORE INTO pins(manifest, owner, reference, since) VALUES(?, ?, ?, ?)",
            (manifest.raw, owner, reference, since),
        )

    async def unpin(self, manifest: Digest, *, owner: str = USER) -> None:
        """Undo `pin` of the same owner."""
        await self._execute("DELETE FROM pins WHERE manifest = ? AND owner = ?", (manifest.raw, owner))

    def pins(self, owner: str | None = None) -> list[PinRecord]:
        """What is pinned, by whom (or by this owner alone), and the references it was pinned by."""
        rows = self._index.rows("SELECT manifest, owner, reference, since FROM pins ORDER BY since, owner")
        return [
            PinRecord(manifest=Digest(raw), owner=of, reference=reference, since=since)
            for raw, of, reference, since in rows
            if owner in (None, of)
        ]

    async def put_seed(self, seed: SeedRecord) -> None:
        """Remember a seed, replacing what was known of it."""
        await self._execute(
            "INSERT OR REPLACE INTO seeds(reference, platform, origin, request, since) VALUES(?, ?, ?, ?, ?)",
            (seed.reference, seed.platform, seed.origin, seed.request, seed.since),
        )

    async def remove_seed(self, reference: str, platform: str) -> None:
        """Forget a seed."""
        await self._execute("DELETE FROM seeds WHERE reference = ? AND platform = ?", (reference, platform))

    def seeds(self) -> list[SeedRecord]:
        """All seeds on record."""
        return [
            SeedRecord(reference=reference, platform=platform, origin=origin, request=request, since=since)
            for reference, platform, origin, request, since in self._index.rows(
                "SELECT reference, platform, origin, request, since FROM seeds ORDER BY since, reference"
            )
        ]

    def pinned_segments(self) -> set[tuple[str, Digest]]:
        """Domain and id of the segments of pinned images, as far as the images are on record."""
        rows = self._index.rows(
            "SELECT domain, segments FROM images JOIN pins ON images.manifest = pins.manifest"
        )
        return {
            (domain, Digest(segments[at : at + SHA256_BYTES]))
            for domain, segments in rows
            for at in range(0, len(segments), SHA256_BYTES)
        }

    def known_segments(self) -> set[tuple[str, Digest]]:
        """Domain and id of the segments of all images on record."""
        return {(image.domain, segment) for image in self.images() for segment in image.segments}

    async def put_mount(self, mount: MountRecord) -> None:
        """Remember a mount."""
        await self._execute(
            "INSERT OR REPLACE INTO mounts(id, directory, manifest, options, since) VALUES(?, ?, ?, ?, ?)",
            (mount.id, mount.directory, mount.manifest.raw, mount.options, mount.since),
        )

    async def remove_mount(self, mount_id: str) -> None:
        """Forget a mount."""
        await self._execute("DELETE FROM mounts WHERE id = ?", (mount_id,))

    def mounts(self) -> list[MountRecord]:
        """All mounts on record."""
        return [
            MountRecord(id=mount_id, directory=directory, manifest=Digest(raw), options=options, since=since)
            for mount_id, directory, raw, options, since in self._index.rows(
                "SELECT id, directory, manifest, options, since FROM mounts ORDER BY since"
            )
        ]

    async def note_mounted(self, segments: Iterable[Segment], when: float) -> None:
        """Segments were mounted: the first measure of what to keep."""
        rows = [(when, segment.row) for segment in segments]
        await self._index.write(
            lambda connection: connection.executemany(
                "UPDATE segments SET last_mount = ?, heat = heat + 1 WHERE row = ?", rows
            )
        )

    async def note_reads(self, segment: Segment, reads: Mapping[int, int], when: float) -> None:
        """Chunks were read so many times: the second measure."""
        rows = [(segment.row, n, count, when) for n, count in reads.items()]
        await self._index.write(
            lambda connection: connection.executemany(
                "INSERT INTO heat(segment, n, reads, last) VALUES(?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET reads = reads + excluded.reads, last = excluded.last",
                rows,
            )
        )

    def heat(self, segment: Segment) -> dict[int, tuple[int, float]]:
        """Chunk → (reads, last read) of a segment, for those that were noted."""
        rows = self._index.rows("SELECT n, reads, last FROM heat WHERE segment = ?", (segment.row,))
        return {n: (reads, last) for n, reads, last in rows}

    async def _execute(self, sql: str, bindings: tuple[object, ...]) -> None:
        await self._index.write(lambda connection: connection.execute(sql, bindings))
