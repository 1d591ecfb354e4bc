"""The contract of a pool as code, for the real one and the fake.

`POOL_CASES` are async functions that take an open pool; a test runs each of them on every implementation.
`Layer` makes a TOC with known bytes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from p2pgz.core.content import content_key
from p2pgz.core.digest import Digest
from p2pgz.core.layout import SegmentLayout
from p2pgz.core.model import Chunk, ChunkKind, Entry, Toc
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ChunkMissing, StateError
from p2pgz.pool.pool import SegmentMeta


class Layer:
    """A layer whose files are given as lists of chunks' bytes; the chunks numbered in `zeros` are listed as zeros.

    `chunks[n]` has the bytes of chunk n, in TOC order.
    """

    def __init__(
        self, files: Sequence[Sequence[bytes]], *, zeros: Sequence[int] = (), name: bytes = b""
    ) -> None:
        self.chunks: list[bytes] = []
        entries = []
        offset = 0
        for index, parts in enumerate(files):
            chunks = []
            at = 0
            for data in parts:
                kind = ChunkKind.ZEROS if len(self.chunks) in zeros else ChunkKind.DATA
                digest = hashlib.sha256(data).digest()
                chunks.append(Chunk(digest, at, len(data), offset, offset + len(data) + 20, 0, kind))
                self.chunks.append(data)
                at += len(data)
                offset += len(data) + 20
            entries.append(Entry(name=b"f%d" % index, kind="reg", size=at, chunks=tuple(chunks)))
        self.toc = Toc(Digest.of(name + b"".join(hashlib.sha256(c).digest() for c in self.chunks)), entries)
        self.layout = SegmentLayout.build(self.toc, compression="gzip")

    @classmethod
    def random(cls, seed: int, *, files: int = 12, chunk_max_bytes: int = 20_000, name: bytes = b"") -> Layer:
        """Some files of one to four chunks with odd sizes."""
        rng = random.Random(seed)
        return cls(
            [
                [rng.randbytes(rng.randint(1, chunk_max_bytes) | 1) for _ in range(rng.randint(1, 4))]
                for _ in range(files)
            ],
            name=name,
        )

    def verified(self, n: int) -> VerifiedChunk:
        """Chunk n, ready to be added."""
        return verify(hashlib.sha256(self.chunks[n]).digest(), self.chunks[n], source="test")

    def all_verified(self) -> list[tuple[int, VerifiedChunk]]:
        """All of them."""
        return [(n, self.verified(n)) for n in range(len(self.chunks))]

    def file_keys(self) -> list[bytes]:
        """The content keys of its files."""
        return [content_key(entry.chunks) for entry in self.toc.entries if entry.chunks]


async def _acknowledge() -> None:
    await trio.lowlevel.checkpoint()


def check_content(segment: Any, layer: Layer) -> int:
    """Assert that every present chunk reads as it should, by chunk and by address; returns how many there are."""
    present = 0
    for n, data in enumerate(layer.chunks):
        if segment.presence.has(n):
            present += 1
            assert segment.view(n) == data
            assert segment.file_view(segment.table.segment_offset[n], len(data)) == data
    return present


async def what_is_added_reads_back(pool: Any) -> None:
    """Chunks are present when `add` returns, and are a slice of the file."""
    layer = Layer.random(1)
    segment = await pool.open_segment(layer.layout)
    assert segment.presence.present_count() == 0
    for n in range(0, len(layer.chunks), 2):
        await pool.add(segment, n, layer.verified(n))
        assert segment.presence.has(n)
    assert check_content(segment, layer) == (len(layer.chunks) + 1) // 2
    try:
        segment.view(1)
    except ChunkMissing:
        pass
    else:
        raise AssertionError("an absent chunk was readable")
    await pool.add_many(segment, layer.all_verified())
    await pool.add_many(segment, layer.all_verified())
    assert check_content(segment, layer) == len(layer.chunks)
    await pool.flush()
    assert pool.stats().chunks == len(layer.chunks)
    assert pool.stats().bytes == sum(map(len, layer.chunks))


async def files_are_contiguous_and_padded_with_zeros(pool: Any) -> None:
    """A whole file is one slice; what follows it up to the page's end is zeros."""
    layer = Layer.random(2)
    segment = await pool.open_segment(layer.layout)
    await pool.add_many(segment, layer.all_verified())
    for index, extent in layer.layout.extents.items():
        chunks = range(extent.first_chunk, extent.first_chunk + extent.chunk_count)
        size = layer.toc.entries[index].size
        expected = b"".join(layer.chunks[n] for n in chunks)
        padding = -size % 4096
        assert segment.file_view(extent.segment_offset, size + padding) == expected + bytes(padding)
        assert segment.file_of(chunks[-1]) == extent


