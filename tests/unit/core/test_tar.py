"""The tar parser against the standard library, against old and odd archives, and against damage."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from p2pgz.core.pax import MAX_RECORDS, parse_time, read_records
from p2pgz.core.sparse import MAX_SPARSE_RUNS
from p2pgz.core.tar import (
    MAX_EXTENDED_BYTES,
    MAX_EXTENDED_HEADERS,
    MAX_FILE_BYTES,
    MAX_NAME_BYTES,
    MAX_WARNINGS,
    EntryEnd,
    Event,
    Header,
    Hole,
    Other,
    Payload,
    TarParser,
)
from p2pgz.core.tarfields import clean_name, number
from p2pgz.errors import ImageInvalid

VECTORS = Path(__file__).parents[2] / "vectors"
END = bytes(1024)


def parse(stream: bytes, piece_bytes: int = 1 << 20) -> tuple[list[Event], list[str]]:
    parser = TarParser()
    events: list[Event] = []
    for at in range(0, len(stream), piece_bytes):
        events += parser.feed(stream[at : at + piece_bytes])
    parser.finish()
    return events, parser.warnings


def headers(stream: bytes) -> list[Header]:
    return [event for event in parse(stream)[0] if isinstance(event, Header)]


def contents(events: list[Event]) -> list[bytes]:
    files: list[bytes] = []
    for event in events:
        if isinstance(event, Header):
            files.append(b"")
        elif isinstance(event, Payload):
            files[-1] += event.data
        elif isinstance(event, Hole):
            files[-1] += bytes(event.size)
    return files


def stream_again(events: list[Event]) -> bytes:
    return b"".join(
        event.raw if isinstance(event, Header) else event.data if isinstance(event, Payload | Other) else b""
        for event in events
    )


def checked(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(
    name: bytes = b"x", *, flag: bytes = b"0", size: int = 0, payload: bytes | None = None, **places: bytes
) -> bytes:
    """A ustar header, with bytes put over it at `at_N`, and its payload."""
    content = payload if payload is not None else b""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:148] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % (len(content) or size) + b"00000000001\0"
    block[156:157] = flag
    block[257:265] = b"ustar\x0000"
    for place, data in places.items():
        at = int(place.removeprefix("at_"))
        block[at : at + len(data)] = data
    return checked(block) + content + bytes(-len(content) % 512)


def pax(records: dict[str, bytes] | bytes, flag: bytes = b"x") -> bytes:
    content = (
        records
        if isinstance(records, bytes)
        else b"".join(record(key.encode(), value) for key, value in records.items())
    )
    return header(b"pax", flag=flag, payload=content)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


@pytest.mark.parametrize(
    "name", ["basic", "links", "names", "order", "hlorder", "reserved", "empty", "latin1"]
)
def test_says_what_the_standard_library_says(name: str) -> None:
    stream = (VECTORS / "blobs" / f"{name}.tar.tar").read_bytes()
    events, warnings = parse(stream)
    assert warnings == []
    assert stream_again(events) == stream
    with tarfile.open(fileobj=io.BytesIO(stream), encoding="utf-8", errors="surrogateescape") as tar:
        members = tar.getmembers()
        files = [tar.extractfile(m).read() if m.isreg() else b"" for m in members]
    found = [event for event in events if isinstance(event, Header)]
    kinds = {
        b"0": "reg",
        b"1": "hardlink",
        b"2": "symlink",
        b"3": "char",
        b"4": "block",
        b"5": "dir",
        b"6": "fifo",
    }
    assert contents(events) == files
    assert [
        (h.name.rstrip(b"/"), h.kind, h.mode, h.uid, h.gid, h.size, h.mtime, h.link, h.user, h.group) for h in found
    ] == [
        (
            m.name.encode("utf-8", "surrogateescape").rstrip(b"/"), kinds[m.type], m.mode & 0o7777, m.uid, m.gid,
            m.size if m.isreg() else 0, int(m.mtime), m.linkname.encode("utf-8", "surrogateescape"), m.uname.encode(),
            m.gname.encode(),
        )
        for m in members
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["basic", "meta", "names", "latin1", "sparse-gnu", "sparse-pax00", "sparse-pax10"]
)
def test_byte_by_byte_is_the_same_as_whole(name: str) -> None:
    stream = (VECTORS / "blobs" / f"{name}.tar.tar").read_bytes()[:200_000]
    if name == "basic":
        stream = stream[:20_480]
    parser = TarParser()
    bytewise = [event for at in range(len(stream)) for event in parser.feed(stream[at : at + 1])]
    whole = TarParser().feed(stream)
    assert contents(bytewise) == contents(whole)
    plain = [
        [event for event in events if isinstance(event, Header | Hole | EntryEnd)]
        for events in (bytewise, whole)
    ]
    assert plain[0] == plain[1]


def test_old_and_odd_headers() -> None:
    v7_directory = header(b"old/", flag=b"\0", at_257=bytes(8))
    contiguous = header(b"seven", flag=b"7", payload=b"content")
    prefixed = header(b"name", at_345=b"pre/fix")
    gnu_without_prefix = header(b"name", at_257=b"ustar  \0", at_345=b"not a prefix")
    link_with_size = header(b"link", flag=b"1", size=700, at_157=b"target")
    device = header(b"dev", flag=b"3", at_329=b"0000010\0", at_337=b"\x80" + (70_000).to_bytes(7, "big"))
    found = headers(v7_directory + contiguous + prefixed + gnu_without_prefix + link_with_size + device + END)
    assert [(h.name, h.kind, h.size, h.plain) for h in found] == [
        (b"old/", "dir", 0, True),
        (b"seven", "reg", 7, False),
        (b"pre/fix/name", "reg", 0, True),
        (b"name", "reg", 0, True),
        (b"link", "hardlink", 0, False),
        (b"dev", "char", 0, True),
    ]
    assert (found[5].dev_major, found[5].dev_minor) == (8, 70_000)


def test_signed_checksums_of_historic_writers() -> None:
    block = bytearray(header(b"caf\xe9"))
    block[148:156] = b" " * 8
    signed = sum(struct.unpack("512b", block))
    block[148:156] = b"%06o\0 " % signed
    assert headers(bytes(block) + END)[0].name == b"caf\xe9"


def test_numbers() -> None:
    assert number(b"0000644\0") == 0o644
    assert number(b"   644 \0") == 0o644
    assert number(bytes(8)) == 0
    assert number(b"644\0junk") == 0o644
    assert number(b"\x80" + (1 << 40).to_bytes(11, "big")) == 1 << 40
    assert number(b"\xff" * 11 + b"\xfe") == -2
    for wrong in (b"0o17    ", b"1_0\0", b"-1", b"9", b"\x80" + b"\x7f" * 11):
        with pytest.raises(ValueError, match=r"oct|bits|base"):
            number(wrong)


def test_global_headers_reach_every_entry_and_can_be_taken_back() -> None:
    stream = (
        pax({"uid": b"7", "uname": b"seven", "SCHILY.xattr.user.g": b"v"}, b"g") + header(b"a")
        + pax({"uid": b"8"}) + header(b"b")
        + pax({"uid": b"", "uname": b""}, b"g") + pax(b"", b"g") + header(b"c") + END
    )  # fmt: skip
    found = headers(stream)
    assert [(h.uid, h.user, h.xattrs, h.plain) for h in found] == [
        (7, b"seven", {b"user.g": b"v"}, False),
        (8, b"seven", {b"user.g": b"v"}, False),
        (0, b"", {b"user.g": b"v"}, False),
    ]
    assert stream_again(parse(stream)[0]) == stream


def test_records_override_the_header() -> None:
    records = {
        "path": b"long/name", "linkpath": b"to", "size": b"3", "uid": b"5000000", "gid": b"6", "uname": b"u", "gname": b"g",
        "mtime": b"-1.25", "SCHILY.xattr.user.a": b"\0\xff", "SCHILY.xattr.user.empty": b"", "unknown": b"ignored",
        "LIBARCHIVE.xattr.user.b%3D": b"aGk", "LIBARCHIVE.xattr.user.a": b"bm8",
        "SCHILY.devmajor": b"1", "SCHILY.devminor": b"2",
        "comment": b"",
    }  # fmt: skip
    (found,) = headers(pax(records) + header(b"short", payload=b"abc") + END)
    assert (found.name, found.link, found.size, found.uid, found.gid) == (b"long/name", b"", 3, 5_000_000, 6)
    assert (found.user, found.group, found.mtime, found.mtime_nsec) == (b"u", b"g", -2, 750_000_000)
    assert found.xattrs == {b"user.a": b"\0\xff", b"user.empty": b"", b"user.b=": b"hi"}
    assert (found.dev_major, found.dev_minor) == (0, 0)
    (found,) = headers(pax(records | {"size": b"0"}) + header(b"short", flag=b"4") + END)
    assert (found.dev_major, found.dev_minor) == (1, 2)
    (found,) = headers(pax({"linkpath": b"to"}) + header(b"short", flag=b"2", at_157=b"from") + END)
    assert found.link == b"to"


def test_gnu_long_names() -> None:
    name, target = b"n" * 300, b"t" * 400
    extended = header(b"././@LongLink", flag=b"L", payload=name + b"\0") + header(
        b"././@LongLink", flag=b"K", payload=target
    )
    found = headers(extended + header(b"cut", flag=b"2", at_157=b"cut") + header(b"next") + END)
    assert [(h.name, h.link) for h in found] == [(name, target), (b"next", b"")]


def test_times() -> None:
    assert parse_time(b"1.5") == (1, 500_000_000)
    assert parse_time(b"-0.5") == (-1, 500_000_000)
    assert parse_time(b"-3") == (-3, 0)
    assert parse_time(b"2.") == (2, 0)
    assert parse_time(b"0.12345678999") == (0, 123_456_789)
    for wrong in (b"", b"x", b"1e5", b"+1", b"1.x", b"99999999999999999999"):
        with pytest.raises(ValueError, match="time"):
            parse_time(wrong)


def test_types_that_no_tree_has_are_skipped_with_a_warning() -> None:
    stream = (
        header(b"volume", flag=b"V")
        + pax({"path": b"p"})
        + header(b"dump", flag=b"D", payload=b"z" * 700)
        + header(b"kept")
        + END
    )
    events, warnings = parse(stream)
    assert [event.name for event in events if isinstance(event, Header)] == [b"kept"]
    assert len(warnings) == 2
    assert "'volume'" in warnings[0]
    assert stream_again(events) == stream
    assert len(parse(header(flag=b"V") * 100)[1]) == MAX_WARNINGS


@pytest.mark.parametrize("tail", [b"", bytes(512), END, END + b"anything at all"])
def test_ends_that_are_accepted(tail: bytes) -> None:
    stream = header(b"f", payload=b"abc") + tail
    assert stream_again(parse(stream)[0]) == stream


def text_map(*numbers: int) -> bytes:
    text = b"".join(b"%d\n" % n for n in numbers)
    return text + bytes(-len(text) % 512)


SPARSE_1_0 = {
    "GNU.sparse.major": b"1",
    "GNU.sparse.minor": b"0",
    "GNU.sparse.name": b"s",
    "GNU.sparse.realsize": b"1000",
}


def test_sparse_maps() -> None:
    one = pax(SPARSE_1_0) + header(b"other", payload=text_map(2, 10, 3, 998, 2) + b"abcde")
    listed = record(b"GNU.sparse.size", b"9") + b"".join(
        record(b"GNU.sparse.offset", o) + record(b"GNU.sparse.numbytes", n)
        for o, n in ((b"0", b"2"), (b"2", b"1"), (b"9", b"0"))
    )
    zero = pax(listed) + header(b"z", payload=b"abc")
    mapped = pax({"GNU.sparse.size": b"5", "GNU.sparse.name": b"m", "GNU.sparse.map": b"4,1"}) + header(
        b"x", payload=b"q"
    )
    empty = pax({"GNU.sparse.size": b"4", "GNU.sparse.name": b"e", "GNU.sparse.map": b""}) + header(b"x")
    run = b"%011o\0%011o\0"
    old = header(
        b"old",
        flag=b"S",
        size=1024,
        at_257=b"ustar  \0",
        at_386=run % (512, 512),
        at_482=b"\1",
        at_483=b"%011o\0" % 3000,
    )
    old += run % (2000, 512) + bytes(480) + b"\0" * 8 + b"x" * 512 + b"y" * 512
    stream = one + zero + mapped + empty + old + END
    events, _ = parse(stream)
    assert contents(events) == [
        bytes(10) + b"abc" + bytes(985) + b"de",
        b"abc" + bytes(6),
        bytes(4) + b"q",
        bytes(4),
        bytes(512) + b"x" * 512 + bytes(976) + b"y" * 512 + bytes(488),
    ]
    assert [h.name for h in events if isinstance(h, Header)] == [b"s", b"z", b"m", b"e", b"old"]
    assert stream_again(events) == stream


def sparse(payload: bytes, **records: bytes) -> bytes:
    return pax(SPARSE_1_0 | {key.replace("_", "."): value for key, value in records.items()}) + header(
        b"s", payload=payload
    )


BROKEN = {
    "checksum": header()[:150] + b"7" + header()[151:],
    "not octal": header(at_100=b"000o644\0"),
    "negative size": header(at_124=b"\xff" * 12),
    "huge size": header(at_124=b"\x80" + (MAX_FILE_BYTES + 1).to_bytes(11, "big")),
    "huge PAX size": pax({"size": str(MAX_FILE_BYTES + 1).encode()}) + header(),
    "huge PAX header": header(flag=b"x", size=MAX_EXTENDED_BYTES + 1),
    "too many extended headers": header(flag=b"L", payload=b"n") * (MAX_EXTENDED_HEADERS + 1),
    "empty extended headers without end": header(flag=b"x") * (MAX_EXTENDED_HEADERS + 1),
    "too many global records": b"".join(pax({f"k{n}": b"v" * 500_000}, b"g") for n in range(3)),
    "lone block of zeros": header() + bytes(512) + header(),
    "extended header without entry": pax({"path": b"p"}) + END,
    "name too long": header(flag=b"L", payload=b"n" * (MAX_NAME_BYTES + 1)) + header(),
    "NUL in name": pax({"path": b"a\0b"}) + header(),
    "cut header": header()[:100],
    "cut payload": header(payload=b"abc")[:514],
    "cut padding": header(payload=b"abc")[:600],
    "cut extended header": pax({"path": b"p"})[:600],
    "entry missing after extended header": pax({"path": b"p"}),
    "record length": pax(b"99 path=x\n") + header(),
    "record without length": pax(b"path=x\n") + header(),
    "record without key": pax(b"6 =xy\n") + header(),
    "record without newline": pax(b"9 path=xy") + header(),
    "record with NUL in key": pax(record(b"a\0", b"v")) + header(),
    "record of bad number": pax({"uid": b"x"}) + header(),
    "record of negative size": pax({"size": b"-1"}) + header(),
    "record of bad time": pax({"mtime": b"soon"}) + header(),
    "record of bad base64": pax({"LIBARCHIVE.xattr.a": b"***"}) + header(),
    "attribute without name": pax({"SCHILY.xattr.": b"v"}) + header(),
    "sparse without size": sparse(text_map(0), GNU_sparse_realsize=b""),
    "sparse of unknown version": sparse(text_map(0), GNU_sparse_major=b"2"),
    "sparse without map": sparse(b"x"),
    "sparse map of words": sparse(b"two\n" + bytes(508)),
    "sparse map cut": sparse(b"9\n1\n" + bytes(508)),
    "sparse map without line": sparse(bytes(512)),
    "sparse map too long": sparse(b"%d\n" % (MAX_SPARSE_RUNS + 1) + bytes(600)),
    "sparse overlap": sparse(text_map(2, 10, 5, 12, 1) + b"abcdef"),
    "sparse beyond size": sparse(text_map(1, 999, 2) + b"ab"),
    "sparse of other size": sparse(text_map(1, 0, 2) + b"abc"),
    "sparse too large": sparse(text_map(0), GNU_sparse_realsize=str(MAX_FILE_BYTES + 1).encode()),
    "sparse name with NUL": sparse(text_map(0), GNU_sparse_name=b"a\0"),
    "sparse runs out of order": pax(record(b"GNU.sparse.numbytes", b"1")) + header(),
    "sparse map of odd length": pax({"GNU.sparse.size": b"5", "GNU.sparse.map": b"1,2,3"}) + header(),
    "old sparse map of words": header(flag=b"S", at_386=b"xyz"),
    "old sparse map of negative numbers": header(flag=b"S", at_386=b"\xff" * 24),
    "old sparse size": header(flag=b"S", at_483=b"junk"),
}  # fmt: skip


@pytest.mark.parametrize("stream", BROKEN.values(), ids=BROKEN.keys())
def test_broken_archives_are_refused(stream: bytes) -> None:
    with pytest.raises(ImageInvalid):
        parse(stream)


def test_map_of_many_runs_in_extension_blocks_ends() -> None:
    parser = TarParser()
    parser.feed(header(flag=b"S", at_482=b"\1"))
    block = (b"%011o\0%011o\0" % (1, 0)) * 21 + b"\1" + bytes(7)
    for _ in range(MAX_SPARSE_RUNS // 21):
        parser.feed(block)
    with pytest.raises(ImageInvalid, match="runs"):
        parser.feed(block)


def test_too_many_records() -> None:
    with pytest.raises(ImageInvalid, match="records"):
        read_records(record(b"k", b"v") * (MAX_RECORDS + 1))
    assert read_records(record(b"k", b"v") + bytes(20)) == ({b"k": b"v"}, [])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"a/b", b"a/b"), (b"a/", b"a"), (b"./a", b"a"), (b"/", b""), (b".", b""), (b"", b""), (b"../a", b"a"),
        (b"a//b/./c/../d/", b"a/b/d"), (b"/../../x", b"x"), (b".hidden", b".hidden"), (b"a/..", b""),
        (b"..a/b..", b"..a/b.."),
    ],
)  # fmt: skip
def test_clean_names(raw: bytes, clean: bytes) -> None:
    assert clean_name(raw) == clean


def test_map_of_several_blocks() -> None:
    numbers = [n for run in range(100) for n in (run * 10, 1)]
    stream = sparse(text_map(100, *numbers) + b"x" * 100) + END
    events, _ = parse(stream, 100)
    assert contents(events) == [(b"x" + bytes(9)) * 100]
    assert stream_again(events) == stream
