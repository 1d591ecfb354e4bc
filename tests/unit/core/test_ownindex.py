"""Own indexes of plain layers: the tree of every vector, rebuilding the stream, and the document's
strictness.
"""

import hashlib
import io
import tarfile
from pathlib import Path

import msgspec
import pytest

from p2pgz.core.decompress import Decompressor
from p2pgz.core.digest import Digest
from p2pgz.core.indexdoc import from_bytes, to_bytes
from p2pgz.core.model import ChunkKind, Entry
from p2pgz.core.ownindex import PlainIndex, PlainIndexer, rebuild, zeros_digest
from p2pgz.errors import ImageInvalid
from p2pgz.testing.trees import describe, differences, layer_tree
from p2pgz.testing.vectors import expected_document, expected_tree

VECTORS = Path(__file__).parents[2] / "vectors"
PLAIN = sorted(
    path.stem
    for path in (VECTORS / "expected").glob("*.*.json")
    if path.stem.rpartition(".")[2] in ("tar", "gz", "gzm", "zst", "zstm")
    and not path.stem.startswith("image")
)


def decompress(blob: bytes) -> bytes:
    stream = Decompressor()
    return b"".join(stream.feed(blob)) + b"".join(stream.finish())


def index_of(
    stream: bytes, feed_bytes: int = 1 << 16, **options: int
) -> tuple[PlainIndex, dict[bytes, bytes]]:
    indexer = PlainIndexer(**options)
    payloads: dict[bytes, bytes] = {}
    for at in range(0, len(stream), feed_bytes):
        payloads.update(indexer.feed(stream[at : at + feed_bytes]))
    return indexer.finish(), payloads


def content_of(payloads: dict[bytes, bytes]):
    def content_digest(entry: Entry) -> str:
        whole = hashlib.sha256()
        for chunk in entry.chunks:
            whole.update(bytes(chunk.size) if chunk.kind is ChunkKind.ZEROS else payloads[chunk.digest])
        return whole.hexdigest()

    return content_digest


@pytest.mark.parametrize("name", PLAIN)
def test_tree_of_a_plain_layer_is_the_expected_one(name: str) -> None:
    document = expected_document(VECTORS / "expected" / f"{name}.json")
    stream = decompress((VECTORS / document["blob"]).read_bytes())
    index, payloads = index_of(stream)
    assert str(index.toc.digest) == document["diff_id"]
    found = describe(layer_tree(index.toc), content_of(payloads))
    assert list(differences(expected_tree(document["entries"]), found)) == []


@pytest.mark.parametrize("name", [name for name in PLAIN if name.endswith(".tar")])
@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20])
def test_stream_is_rebuilt_exactly_after_the_document_travelled(name: str, chunk_bytes: int) -> None:
    stream = (VECTORS / "blobs" / f"{name}.tar").read_bytes()
    index, payloads = index_of(stream, chunk_bytes=chunk_bytes)
    arrived = from_bytes(to_bytes(index))
    assert arrived == index
    assert b"".join(rebuild(arrived, lambda chunk: payloads[chunk.digest])) == stream


def test_feeding_in_other_pieces_gives_the_same_document() -> None:
    stream = (VECTORS / "blobs" / "sparse-pax10.tar.tar").read_bytes()
    whole, payloads = index_of(stream, len(stream), chunk_bytes=4096)
    bytewise, same_payloads = index_of(stream, 1, chunk_bytes=4096)
    assert to_bytes(bytewise) == to_bytes(whole)
    assert same_payloads == payloads


def test_files_are_cut_at_fixed_places() -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("f")
        member.size = 10_000
        tar.addfile(member, io.BytesIO(bytes(range(250)) * 40))
    index, _ = index_of(archive.getvalue(), chunk_bytes=4096)
    assert [(c.file_offset, c.size, c.offset, c.end, c.inner) for c in index.toc.entries[0].chunks] == [
        (0, 4096, 512, 4608, 0),
        (4096, 4096, 4608, 8704, 0),
        (8192, 1808, 8704, 10512, 0),
    ]


def small_index() -> PlainIndex:
    return index_of((VECTORS / "blobs" / "sparse-gnu.tar.tar").read_bytes(), chunk_bytes=4096)[0]


def changed(position: list[int], value: object) -> bytes:
    document = msgspec.msgpack.decode(to_bytes(small_index()))
    place = document
    for step in position[:-1]:
        place = place[step]
    place[position[-1]] = value
    return msgspec.msgpack.encode(document)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        ([0], 2), ([1], b"short"), ([2], 1), ([2], 1 << 30), ([3], -1), ([3], 1 << 60), ([3], 100), ([4, 0, 0], b"a/../b"),
        ([4, 0, 0], b"a\0"), ([4, 0, 0], b""), ([4, 0, 0], b"x" * 70_000), ([4, 0, 1], "socket"), ([4, 0, 1], "hardlink"),
        ([4, 0, 2], 0o10000), ([4, 0, 3], -1), ([4, 0, 4], 0xFFFFFFFF), ([4, 0, 5], 1), ([4, 0, 5], 1 << 50),
        ([4, 0, 6], 1 << 63), ([4, 0, 7], 1_000_000_000), ([4, 0, 8], b"target"), ([4, 0, 9], 1 << 32),
        ([4, 0, 11], [[b"", b""]]), ([4, 0, 11], [[b"a", b""], [b"a", b""]]), ([4, 0, 12], []),
        ([4, 0, 12], [[-1, 1 << 39, b""]]),
        ([4, 0, 12], [[0, 100, b""]]), ([4, 0, 12], [[1 << 40, 100, bytes(32)]]), ([6], ["w"] * 300), ([4], 5), ([4, 0], []),
    ],
)  # fmt: skip
def test_document_that_lies_is_refused(position: list[int], value: object) -> None:
    with pytest.raises(ImageInvalid):
        from_bytes(changed(position, value))