async def opening_again_gives_the_same_segment(pool: Any) -> None:
    """By layout, by table bytes, by id; another table under the same id is refused."""
    layer = Layer.random(3)
    segment = await pool.open_segment(layer.layout)
    assert await pool.open_segment(layer.layout) is segment
    assert await pool.open_segment(layer.layout.to_bytes()) is segment
    assert pool.segment(segment.id) is segment
    assert pool.segment(Digest.of(b"no such")) is None
    other = SegmentLayout.build(Toc(layer.toc.digest, Layer.random(4).toc.entries), compression="gzip")
    try:
        await pool.open_segment(other)
    except StateError:
        pass
    else:
        raise AssertionError("a second table for one digest was accepted")


async def other_bytes_are_refused(pool: Any) -> None:
    """A verified chunk in the wrong place is a bug of the caller's, and changes nothing."""
    layer = Layer.random(5)
    segment = await pool.open_segment(layer.layout)
    try:
        await pool.add(segment, 0, layer.verified(1))
    except ValueError:
        pass
    else:
        raise AssertionError("a chunk was put in another one's place")
    assert segment.presence.present_count() == 0


async def chunks_of_zeros_stay_holes(pool: Any) -> None:
    """Nothing is written for them, they read as zeros, and a TOC that lies about them is caught."""
    layer = Layer([[b"x" * 5000, bytes(300_000), b"y" * 17], [b"not zeros" * 100]], zeros=(1, 3))
    segment = await pool.open_segment(layer.layout)
    await pool.add_many(segment, [(n, layer.verified(n)) for n in (0, 1, 2)])
    assert check_content(segment, layer) == 3
    await pool.flush()
    assert pool.stats().bytes == 5017
    try:
        await pool.add(segment, 3, layer.verified(3))
    except ChunkCorrupt:
        pass
    else:
        raise AssertionError("bytes were taken for a chunk of zeros")
    assert not segment.presence.has(3)
    assert not await pool.copy_from(segment, 3)


async def chunks_are_found_and_copied_within_a_domain(pool: Any) -> None:
    """What one segment has another one gets without a source; another domain's segments do not count."""
    big = random.Random(6).randbytes(150_000)
    a = Layer([[b"common" * 50], [big, b"tail"]], name=b"a")
    b = Layer([[b"other"], [b"common" * 50, big]], name=b"b")
    first = await pool.open_segment(a.layout)
    second = await pool.open_segment(b.layout)
    stranger = await pool.open_segment(b.layout, SegmentMeta(domain="secret"))
    assert stranger is not second
    await pool.add_many(first, a.all_verified())
    for flushed in (False, True):
        if flushed:
            await pool.flush()
        assert pool.find("shared", second.table.digest(2)) == (first, 1)
        assert pool.find("shared", second.table.digest(0)) is None
        assert pool.find("secret", second.table.digest(2)) is None
    assert [await pool.copy_from(second, n) for n in range(3)] == [False, True, True]
    assert check_content(second, b) == 2
    assert not await pool.copy_from(stranger, 1)
    assert stranger.presence.present_count() == 0


