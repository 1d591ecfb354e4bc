"""podman's dialect of zstd:chunked: what TOC and tar-split say, and when tar-split is left out."""

import base64
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from p2pgz.convert.layer import LayerOptions, convert_layer
from p2pgz.convert.tarsplit import crc64
from p2pgz.convert.writer import WrittenLayer
from p2pgz.core.decompress import Decompressor
from p2pgz.core.footer import parse_footer
from p2pgz.core.toc import (
    CONTAINERS_CHECKSUM_ANNOTATION,
    CONTAINERS_POSITION_ANNOTATION,
    TAR_SPLIT_POSITION_ANNOTATION,
    TOC_DIGEST_ANNOTATION,
)

VECTORS = Path(__file__).parents[2] / "vectors"
SOURCES = sorted(path.name.removesuffix(".tar.tar") for path in (VECTORS / "blobs").glob("*.tar.tar"))
# Layers that podman has to pull whole: names twice, names that are not UTF-8, a hard link to a device
NOT_IN_PARTS = {"hlorder", "latin1", "links", "order"}


def slow_crc64(data: bytes) -> int:
    """Bit by bit, as the standard defines it."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def test_crc_is_the_one_of_iso_3309() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001  # the check value in CRC catalogues
    assert crc64(b"") == 0
    for size in (*range(1, 140), 500, 4096, 5001):
        data = os.urandom(size)
        assert crc64(data) == slow_crc64(data), data.hex()
    assert crc64(bytes(3000)) == slow_crc64(bytes(3000))


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 1000, 4095, 4096])
def test_crc_in_pieces_is_that_of_the_whole(cut: int) -> None:
    data = os.urandom(4096)
    assert crc64(data[cut:], crc64(data[:cut])) == crc64(data)


def converted(blob: bytes, **options: object) -> tuple[bytes, WrittenLayer]:
    out = io.BytesIO()
    settings = {"format": "zstd:chunked", "chunk_bytes": 1 << 16, "threads": 0, **options}
    written = convert_layer(io.BytesIO(blob), out, LayerOptions(**settings))
    return out.getvalue(), written


def unpacked(blob: bytes, position: str) -> bytes:
    """The frame that an annotation points to."""
    offset, packed_bytes, raw_bytes = map(int, position.split(":")[:3])
    content = zstandard.ZstdDecompressor().decompressobj().decompress(blob[offset : offset + packed_bytes])
    assert len(content) == raw_bytes
    return content


def tar_split(blob: bytes, written: WrittenLayer) -> list[dict[str, object]]:
    lines = unpacked(blob, written.annotations[TAR_SPLIT_POSITION_ANNOTATION]).splitlines()
    return [json.loads(line) for line in lines]


def toc_of(blob: bytes, annotations: dict[str, str]) -> dict[str, object]:
    return json.loads(unpacked(blob, annotations[CONTAINERS_POSITION_ANNOTATION]))


def content_of(blob: bytes, toc: dict[str, object]) -> dict[str, bytes]:
    """Files as podman takes them: a file's frames from its offset to its endOffset, cut at its size."""
    files: dict[str, bytes] = {}
    for entry in toc["entries"]:
        if entry["type"] == "reg" and entry.get("size"):
            stream = Decompressor()
            data = b"".join(stream.feed(blob[entry["offset"] : entry["endOffset"]]))
            files[entry["name"]] = data[: entry["size"]]
            assert f"sha256:{hashlib.sha256(files[entry['name']]).hexdigest()}" == entry["digest"]
    return files


@pytest.mark.parametrize("source", SOURCES)
def test_stream_is_put_together_again_from_tar_split_and_files(source: str) -> None:
    blob, written = converted((VECTORS / "blobs" / f"{source}.tar.tar").read_bytes())
    assert TOC_DIGEST_ANNOTATION not in written.annotations
    toc = toc_of(blob, written.annotations)
    if source in NOT_IN_PARTS:
        assert TAR_SPLIT_POSITION_ANNOTATION not in written.annotations
        assert "tarSplitDigest" not in toc
        assert written.warnings[0].startswith("podman will pull this layer whole: ")
        return
    assert written.warnings == ()
    files = content_of(blob, toc)
    stream = io.BytesIO()
    lines = tar_split(blob, written)
    for number, line in enumerate(lines):
        assert line["position"] == number
        payload = base64.b64decode(line["payload"] or "")
        if line["type"] == 2:
            stream.write(payload)
        elif line.get("size"):
            data = files[line["name"]]
            assert (len(data), crc64(data).to_bytes(8, "big")) == (line["size"], payload)
            stream.write(data)
    assert hashlib.sha256(stream.getvalue()).digest() == written.diff_id.raw
    assert [line["name"] for line in lines if line["type"] == 1] == [
        entry["name"] for entry in toc["entries"] if entry["type"] != "chunk"
    ]


