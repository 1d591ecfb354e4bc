"""Tar streams that the standard library writes, and the same ones damaged."""

import contextlib
import io
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.convert.tarheader import make_header
from p2pgz.core.tar import Header, Hole, Other, Payload, TarParser
from p2pgz.errors import ImageInvalid

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150).filter(
    lambda name: name.strip("/") and not name.endswith("/")
)
MEMBERS = st.lists(
    st.tuples(
        NAMES, st.sampled_from("012356"), st.binary(max_size=1500), st.integers(0, 0o7777), st.integers(0, 1 << 31),
        st.integers(-(10**9), 10**12),
    ),
    max_size=6,
)  # fmt: skip
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive(members: list[tuple[str, str, bytes, int, int, int]], tar_format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, kind, data, mode, owner, mtime in members:
            member = tarfile.TarInfo(name)
            member.type = kind.encode()
            member.mode, member.uid, member.gid, member.mtime = mode, owner, owner // 2, mtime
            if kind in "12":
                member.linkname = name[::-1]
            member.size = len(data) if kind == "0" else 0
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def parse(stream: bytes, cuts: list[int]) -> list[object]:
    parser = TarParser()
    events: list[object] = []
    at = 0
    for cut in [*cuts, len(stream)]:
        events += parser.feed(stream[at : at + cut])
        at += cut
    parser.finish()
    return events


def contents(events: list[object]) -> list[tuple[Header, bytes]]:
    files: list[tuple[Header, bytes]] = []
    for event in events:
        if isinstance(event, Header):
            files.append((event, b""))
        elif isinstance(event, Payload):
            files[-1] = (files[-1][0], files[-1][1] + event.data)
        elif isinstance(event, Hole):
            files[-1] = (files[-1][0], files[-1][1] + bytes(min(event.size, 1000)))
    return files


@settings(max_examples=60, deadline=None)
@given(MEMBERS, FORMATS, st.lists(st.integers(0, 700), max_size=40))
def test_any_cut_gives_the_same_entries_and_every_byte_once(
    members: list, tar_format: int, cuts: list[int]
) -> None:
    stream = archive(members, tar_format)
    events = parse(stream, cuts)
    assert contents(events) == contents(parse(stream, []))
    told = (
        e.raw if isinstance(e, Header) else e.data for e in events if isinstance(e, Header | Payload | Other)
    )
    assert b"".join(told) == stream
    assert [(h.name.decode().rstrip("/"), data) for h, data in contents(events)] == [
        (name.rstrip("/"), data if kind == "0" else b"") for name, kind, data, *_ in members
    ]


@settings(max_examples=60, deadline=None)
@given(MEMBERS, FORMATS)
def test_header_made_anew_says_the_same(members: list, tar_format: int) -> None:
    for before, _ in contents(parse(archive(members, tar_format), [])):
        raw = make_header(before)
        (after, _), *_ = contents(TarParser().feed(raw))
        for key in (
            "kind",
            "mode",
            "uid",
            "gid",
            "size",
            "mtime",
            "mtime_nsec",
            "link",
            "user",
            "group",
            "xattrs",
        ):
            assert getattr(after, key) == getattr(before, key), key
        assert after.name.rstrip(b"/") == before.name.rstrip(b"/")
        with tarfile.open(
            fileobj=io.BytesIO(raw + bytes(1 << 14)), errors="surrogateescape", encoding="utf-8"
        ) as tar:
            assert tar.getmembers()[0].uid == before.uid


@settings(max_examples=150, deadline=None)
@given(
    MEMBERS,
    FORMATS,
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
    st.data(),
)
def test_damage_is_an_archive_or_the_named_error(
    members: list, tar_format: int, changes: list, data: st.DataObject
) -> None:
    stream = bytearray(archive(members, tar_format)[: data.draw(st.integers(0, 8000))])
    for place, value in changes:
        if stream:
            stream[place % len(stream)] = value
    fix = data.draw(st.booleans())
    if fix and len(stream) >= 512:  # get past the checksum
        stream[148:156] = b" " * 8
        stream[148:156] = b"%06o\0 " % sum(stream[:512])
    with contextlib.suppress(ImageInvalid):
        parse(bytes(stream), [])
