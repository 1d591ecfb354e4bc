"""Headers made from fields alone, read back by the standard library and by the parser."""

import io
import tarfile

import pytest

from p2pgz.convert.tarheader import make_header
from p2pgz.convert.tocwriter import toc_text, toc_time
from p2pgz.core.tar import Header, TarParser

FIELDS = {
    "name": b"n", "kind": "reg", "mode": 0o644, "uid": 0, "gid": 0, "size": 0, "mtime": 0, "mtime_nsec": 0, "link": b"",
    "user": b"", "group": b"", "dev_major": 0, "dev_minor": 0, "xattrs": {}, "raw": b"", "plain": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": b"d" * 99 + b"/", "kind": "dir"},
        {"name": b"d" * 100 + b"/", "kind": "dir"},
        {"name": b"caf\xe9" * 60, "link": b"t" * 101, "kind": "symlink"},
        {"uid": (1 << 21) - 1, "gid": 1 << 21, "user": b"u" * 33, "group": b"g" * 32},
        {"mtime": -2, "mtime_nsec": 750_000_000},
        {"mtime": -1, "mtime_nsec": 1},
        {"mtime": -5},
        {"mtime": 1 << 33},
        {"mtime": 5, "mtime_nsec": 100_000_000},
        {"kind": "char", "dev_major": 4095, "dev_minor": 1 << 21},
        {"xattrs": {b"user.a=b": b"\0\xff", b"user.n": b"", b"user.x": b"v" * 3000}},
        *[
            {"xattrs": {b"user.x": b"v" * size}} for size in range(70, 82)
        ],  # where the length gets a digit more
    ],
)
def test_header_says_what_it_was_made_from(fields: dict[str, object]) -> None:
    header = Header(**FIELDS | fields)
    raw = make_header(header)
    found = next(event for event in TarParser().feed(raw) if isinstance(event, Header))
    found.raw, found.plain = b"", False
    assert found == header
    with tarfile.open(
        fileobj=io.BytesIO(raw + bytes(1024)), encoding="utf-8", errors="surrogateescape"
    ) as tar:
        (member,) = tar.getmembers()
    assert member.name.encode("utf-8", "surrogateescape").rstrip(b"/") == header.name.rstrip(b"/")
    assert (member.uid, member.gid, member.devminor) == (header.uid, header.gid, header.dev_minor)


def test_large_size_is_a_record() -> None:
    raw = make_header(Header(**FIELDS | {"size": 1 << 34}))
    found = next(event for event in TarParser().feed(raw) if isinstance(event, Header))
    assert found.size == 1 << 34


def test_directory_gets_its_slash() -> None:
    raw = make_header(Header(**FIELDS | {"kind": "dir", "name": b"d"}))
    assert raw.startswith(b"d/\0")


def test_times_as_the_reference_writer_puts_them() -> None:
    assert toc_time(0, 900_000_000) == ""
    assert toc_time(1, 500_000_000) == "1970-01-01T00:00:02Z"
    assert toc_time(-1, 500_000_000) == "1970-01-01T00:00:00Z"
    assert toc_time(1 << 60, 0) == "9999-12-31T23:59:59Z"
    assert toc_time(-(1 << 60), 0) == "0001-01-01T00:00:01Z"


def test_names_get_one_mark_for_each_bad_byte() -> None:
    assert toc_text("über".encode()) == "über"
    assert toc_text(b"a\xe2\x82b\xffc") == "a\ufffd\ufffdb\ufffdc"
