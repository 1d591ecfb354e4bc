"""Indexes that somebody else made: true ones pass, and no lie about stream, names, modes or places does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.indexcheck import IndexCheck
from p2pgz.core.indexdoc import from_bytes, to_bytes
from p2pgz.core.model import Entry
from p2pgz.core.ownindex import PlainIndex, PlainIndexer, segment_toc
from p2pgz.errors import ImageInvalid

BLOBS = Path(__file__).parents[2] / "vectors" / "blobs"
NAMES = [
    "basic",
    "links",
    "meta",
    "empty",
    "hlorder",
    "sparse-gnu",
    "sparse-pax00",
    "sparse-pax01",
    "sparse-pax10",
]


def made(name: str) -> tuple[PlainIndex, dict[bytes, bytes]]:
    indexer = PlainIndexer()
    payloads = dict(indexer.feed((BLOBS / f"{name}.tar.tar").read_bytes()))
    return indexer.finish(), payloads


def checked(index: PlainIndex, payloads: dict[bytes, bytes]) -> PlainIndex:
    check = IndexCheck(from_bytes(to_bytes(index)))
    for chunk in check.chunks:
        check.take(payloads[chunk.digest])
    assert check.taken == len(check.chunks)
    return check.finish()


def with_entry(index: PlainIndex, number: int, **changes: object) -> PlainIndex:
    entries = list(index.toc.entries)
    entries[number] = msgspec.structs.replace(entries[number], **changes)
    return msgspec.structs.replace(index, toc=msgspec.structs.replace(index.toc, entries=entries))


def a_file(index: PlainIndex) -> int:
    return next(n for n, entry in enumerate(index.toc.entries) if len(entry.chunks) == 1)


@pytest.mark.parametrize("name", NAMES)
def test_true_index_passes_and_is_made_again(name: str) -> None:
    index, payloads = made(name)
    assert checked(index, payloads) == index


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": 0o4777},
        {"uid": 1},
        {"name": b"etc/other"},
        {"mtime": 1},
        {"xattrs": {b"security.capability": b"x"}},
    ],
    ids=str,
)
def test_lie_beside_the_right_stream_is_found(changes: dict[str, object]) -> None:
    index, payloads = made("basic")
    with pytest.raises(ImageInvalid, match="does not say what is in the stream"):
        checked(with_entry(index, a_file(index), **changes), payloads)


def test_left_out_entry_is_found() -> None:
    index, payloads = made("basic")
    entries = [entry for entry in index.toc.entries if entry.kind != "symlink"]
    assert len(entries) < len(index.toc.entries)
    lie = msgspec.structs.replace(index, toc=msgspec.structs.replace(index.toc, entries=entries))
    with pytest.raises(ImageInvalid, match="does not say"):
        checked(lie, payloads)


def test_contents_of_two_files_exchanged_are_found() -> None:
    index, payloads = made("basic")
    by_size: dict[int, list[tuple[int, Entry]]] = {}
    for number, entry in enumerate(index.toc.entries):
        if len(entry.chunks) == 1:
            by_size.setdefault(entry.size, []).append((number, entry))
    (first, one), (second, other) = next(
        pair[:2] for pair in by_size.values() if len({entry.digest for _, entry in pair[:2]}) == 2
    )
    swap = lambda chunk, digest: (msgspec.structs.replace(chunk, digest=digest),)  # noqa: E731
    lie = with_entry(index, first, chunks=swap(one.chunks[0], other.digest), digest=other.digest)
    lie = with_entry(lie, second, chunks=swap(other.chunks[0], one.digest), digest=one.digest)
    with pytest.raises(ImageInvalid, match="its stream is"):
        checked(lie, payloads)


def test_other_content_is_found() -> None:
    index, payloads = made("basic")
    number = a_file(index)
    chunk = index.toc.entries[number].chunks[0]
    evil = bytes(chunk.size)
    digest = hashlib.sha256(evil).digest()
    lie = with_entry(index, number, chunks=(msgspec.structs.replace(chunk, digest=digest),), digest=digest)
    with pytest.raises(ImageInvalid, match="its stream is"):
        checked(lie, payloads | {digest: evil})


@pytest.mark.parametrize("wrong", [b"", b"junk junk junk"])
def test_other_bytes_that_do_not_fit_are_found(wrong: bytes) -> None:
    index, payloads = made("basic")
    with pytest.raises(ImageInvalid, match="other bytes"):
        checked(msgspec.structs.replace(index, other=wrong), payloads)


def test_name_of_a_segment_covers_all_that_its_table_is_made_of() -> None:
    index, _ = made("basic")
    name = segment_toc(index.toc).digest
    assert name != index.toc.digest
    assert segment_toc(index.toc).entries == index.toc.entries
    number = a_file(index)
    chunk = index.toc.entries[number].chunks[0]
    for change in ({"digest": bytes(32)}, {"size": chunk.size + 1}, {"offset": chunk.offset + 512}):
        other = with_entry(index, number, chunks=(msgspec.structs.replace(chunk, **change),))
        assert segment_toc(other.toc).digest != name
    assert segment_toc(msgspec.structs.replace(index.toc, digest=Digest(bytes(32)))).digest != name


def test_few_bytes_cannot_make_millions_of_chunks() -> None:
    index, _ = made("sparse-gnu")
    document = msgspec.msgpack.decode(to_bytes(index))
    entry = next(entry for entry in document[4] if entry[12])
    entry[5], entry[12] = 1 << 40, [[-1, 1 << 40, b""]]
    data = msgspec.msgpack.encode(document)
    assert len(data) < 2000
    with pytest.raises(ImageInvalid, match="the runs of"):
        from_bytes(data, chunks_max=100_000)