def test_annotations_footer_and_frames_agree() -> None:
    blob, written = converted((VECTORS / "blobs" / "basic.tar.tar").read_bytes())
    notes = written.annotations
    footer = parse_footer(blob[-128:], len(blob))
    assert footer is not None
    assert (footer.kind, footer.footer_bytes) == ("zstd-containers", 64)
    offset, packed_bytes, raw_bytes, kind = map(int, notes[CONTAINERS_POSITION_ANNOTATION].split(":"))
    assert (footer.toc_offset, footer.toc_compressed_bytes, footer.toc_raw_bytes, kind) == (
        offset, packed_bytes, raw_bytes, 1,
    )  # fmt: skip
    packed = blob[offset : offset + packed_bytes]
    assert notes[CONTAINERS_CHECKSUM_ANNOTATION] == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    split_offset, split_bytes, _ = map(int, notes[TAR_SPLIT_POSITION_ANNOTATION].split(":"))
    split = blob[split_offset : split_offset + split_bytes]
    assert toc_of(blob, notes)["tarSplitDigest"] == f"sha256:{hashlib.sha256(split).hexdigest()}"
    assert split_offset + split_bytes + 8 + 64 == len(blob)


@pytest.mark.parametrize("source", ["basic", "meta", "names", "reserved"])
def test_toc_says_what_the_reference_writers_says(source: str) -> None:
    document = json.loads((VECTORS / "expected" / f"{source}.zctr.json").read_text())
    theirs = toc_of((VECTORS / document["blob"]).read_bytes(), document["annotations"])
    blob, written = converted((VECTORS / "blobs" / f"{source}.tar.tar").read_bytes())

    def facts(toc: dict[str, object]) -> list[dict[str, object]]:
        of_the_blob = ("offset", "endOffset", "chunkSize", "chunkOffset", "chunkDigest", "chunkType")
        # times of access and change are left out, with the headers that held them; files of 0 bytes need no digest
        dropped = (*of_the_blob, "accesstime", "changetime")
        return [
            {
                key: value
                for key, value in entry.items()
                if key not in dropped and (key != "digest" or entry.get("size"))
            }
            for entry in toc["entries"]
            if entry["type"] != "chunk"
        ]

    assert facts(toc_of(blob, written.annotations)) == facts(theirs)


def archive(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return out.getvalue()


def member(name: str, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([member("a"), member("./a")], "'./a' comes twice"),
        (
            [member("a", type=tarfile.LNKTYPE, linkname="below")],
            "is a hard link to what is no file before it",
        ),
        ([member("a", mtime=1 << 40)], "has a time that"),
        ([member("a", pax_headers={"LIBARCHIVE.xattr.user.x%3Dy": "aGk="})], "has an attribute whose name"),
        ([member("d/x"), member("d")], "a directory in it is written over by a file"),
    ],
)
def test_layer_that_podman_would_refuse_in_parts_comes_without_tar_split(
    members: list[tarfile.TarInfo], why: str
) -> None:
    blob, written = converted(archive(*members))
    assert TAR_SPLIT_POSITION_ANNOTATION not in written.annotations
    assert why in written.warnings[0]
    assert toc_of(blob, written.annotations)["entries"]


def test_headers_that_say_more_than_the_toc_are_made_anew_and_others_stay() -> None:
    plain = member("plain", size=700, mtime=5, uid=7).tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    noise = member("noise", pax_headers={"atime": "12.5", "comment": "x"}).tobuf(tarfile.PAX_FORMAT)
    v7 = bytearray(member("v7").tobuf(tarfile.USTAR_FORMAT))
    v7[156] = 0  # the flag of v7's files
    v7[148:156] = b"%06o\0 " % (sum(v7[:148]) + sum(v7[156:]) + 256)
    gnu = member("gnu").tobuf(tarfile.GNU_FORMAT)
    blob, written = converted(plain + noise + bytes(v7) + gnu + bytes(1024))
    stream = Decompressor()
    made = b"".join(stream.feed(blob)) + b"".join(stream.finish())
    assert made[:1536] == plain
    assert len(made) == 1536 + 3 * 512 + 1024
    assert b"atime" not in made
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        assert [(m.name, m.type) for m in tar] == [(n, b"0") for n in ("plain", "noise", "v7", "gnu")]
    assert written.warnings == ()


def test_files_with_reserved_names_are_the_users_own() -> None:
    names = (".prefetch.landmark", "stargz.index.json", "file")
    blob, written = converted(archive(*map(member, names)), prioritized=(b"file",))
    assert [entry["name"] for entry in toc_of(blob, written.annotations)["entries"]] == ["file", *names[:2]]
    assert written.warnings == ()
