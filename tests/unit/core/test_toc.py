"""The rules of parse_toc one by one, on small TOCs made here; test_bad_layers.py has the same on whole blobs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile

import pytest
import zstandard

from p2pgz.core import toc as t
from p2pgz.core import toc_schema
from p2pgz.core.digest import Digest
from p2pgz.core.footer import Footer, make_estargz_footer
from p2pgz.core.model import MAX_CHUNK_BYTES, Chunk, ChunkKind, Piece, Toc
from p2pgz.core.tail import NeedMore, NotLazy, open_layer_tail, tail_start
from p2pgz.core.toc_fields import clean_name, parse_time, parse_xattrs
from p2pgz.errors import ImageInvalid

PAYLOAD_END = 10_000
A, B, C = (hashlib.sha256(text).digest() for text in (b"a", b"b", b"c"))
GZIP_FOOTER = Footer("estargz", 0, 1, None, 51, 0)
ZSTD_FOOTER = Footer("zstd-containers", 20, 30, 40, 64, 12)


def sha(raw: bytes) -> str:
    return str(Digest(raw))


def parse(*entries: dict, kind: str = "estargz", payload_end: int = PAYLOAD_END) -> Toc:
    toc_json = json.dumps({"version": 1, "entries": list(entries)}).encode()
    return t.parse_toc(toc_json, kind=kind, payload_end=payload_end, blob_size=20_000)


def reg(name: str = "f", size: int = 10, offset: int = 100, **more: object) -> dict:
    return {"name": name, "type": "reg", "size": size, "offset": offset, "digest": sha(A), **more}


def part(chunk_offset: int, chunk_size: int, offset: int, raw: bytes | None = B, **more: object) -> dict:
    entry = {
        "name": "f",
        "type": "chunk",
        "chunkOffset": chunk_offset,
        "chunkSize": chunk_size,
        "offset": offset,
    }
    return entry | ({"chunkDigest": sha(raw)} if raw else {}) | more


def refused(match: str, *entries: dict, **options: object) -> None:
    with pytest.raises(ImageInvalid, match=match):
        parse(*entries, **options)


class TestChunks:
    def test_one_chunk_is_verified_by_the_chunk_digest_before_the_file_digest(self) -> None:
        assert parse(reg(chunkDigest=sha(B))).entries[0].chunks == (Chunk(B, 0, 10, 100, PAYLOAD_END, 0),)
        entry = parse(reg()).entries[0]
        assert (entry.chunks, entry.digest) == ((Chunk(A, 0, 10, 100, PAYLOAD_END, 0),), A)

    def test_ends_are_the_next_distinct_offset_whatever_the_order(self) -> None:
        toc = parse(
            reg("z", offset=500),
            reg("y", offset=100, innerOffset=5),
            reg("x", offset=100),
            {"name": "d", "type": "dir", "offset": 300, "size": 7},
        )
        assert [(e.chunks[0].offset, e.chunks[0].end) for e in toc.entries[:3]] == [
            (500, PAYLOAD_END),
            (100, 500),
            (100, 500),
        ]
        assert (toc.entries[3].size, toc.entries[3].chunks) == (0, ())

    def test_blob_size_bounds_the_payload(self) -> None:
        refused("outside", reg(offset=20_000), payload_end=1 << 40)

    def test_last_chunk_size_may_be_left_out(self) -> None:
        toc = parse(reg(chunkSize=6, chunkDigest=sha(B)), part(6, 0, 200, C))
        assert toc.entries[0].chunks == (Chunk(B, 0, 6, 100, 200, 0), Chunk(C, 6, 4, 200, PAYLOAD_END, 0))

    def test_chunk_entries_may_be_nameless_or_spelt_otherwise(self) -> None:
        for name in ("", "f", "./f", "/f"):
            toc = parse(reg(chunkSize=6, chunkDigest=sha(B)), part(6, 4, 200, name=name))
            assert len(toc.entries[0].chunks) == 2
        refused("stands among", reg(chunkSize=6, chunkDigest=sha(B)), part(6, 4, 200, name="g"))

    def test_only_chunk_must_cover_the_file(self) -> None:
        refused("does not cover", reg(chunkSize=9))
        refused("does not cover", reg(chunkOffset=1))

    def test_no_digest(self) -> None:
        refused("no digest", reg(digest=""))
        refused("no digest", reg(digest="", chunkSize=6), part(6, 4, 200, None))

    def test_parts_without_digests_are_one_chunk(self) -> None:
        toc = parse(reg(chunkSize=6), part(6, 3, 200, None), part(9, 1, 300, None), kind="stargz")
        (chunk,) = toc.entries[0].chunks
        assert (chunk.digest, chunk.size) == (A, 10)
        assert chunk.pieces() == (Piece(100, 200, 0, 6), Piece(200, 300, 0, 3), Piece(300, PAYLOAD_END, 0, 1))

    def test_parts_without_digests_must_be_neighbours(self) -> None:
        refused("apart", reg(chunkSize=6), part(6, 4, 300, None), reg("g", offset=200))
        refused("apart", reg(chunkSize=6), part(6, 4, 100, None, innerOffset=6))

    def test_whole_file_verification_has_a_limit(self) -> None:
        size = MAX_CHUNK_BYTES + 1
        refused("no digests of its chunks", reg(size=size, chunkSize=6), part(6, 0, 200, None))

    def test_chunk_limit(self) -> None:
        assert parse(reg(size=MAX_CHUNK_BYTES)).entries[0].size == MAX_CHUNK_BYTES
        refused("more than", reg(size=MAX_CHUNK_BYTES + 1))

    def test_layer_limit(self) -> None:
        size = t.MAX_LAYER_BYTES // 2
        refused(
            "too large|together",
            *(reg(str(k), size=size, offset=100 + k, chunkType="zeros") for k in range(3)),
        )

    def test_inner_offset_limit(self) -> None:
        assert parse(reg(innerOffset=t.MAX_INNER_BYTES)).entries[0].chunks[0].inner == t.MAX_INNER_BYTES
        refused("beyond reason", reg(innerOffset=t.MAX_INNER_BYTES + 1))

    def test_chunk_type(self) -> None:
        refused("unknown type", reg(chunkType="holes"))

    @pytest.mark.parametrize(
        "parts",
        [
            [part(5, 5, 200)],
            [part(7, 3, 200)],
            [part(6, 5, 200)],
            [part(6, 3, 200)],
            [part(6, 0, 200), part(10, 0, 300)],
            [part(11, 0, 200)],
        ],
    )
    def test_gaps_and_overlaps(self, parts: list[dict]) -> None:
        refused("chunk", reg(chunkSize=6, chunkDigest=sha(B)), *parts)

    def test_chunk_of_nothing(self) -> None:
        refused("belongs to no file", part(0, 5, 100))
        refused("empty but has", reg(size=0), part(0, 5, 100))

    def test_zeros(self) -> None:
        toc = parse(
            reg(chunkSize=6, chunkDigest=sha(B)),
            part(6, 4, 200, C, chunkType="zeros"),
            kind="zstd-containers",
        )
        assert toc.entries[0].chunks[1] == Chunk(C, 6, 4, 200, PAYLOAD_END, 0, ChunkKind.ZEROS)

    def test_large_hole_is_cut_into_chunks_that_verify(self) -> None:
        size = 9 * (1 << 20) + 5
        chunks = parse(reg(size=size, chunkType="zeros")).entries[0].chunks
        assert [c.size for c in chunks] == [4 << 20, 4 << 20, 1 << 20, 4, 1]
        at = 0
        for chunk in chunks:
            assert (chunk.file_offset, chunk.kind) == (at, ChunkKind.ZEROS)
            assert chunk.digest == hashlib.sha256(bytes(chunk.size)).digest()
            at += chunk.size
        assert at == size

    def test_hole_without_end(self) -> None:
        refused("too large", reg(size=t.MAX_LAYER_BYTES, chunkType="zeros"))


class TestEntries:
    def test_empty(self) -> None:
        assert parse().entries == []
        assert t.parse_toc(b'{"version":1}', kind="stargz", payload_end=1, blob_size=1).entries == []

    def test_all_kinds(self) -> None:
        toc = parse(
            {
                "name": "d/",
                "type": "dir",
                "mode": 0o41755,
                "uid": 5,
                "gid": 6,
                "modtime": "2020-01-01T00:00:00Z",
            },
            {"name": "d/s", "type": "symlink", "linkName": "../../x"},
            {"name": "d/h", "type": "hardlink", "linkName": "./below"},
            {"name": "d/c", "type": "char", "devMajor": 1, "devMinor": 3},
            {"name": "d/b", "type": "block", "devMajor": 8, "devMinor": 0xFFFFF},
            {"name": "d/p", "type": "fifo", "size": 3, "devMajor": 1, "linkName": "x"},
        )
        d, s, h, c, b, p = toc.entries
        assert (d.name, d.mode, d.uid, d.gid, d.mtime) == (b"d", 0o1755, 5, 6, 1577836800)
        assert (s.link, h.link) == (b"../../x", b"below")
        assert (c.dev_major, c.dev_minor, b.dev_minor) == (1, 3, 0xFFFFF)
        assert (p.size, p.dev_major, p.link) == (0, 0, b"")

    def test_duplicates_stay_in_order(self) -> None:
        assert [e.size for e in parse(reg(size=1), reg(size=0), reg(size=2)).entries] == [1, 0, 2]

    @pytest.mark.parametrize("kind", ["socket", "", "CHUNK"])
    def test_unknown_type(self, kind: str) -> None:
        refused("unknown type", {"name": "x", "type": kind})

    @pytest.mark.parametrize("name", ["", "/", ".", "..", "a/..", "./"])
    def test_only_a_directory_can_be_the_root(self, name: str) -> None:
        assert parse({"name": name, "type": "dir"}).entries[0].name == b""
        refused("root", {"name": name, "type": "fifo"})

    @pytest.mark.parametrize("link", ["", "/", "..", "h", "./h", "x/../h"])
    def test_impossible_hard_links(self, link: str) -> None:
        refused("impossible", {"name": "h", "type": "hardlink", "linkName": link})

    def test_hard_link_circles(self) -> None:
        def link(name: str, to: str) -> dict:
            return {"name": name, "type": "hardlink", "linkName": to}

        refused("back to itself", link("a", "b"), link("b", "c"), link("c", "b"))
        refused("directory", link("a", "b"), link("b", "d"), {"name": "d", "type": "dir"})
        assert len(parse(link("a", "b"), link("b", "c"), link("x", "b")).entries) == 3
        assert len(parse(link("a", "f"), link("b", "a"), reg()).entries) == 3

    def test_symlink_targets(self) -> None:
        for target in ("", "a\0b", "x" * 4096):
            refused("target", {"name": "s", "type": "symlink", "linkName": target})

    def test_reserved_names_belong_to_the_writer(self) -> None:
        landmark = reg(".prefetch.landmark", size=1, offset=300)
        reserved = [landmark, reg("stargz.index.json", size=0), reg("d/.prefetch.landmark", offset=400)]
        toc = parse(reg(), *reserved)
        assert [e.name for e in toc.entries] == [b"f", b"d/.prefetch.landmark"]
        assert toc.prefetch_end == 300
        assert parse(*reserved, kind="zstd-sgz").prefetch_end == 300
        assert parse(reg(".no.prefetch.landmark", size=1)).prefetch_end == 0

    def test_reserved_names_belong_to_the_user_of_containers_writers(self) -> None:
        landmark = reg(".prefetch.landmark", size=1, offset=300, endOffset=310)
        assert len(parse(landmark, kind="zstd-containers").entries) == 1
        assert len(parse(landmark, kind="zstd-sgz").entries) == 1
        assert len(parse(reg(size=0, name="stargz.index.json"), kind="zstd-sgz").entries) == 1

    def test_landmark_must_be_a_file(self) -> None:
        refused("landmark", {"name": ".prefetch.landmark", "type": "dir"})

    def test_empty_landmark_records_nothing(self) -> None:
        assert parse(reg(".prefetch.landmark", size=0)).prefetch_end == 0

    def test_warning(self) -> None:
        toc = parse(
            {"name": "caf\ufffd", "type": "dir"}, {"name": "s", "type": "symlink", "linkName": "caf\ufffd"}
        )
        (warning,) = toc.warnings
        assert warning.startswith("2 names")


class TestJson:
    @pytest.mark.parametrize(
        "text", [b"", b"[]", b"null", b'{"version":2}', b'{"version":1} {}', b'{"entries":[]}']
    )
    def test_not_a_toc(self, text: bytes) -> None:
        with pytest.raises(ImageInvalid):
            t.parse_toc(text, kind="estargz", payload_end=1, blob_size=1)

    def test_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toc_schema, "MAX_TOC_ENTRIES", 3)
        assert len(parse(*[{"name": str(k), "type": "dir"} for k in range(3)]).entries) == 3
        refused("4 entries", *[{"name": str(k), "type": "dir"} for k in range(4)])
        refused("more than 3", *[{"name": str(k), "type": "dir"} for k in range(9)])
        monkeypatch.setattr(toc_schema, "MAX_TOC_JSON_BYTES", 50)
        refused("larger than 50", *[{"name": str(k), "type": "dir"} for k in range(3)])

    def test_names_that_are_not_text(self) -> None:
        for name in (b"\xe9", b"\\ud800", b"\\udfff"):
            text = b'{"version":1,"entries":[{"type":"dir","name":"a' + name + b'"}]}'
            with pytest.raises(ImageInvalid):
                t.parse_toc(text, kind="estargz", payload_end=1, blob_size=1)


class TestFields:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("a", b"a"), ("a/", b"a"), ("a//", b"a"), ("./a", b"a"), ("/a", b"a"), ("//a", b"a"), ("a/./b", b"a/b"),
            ("a/../b", b"b"), ("../../a", b"a"), ("a/b/..", b"a"), ("..", b""), (".", b""), ("", b""), ("/", b""),
            (".a", b".a"), ("..a", b"..a"), ("a/.b", b"a/.b"), ("a/..b/c", b"a/..b/c"), ("...", b"..."),
            ("a/.", b"a"), ("\u00e9", b"\xc3\xa9"), ("x" * 255, b"x" * 255),
            (("x" * 99 + "/") * 40, b"/".join([b"x" * 99] * 40)),
        ],
    )  # fmt: skip
    def test_clean_name(self, text: str, name: bytes) -> None:
        assert clean_name(text) == name

    @pytest.mark.parametrize("text", ["a\0b", "x" * 256, "a/" + "x" * 256 + "/b", "x/" * 2048 + "y"])
    def test_impossible_names(self, text: str) -> None:
        with pytest.raises(ImageInvalid):
            clean_name(text)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", (0, 0)),
            ("0001-01-01T00:00:00Z", (0, 0)),
            ("1970-01-01T00:00:00Z", (0, 0)),
            ("1969-12-31T23:59:59.5Z", (-1, 500_000_000)),
            ("2020-01-01T00:00:00.123456789123Z", (1577836800, 123456789)),
            ("2020-01-01T02:30:00+02:30", (1577836800, 0)),
            ("2019-12-31t19:00:00-05:00", (1577836800, 0)),
            ("0001-01-01T00:00:01Z", (-62135596799, 0)),
        ],
    )
    def test_time(self, text: str, expected: tuple[int, int]) -> None:
        assert parse_time(text) == expected

    @pytest.mark.parametrize(
        "text",
        ["yesterday", "2020-02-30T00:00:00Z", "2020-01-01T24:00:00Z", "2020-01-01T00:60:00Z", "2016-12-31T23:59:60Z",
         "0000-01-01T00:00:00Z", "2020-01-01 00:00:00Z", "2020-01-01T00:00:00", "2020-01-01T00:00:00Z ",
         "٢020-01-01T00:00:00Z"],
    )  # fmt: skip
    def test_no_time(self, text: str) -> None:
        with pytest.raises(ImageInvalid, match="modtime"):
            parse_time(text)

    def test_xattrs(self) -> None:
        assert parse_xattrs({"user.a": "YQ==", "user.b": "", "user.c": None}, "f") == {
            b"user.a": b"a",
            b"user.b": b"",
            b"user.c": b"",
        }
        for raw in (
            {"user.a": "YQ"},
            {"user.a": "é"},
            {"": ""},
            {"a\0": ""},
            {"x" * 256: ""},
            {"a": "AAAA" * 21846},
        ):
            with pytest.raises(ImageInvalid, match="attribute"):
                parse_xattrs(raw, "f")

    @pytest.mark.parametrize(
        "text",
        ["sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "A" * 64, "sha256:" + "g" * 64, "SHA256:" + "0" * 64,
         "sha256:" + "00 " * 21 + "0", "sha512:" + "0" * 64, "sha256:" + "٢" * 64],
    )  # fmt: skip
    def test_digests(self, text: str) -> None:
        refused("not a sha256 digest", reg(digest=text))
        refused("not a sha256 digest", reg(chunkDigest=text))


def tar_with(name: str, content: bytes, **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


class TestExtract:
    def test_gzip(self) -> None:
        assert t.extract_toc(GZIP_FOOTER, gzip.compress(tar_with(t.TOC_FILE_NAME, b"{}"))) == b"{}"
        assert t.extract_external_toc(gzip.compress(tar_with(t.TOC_FILE_NAME, b""))) == b""

    @pytest.mark.parametrize("name", ["./stargz.index.json", "stargz.index.jso", "stargz.index.json2"])
    def test_other_name(self, name: str) -> None:
        with pytest.raises(ImageInvalid, match=r"not stargz\.index\.json"):
            t.extract_toc(GZIP_FOOTER, gzip.compress(tar_with(name, b"{}")))

    def test_not_a_file(self) -> None:
        with pytest.raises(ImageInvalid, match=r"not stargz\.index\.json"):
            t.extract_toc(GZIP_FOOTER, gzip.compress(tar_with(t.TOC_FILE_NAME, b"", type=tarfile.SYMTYPE)))

    @pytest.mark.parametrize("at", [0, 124, 130, 148, 300])
    def test_damaged_header(self, at: int) -> None:
        tar = bytearray(tar_with(t.TOC_FILE_NAME, b"{}"))
        tar[at] ^= 0x40
        with pytest.raises(ImageInvalid, match="tar header"):
            t.extract_toc(GZIP_FOOTER, gzip.compress(tar))

    def test_zstd(self) -> None:
        packed = zstandard.ZstdCompressor().compress(b"{} ")
        assert t.extract_toc(ZSTD_FOOTER._replace(toc_raw_bytes=3), packed) == b"{} "
        with pytest.raises(ImageInvalid, match="ends after 3"):
            t.extract_toc(ZSTD_FOOTER._replace(toc_raw_bytes=4), packed)
        with pytest.raises(ImageInvalid, match="larger than"):
            t.extract_toc(ZSTD_FOOTER._replace(toc_raw_bytes=1 << 40), packed)

    def test_too_large(self) -> None:
        tar = bytearray(tar_with(t.TOC_FILE_NAME, b"{}"))
        header = tarfile.TarInfo(t.TOC_FILE_NAME)
        header.size = t.MAX_TOC_JSON_BYTES + 1
        tar[:512] = header.tobuf(tarfile.USTAR_FORMAT)
        with pytest.raises(ImageInvalid, match="larger than"):
            t.extract_toc(GZIP_FOOTER, gzip.compress(tar))

    def test_junk(self) -> None:
        for junk in (b"", b"junk" * 100, gzip.compress(b"short")):
            with pytest.raises(ImageInvalid, match="TOC"):
                t.extract_toc(GZIP_FOOTER, junk)


class TestAnnotations:
    TOC_JSON, COMPRESSED = b"{}", b"packed"
    OF_JSON, OF_COMPRESSED = str(Digest.of(b"{}")), str(Digest.of(b"packed"))
    OTHER = str(Digest.of(b"other"))

    def check(self, footer: Footer, annotations: dict[str, str], **options: bool) -> Digest:
        return t.check_toc_digests(footer, self.TOC_JSON, self.COMPRESSED, annotations, **options)

    @pytest.mark.parametrize(
        ("footer", "annotations"),
        [
            (GZIP_FOOTER, {t.TOC_DIGEST_ANNOTATION: OF_JSON}),
            (GZIP_FOOTER, {t.TOC_DIGEST_ANNOTATION: OF_JSON, t.SGZ_CHECKSUM_ANNOTATION: OTHER}),
            (ZSTD_FOOTER, {t.TOC_DIGEST_ANNOTATION: OF_JSON}),
            (ZSTD_FOOTER, {t.SGZ_CHECKSUM_ANNOTATION: OF_COMPRESSED}),
            (ZSTD_FOOTER, {t.CONTAINERS_CHECKSUM_ANNOTATION: OF_COMPRESSED, t.CONTAINERS_POSITION_ANNOTATION: "20:30:40:1"}),
        ],
    )  # fmt: skip
    def test_agreeing(self, footer: Footer, annotations: dict[str, str]) -> None:
        assert t.is_vouched(footer, annotations)
        assert t.claims_toc(annotations)
        assert str(self.check(footer, annotations)) == self.OF_JSON

    @pytest.mark.parametrize("unverified", [False, True])
    @pytest.mark.parametrize(
        "annotations",
        [
            {t.TOC_DIGEST_ANNOTATION: OTHER},
            {t.TOC_DIGEST_ANNOTATION: "sha256:1"},
            {t.TOC_DIGEST_ANNOTATION: OF_JSON, t.SGZ_CHECKSUM_ANNOTATION: OTHER},
            {t.TOC_DIGEST_ANNOTATION: OF_JSON, t.CONTAINERS_CHECKSUM_ANNOTATION: "md5:0"},
            {t.SGZ_CHECKSUM_ANNOTATION: OF_COMPRESSED, t.CONTAINERS_CHECKSUM_ANNOTATION: OTHER},
        ],
    )  # fmt: skip
    def test_disagreeing_is_never_allowed(self, annotations: dict[str, str], unverified: bool) -> None:
        with pytest.raises(ImageInvalid):
            self.check(ZSTD_FOOTER, annotations, allow_unverified=unverified)

    @pytest.mark.parametrize("name", [t.SGZ_POSITION_ANNOTATION, t.CONTAINERS_POSITION_ANNOTATION])
    @pytest.mark.parametrize(
        "position",
        ["", "20:30:40", "20:30:40:1:5", "-20:30:40:1", "21:30:40:1", "20:31:40:1", "20:30:41:1",
         "20:30:40:2", "٢0:30:40:1"],
    )  # fmt: skip
    def test_position_is_the_footers(self, name: str, position: str) -> None:
        with pytest.raises(ImageInvalid, match="position"):
            self.check(ZSTD_FOOTER, {t.TOC_DIGEST_ANNOTATION: self.OF_JSON, name: position})
        self.check(GZIP_FOOTER, {t.TOC_DIGEST_ANNOTATION: self.OF_JSON, name: position})

    @pytest.mark.parametrize(
        ("footer", "annotations"),
        [
            (GZIP_FOOTER, {}),
            (ZSTD_FOOTER, {t.SGZ_POSITION_ANNOTATION: "20:30:40:1"}),
            (GZIP_FOOTER, {t.SGZ_CHECKSUM_ANNOTATION: OF_COMPRESSED}),
        ],
    )
    def test_nothing_vouches(self, footer: Footer, annotations: dict[str, str]) -> None:
        with pytest.raises(ImageInvalid, match="--allow-unverified-toc"):
            self.check(footer, annotations)
        assert str(self.check(footer, annotations, allow_unverified=True)) == self.OF_JSON
        assert not t.is_vouched(footer, annotations)


class TestTail:
    def test_manifest_claims_a_toc_that_is_not_there(self) -> None:
        blob = gzip.compress(b"plain")
        assert open_layer_tail(blob, len(blob), {}) == NotLazy()
        assert open_layer_tail(blob, len(blob), {"org.example": "x"}) == NotLazy()
        with pytest.raises(ImageInvalid, match="does not end with a footer"):
            open_layer_tail(blob, len(blob), {t.TOC_DIGEST_ANNOTATION: "sha256:x"})

    def test_toc_longer_than_the_tail(self) -> None:
        tail = make_estargz_footer(1000)
        assert open_layer_tail(tail, 1 << 20, {}) == NeedMore(1000)

    def test_tail_start(self) -> None:
        assert tail_start(10) == 0
        assert tail_start(1 << 30) == (1 << 30) - (256 << 10)