@pytest.mark.parametrize(
    ("position", "value"),
    [
        ([4, 1, 12], [[1 << 40, 10, bytes(32)]]), ([4, 1, 12], [[0, 1, bytes(32)]]), ([4, 1, 8], b"a/../b"),
        ([4, 1, 12], [[-1, 0, b""]]),
    ],
)  # fmt: skip
def test_second_entry_that_lies_is_refused(position: list[int], value: object) -> None:
    with pytest.raises(ImageInvalid):
        from_bytes(changed(position, value))


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        ("ownindex", "MAX_OTHER_BYTES"), ("ownindex", "MAX_PLAIN_ENTRIES"), ("ownindex", "MAX_PLAIN_CHUNKS"),
        ("indexdoc", "MAX_OTHER_BYTES"), ("indexdoc", "MAX_PLAIN_CHUNKS"), ("indexdoc", "MAX_INDEX_BYTES"),
    ],
)  # fmt: skip
def test_limits_hold(module: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (VECTORS / "blobs" / "sparse-pax01.tar.tar").read_bytes()
    document = to_bytes(index_of(stream, chunk_bytes=4096)[0])
    monkeypatch.setattr(f"p2pgz.core.{module}.{limit}", 2)
    with pytest.raises(ImageInvalid):
        index_of(stream, chunk_bytes=4096) if module == "ownindex" else from_bytes(document)


def test_many_chunks_of_data_reach_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pgz.core.ownindex.MAX_PLAIN_CHUNKS", 2)
    with pytest.raises(ImageInvalid, match="more than 2 chunks"):
        index_of((VECTORS / "blobs" / "basic.tar.tar").read_bytes(), chunk_bytes=4096)


def test_hard_link_target_in_a_document_must_be_clean() -> None:
    document = msgspec.msgpack.decode(
        to_bytes(index_of((VECTORS / "blobs" / "hlorder.tar.tar").read_bytes())[0])
    )
    link = next(entry for entry in document[4] if entry[1] == "hardlink")
    for target in (b"a/../b", link[0]):
        link[8] = target
        with pytest.raises(ImageInvalid, match="target"):
            from_bytes(msgspec.msgpack.encode(document))


def test_missing_and_surplus_other_bytes_are_noticed() -> None:
    stream = (VECTORS / "blobs" / "empty.tar.tar").read_bytes()
    index, _ = index_of(stream)
    for wrong in (len(stream) - 1, len(stream) + 1):
        damaged = PlainIndex(index.toc, wrong, index.other)
        with pytest.raises(ImageInvalid, match="other bytes"):
            list(rebuild(damaged, lambda chunk: b""))
    with pytest.raises(ImageInvalid, match="damaged"):
        list(rebuild(PlainIndex(index.toc, len(stream), b"junk junk junk"), lambda chunk: b""))


def test_stream_that_is_cut_is_refused() -> None:
    stream = (VECTORS / "blobs" / "order.tar.tar").read_bytes()
    indexer = PlainIndexer()
    indexer.feed(stream[:1200])
    with pytest.raises(ImageInvalid, match="middle of an entry"):
        indexer.finish()


def header(name: str = "x", **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "block",
    [
        header(type=tarfile.LNKTYPE, linkname="x"), header(type=tarfile.LNKTYPE, linkname="/"), header(type=tarfile.SYMTYPE),
        header(uid=0xFFFFFFFF), header(gid=-1), header(type=tarfile.CHRTYPE, devmajor=1 << 40),
    ],
)  # fmt: skip
def test_impossible_entries_are_refused(block: bytes) -> None:
    with pytest.raises(ImageInvalid):
        PlainIndexer().feed(block)


def test_file_named_as_the_root_is_left_out_with_a_warning() -> None:
    index, _ = index_of(header("./") + header("ok"))
    assert [entry.name for entry in index.toc.entries] == [b"ok"]
    assert "left out" in index.toc.warnings[0]
    assert index.toc.digest == Digest.of(header("./") + header("ok"))


def test_wrong_number_of_digests_in_a_run_is_refused() -> None:
    document = msgspec.msgpack.decode(to_bytes(small_index()))
    run = next(run for entry in document[4] for run in entry[12] if run[0] >= 0)
    run[2] += bytes(32)
    with pytest.raises(ImageInvalid, match="number of chunks"):
        from_bytes(msgspec.msgpack.encode(document))


def test_holes_reach_the_limit_before_their_chunks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pgz.core.ownindex.MAX_PLAIN_CHUNKS", 3)
    with pytest.raises(ImageInvalid, match="holes"):
        index_of((VECTORS / "blobs" / "sparse-gnu.tar.tar").read_bytes(), chunk_bytes=4096)


def test_digests_of_many_hole_sizes_are_right_though_not_all_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2pgz.core.ownindex._zeros_digests", dict.fromkeys(range(-1024, 0), b""))
    assert zeros_digest(5) == hashlib.sha256(bytes(5)).digest()
