"""The file of `p2pgz export`: what is written is read again, and nothing else is."""

from __future__ import annotations

import io
import tarfile

import msgspec
import pytest
import zstandard

from p2pgz.core import exportfile
from p2pgz.core.digest import Digest
from p2pgz.core.exportfile import (
    CHUNKS,
    DOCUMENTS,
    HEAD_NAME,
    Document,
    ExportReader,
    ExportWriter,
    Head,
    Part,
)
from p2pgz.core.verify import verify
from p2pgz.errors import ExportInvalid

TEXTS = [b"{}", b"x" * 5000]
PAYLOADS = [b"", b"one", bytes(range(256)) * 8]


def head_of(documents: list[bytes] = TEXTS, payloads: list[bytes] = PAYLOADS, **more: object) -> Head:
    fields = {
        "reference": "registry.example/team/app:1",
        "platform": "linux/amd64",
        "manifest": str(Digest.of(TEXTS[0])),
        "documents": len(documents),
        "chunks": len(payloads),
        "chunk_bytes": sum(map(len, payloads)),
        **more,
    }
    return Head(**fields)


def written() -> bytes:
    writer = ExportWriter()
    pieces = [writer.head(head_of())]
    pieces += [writer.document(Digest.of(text), text) for text in TEXTS]
    pieces += [writer.chunk(verify(Digest.of(data).raw, data, source="test")) for data in PAYLOADS]
    return b"".join([*pieces, writer.end()])


def archive(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Any archive, not compressed: the reader takes that, too."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def named(folder: str, data: bytes) -> tuple[str, bytes]:
    return folder + Digest.of(data).hex, data


def head_entry(head: Head | None = None, **more: object) -> tuple[str, bytes]:
    return HEAD_NAME, msgspec.json.encode(head or head_of(**more))


def read(data: bytes, step: int = 1 << 20) -> list[Part]:
    reader = ExportReader("file")
    parts = [part for at in range(0, len(data), step) for part in reader.feed(data[at : at + step])]
    reader.finish()
    return parts


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_what_is_written_is_read_again(step: int) -> None:
    head, *parts = read(written(), step)
    assert head == head_of()
    assert [part.data for part in parts if isinstance(part, Document)] == TEXTS
    assert [bytes(part.data) for part in parts[len(TEXTS) :]] == PAYLOADS
    assert [part.digest for part in parts[len(TEXTS) :]] == [Digest.of(data).raw for data in PAYLOADS]


def test_the_same_image_gives_the_same_file() -> None:
    assert written() == written()


@pytest.mark.parametrize("end", [0, 3, 4, 100, -1, -20])
def test_a_file_that_was_cut_short_is_noticed(end: int) -> None:
    with pytest.raises(ExportInvalid, match="file: "):
        read(written()[:end])


def test_a_file_that_ends_between_two_entries_is_noticed() -> None:
    with pytest.raises(ExportInvalid, match="1 of 2 documents, 0 of 3 chunks and 0 of 2051 bytes"):
        read(archive(head_entry(), named(DOCUMENTS, TEXTS[0])))


def test_a_changed_byte_is_noticed_or_means_nothing() -> None:
    """Padding and modes of the archive are nobody's business; whatever is taken is what its name says."""
    good = archive(
        head_entry(), *(named(DOCUMENTS, t) for t in TEXTS), *(named(CHUNKS, data) for data in PAYLOADS)
    )
    whole = contents(read(good))
    noticed = 0
    for at in range(2 * 512, len(good) - 10240, 97):  # behind the head
        changed = bytearray(good)
        changed[at] ^= 0x40
        try:
            assert contents(read(bytes(changed))) == whole
        except ExportInvalid:
            noticed += 1
    assert noticed > 50


def contents(parts: list[Part]) -> list[object]:
    return [part if isinstance(part, Head) else (part.digest, bytes(part.data)) for part in parts]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("other", b"")], "not an export of p2pgz"),
        ([(HEAD_NAME, b"{")], "its head cannot be read"),
        ([(HEAD_NAME, b'{"version": 1}')], "its head cannot be read"),
        ([head_entry(version=2)], "an export of version 2"),
        ([head_entry(chunks=-1)], "announces what cannot be"),
        ([head_entry(documents=["x"] * 5000)], "announces what cannot be"),
        ([head_entry(manifest="sha256:x")], "not a sha256 digest"),
        ([head_entry(), head_entry()], "does not belong there"),
        ([head_entry(), named(CHUNKS, b"one")], "does not belong there"),
        ([head_entry(documents=[]), named(DOCUMENTS, b"x")], "more than 0 documents"),
        ([head_entry(documents=[], payloads=[]), named(CHUNKS, b"x")], "more than 0 chunks"),
        ([head_entry(), (DOCUMENTS + Digest.of(b"a").hex, b"b")], "has other bytes"),
        ([head_entry(documents=[]), (CHUNKS + Digest.of(b"a").hex, b"b")], "has other bytes"),
        ([head_entry(), (DOCUMENTS + "no", b"")], "does not belong there"),
        ([head_entry(), (DOCUMENTS + "zz" * 32, b"")], "does not belong there"),
        ([head_entry(), (DOCUMENTS + Digest.of(b"a").hex.upper(), b"a")], "does not belong there"),
        ([head_entry(), ("documents/sha256/ä", b"a")], "does not belong there"),
        ([head_entry(documents=[]), named(CHUNKS, b"one"), named(DOCUMENTS, b"x")], "does not belong there"),
    ],
)
def test_what_is_no_export_is_refused(entries: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(ExportInvalid, match=message):
        read(archive(*entries))


def test_other_kinds_of_entries_are_refused() -> None:
    with pytest.raises(ExportInvalid, match="no plain file"):
        read(archive((HEAD_NAME, b""), kind=tarfile.SYMTYPE))


def test_nothing_at_all_is_refused() -> None:
    for nothing in (b"", bytes(1024), b"\x28\xb5\x2f"):
        with pytest.raises(ExportInvalid):
            read(nothing)


@pytest.mark.parametrize(
    ("entries", "limit"),
    [
        ([(HEAD_NAME, bytes(100))], "HEAD_MAX_BYTES"),
        ([head_entry(), named(DOCUMENTS, bytes(100))], "DOCUMENT_MAX_BYTES"),
        ([head_entry(), named(DOCUMENTS, bytes(50)), named(DOCUMENTS, bytes(100))], "DOCUMENTS_MAX_BYTES"),
        ([head_entry(documents=[]), named(CHUNKS, bytes(100))], "MAX_CHUNK_BYTES"),
    ],
)
def test_entries_larger_than_the_limits_are_refused(
    entries: list[tuple[str, bytes]], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exportfile, limit, 99)
    with pytest.raises(ExportInvalid, match="more than"):
        read(archive(*entries))


def test_zeros_that_pack_well_do_not_fill_the_memory() -> None:
    """A thousandth of the size, and refused at the entry's header, before any of it is held."""
    big = archive((HEAD_NAME, bytes(64 << 20)))
    with pytest.raises(ExportInvalid, match="more than"):
        read(zstandard.compress(big))