async def removed_chunks_are_gone_and_can_come_back(pool: Any) -> None:
    """The order of a removal, what is left alone, and a failed acknowledgement."""
    layer = Layer.random(7, files=30)
    segment = await pool.open_segment(layer.layout)
    await pool.add_many(segment, layer.all_verified())
    await pool.flush()
    doomed = range(3, len(layer.chunks), 3)

    async def refuse() -> None:
        await trio.lowlevel.checkpoint()
        assert not any(segment.presence.has(n) for n in doomed)
        raise RuntimeError("a reply is stuck")

    try:
        await pool.remove_chunks(segment, doomed, refuse)
    except RuntimeError:
        pass
    else:
        raise AssertionError("the failure was swallowed")
    assert check_content(segment, layer) == len(layer.chunks)
    freed = await pool.remove_chunks(segment, doomed, _acknowledge)
    assert freed == sum(len(layer.chunks[n]) for n in doomed)
    assert check_content(segment, layer) == len(layer.chunks) - len(doomed)
    assert all(pool.find("shared", segment.table.digest(n)) is None for n in doomed)
    assert pool.stats().bytes == sum(map(len, layer.chunks)) - freed
    await pool.add_many(segment, layer.all_verified())
    assert check_content(segment, layer) == len(layer.chunks)
    await pool.mark_native(segment)
    try:
        await pool.remove_chunks(segment, [0], _acknowledge)
    except StateError:
        pass
    else:
        raise AssertionError("a natively served segment was punched")
    await pool.drop_segment(segment, _acknowledge)
    assert pool.segment(layer.toc.digest) is None
    again = await pool.open_segment(layer.layout)
    assert again.presence.present_count() == 0


async def complete_files_are_offered(pool: Any) -> None:
    """Only complete ones, only in their domain, and no longer after a removal."""
    layer = Layer.random(8)
    assert pool.lookup_files("shared", layer.file_keys()) == {}
    segment = await pool.open_segment(layer.layout)
    left_out = len(layer.chunks) - 1
    await pool.add_many(segment, [(n, c) for n, c in layer.all_verified() if n != left_out])
    await pool.flush()
    found = pool.lookup_files("shared", layer.file_keys())
    assert set(found) == set(layer.file_keys()[:-1])
    for index, key in enumerate(layer.file_keys()[:-1]):
        assert found[key] == (segment.id, *layer.layout.extents[index])
    assert pool.lookup_files("secret", layer.file_keys()) == {}
    await pool.add(segment, left_out, layer.verified(left_out))
    await pool.flush()
    assert set(pool.lookup_files("shared", layer.file_keys())) == set(layer.file_keys())
    await pool.remove_chunks(segment, [0], _acknowledge)
    assert layer.file_keys()[0] not in pool.lookup_files("shared", layer.file_keys())


async def objects_are_kept_by_digest(pool: Any) -> None:
    """Small and large, per domain; others' bytes are refused."""
    for data in (b"{}", b'{"entries": []}' * 10_000, random.Random(9).randbytes(10_000), b""):
        digest = Digest.of(data)
        assert await pool.get_object(digest) is None
        await pool.put_object(digest, data)
        await pool.put_object(digest, data)
        assert await pool.get_object(digest) == data
        assert await pool.get_object(digest, domain="secret") is None
    try:
        await pool.put_object(Digest.of(b"a"), b"b")
    except ValueError:
        pass
    else:
        raise AssertionError("an object was stored under another one's digest")


async def empty_layers_have_empty_segments(pool: Any) -> None:
    """A layer without bytes: no chunk, no file to map, nothing special for the callers."""
    segment = await pool.open_segment(Layer([]).layout)
    assert segment.table.chunk_count == 0
    assert segment.presence.has_range(0, 0)
    assert segment.file_view(0, 0) == b""
    await pool.add_many(segment, [])
    await pool.flush()


POOL_CASES: list[Callable[[Any], Awaitable[None]]] = [
    what_is_added_reads_back,
    files_are_contiguous_and_padded_with_zeros,
    opening_again_gives_the_same_segment,
    other_bytes_are_refused,
    chunks_of_zeros_stay_holes,
    chunks_are_found_and_copied_within_a_domain,
    removed_chunks_are_gone_and_can_come_back,
    complete_files_are_offered,
    objects_are_kept_by_digest,
    empty_layers_have_empty_segments,
]
