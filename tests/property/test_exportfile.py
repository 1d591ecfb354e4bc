"""Export files and inventories of any content: what is written is read however it arrives, anything else is refused."""

from __future__ import annotations

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.exportfile import ExportReader, ExportWriter, Head
from p2pgz.core.inventory import read_inventory, write_inventory
from p2pgz.core.verify import verify
from p2pgz.errors import ExportInvalid

BLOBS = st.lists(st.binary(max_size=1500), max_size=5, unique=True)


def written(documents: list[bytes], payloads: list[bytes]) -> bytes:
    writer = ExportWriter()
    head = Head(
        reference="registry.example/app:1",
        platform="linux/amd64",
        manifest=str(Digest.of(b"manifest")),
        documents=len(documents),
        chunks=len(payloads),
        chunk_bytes=sum(map(len, payloads)),
    )
    pieces = [writer.head(head), *(writer.document(Digest.of(text), text) for text in documents)]
    pieces += [writer.chunk(verify(Digest.of(data).raw, data, source="test")) for data in payloads]
    return b"".join([*pieces, writer.end()])


def read(data: bytes, cuts: list[int]) -> list[tuple[bytes, bytes]]:
    reader = ExportReader("file")
    parts: list[tuple[bytes, bytes]] = []
    at = 0
    for cut in [*cuts, len(data)]:
        for part in reader.feed(data[at : at + cut]):
            if not isinstance(part, Head):
                digest = part.digest.raw if isinstance(part.digest, Digest) else part.digest
                parts.append((digest, bytes(part.data)))
        at += cut
    reader.finish()
    return parts


@given(BLOBS, BLOBS, st.lists(st.integers(0, 300), max_size=20))
@settings(max_examples=40)
def test_what_is_written_is_read_however_it_arrives(
    documents: list[bytes], payloads: list[bytes], cuts: list[int]
) -> None:
    data = written(documents, payloads)
    whole = [(Digest.of(blob).raw, blob) for blob in [*documents, *payloads]]
    assert read(data, []) == read(data, cuts) == read(data, [1] * len(data)) == whole


@given(BLOBS, BLOBS, st.data())
@settings(max_examples=80)
def test_what_was_changed_is_refused_or_means_the_same(
    documents: list[bytes], payloads: list[bytes], data: st.DataObject
) -> None:
    """Not packed: the checksum of zstd would notice everything, and a sender who means harm makes a new one."""
    plain = bytearray(zstandard.ZstdDecompressor().decompressobj().decompress(written(documents, payloads)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(plain) - 1))
        if data.draw(st.booleans()):
            plain[at] = data.draw(st.integers(0, 255))
        else:
            del plain[at : at + data.draw(st.integers(1, 1024))]
            plain = plain or bytearray(1)
    try:
        parts = read(bytes(plain), [])
    except ExportInvalid:
        return
    assert all(Digest.of(blob).raw == digest for digest, blob in parts)


@given(st.binary(max_size=3000))
@settings(max_examples=100)
def test_any_bytes_are_no_export_and_no_inventory(data: bytes) -> None:
    for refuse in (lambda: read(data, []), lambda: read_inventory(data, name="file")):
        try:
            refuse()
        except ExportInvalid:
            continue
        raise AssertionError("taken")


@given(st.sets(st.binary(min_size=32, max_size=32), max_size=20), st.data())
@settings(max_examples=60)
def test_an_inventory_is_read_whole_or_refused(digests: set[bytes], data: st.DataObject) -> None:
    text = b"".join(write_inventory(digests))
    assert read_inventory(text, name="file") == digests
    cut = data.draw(st.integers(0, len(text) - 2))
    try:
        found = read_inventory(text[:cut], name="file")
    except ExportInvalid:
        return
    raise AssertionError(f"{len(found)} of {len(digests)} digests taken")
