"""The TOC of a layer that is being written: what eStargz's and stargz-snapshotter's zstd:chunked readers
expect.

Called by `writer` when the whole stream is known. The stream keeps every entry as it came, so that unpacking
it does what unpacking the original did; the TOC has each name once, as it is after the last entry. A hard
link whose target is written again later keeps the earlier file: the TOC lists that file under the link's name
(the reference writer gives it the later content). eStargz specification, "TOC".
"""

from __future__ import annotations

import codecs
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec

from p2pgz.convert.packer import Place
from p2pgz.core.tar import Header
from p2pgz.core.tarfields import clean_name

_TOC_VERSION = 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59Z: RFC 3339 has four digits for the year
FIRST_SECOND = -62_135_596_799  # the second after Go's zero time, which means "no time"
_ROUND_UP_NSEC = 500_000_000


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("p2pgz.one-mark-per-byte", _one_mark_per_byte)


def toc_text(name: bytes) -> str:
    """A name as TOC writers put it: bytes that are not UTF-8 become U+FFFD each."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode(errors="p2pgz.one-mark-per-byte")


@lru_cache(4096)
def toc_time(seconds: int, nanoseconds: int) -> str:
    """A time as the reference writer puts it: to the nearest second, empty for second 0."""
    if seconds == 0:
        return ""
    if nanoseconds >= _ROUND_UP_NSEC:
        seconds += 1
    moment = _EPOCH + timedelta(seconds=min(max(seconds, FIRST_SECOND), LAST_SECOND))
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(len("2000-01-01T00:00:00Z"), "0")


@lru_cache(4096)
def toc_moment(seconds: int, nanoseconds: int) -> str:
    """A time as containers' writers put it: exact, and never left out."""
    text = toc_time(seconds, 0) or "1970-01-01T00:00:00Z"
    return f"{text[:-1]}.{nanoseconds:09d}".rstrip("0") + "Z" if nanoseconds else text


class TocEntry(msgspec.Struct, omit_defaults=True, gc=False, rename="camel"):
    """One element of the TOC, in the order of keys that the reference writer has."""

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    user_name: str = ""
    group_name: str = ""
    offset: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes] = {}
    digest: str = ""
    chunk_offset: int = 0
    chunk_size: int = 0
    chunk_digest: str = ""


class Written(msgspec.Struct, gc=False):
    """An entry of the stream. `digest` is the whole file's when it has several chunks."""

    header: Header
    name: bytes
    places: list[Place]
    digest: bytes = b""


class _Toc(msgspec.Struct):
    version: int
    entries: list[TocEntry]


def toc_json(entries: list[Written], *, chunk_bytes: int) -> bytes:
    """The TOC's JSON, compact."""
    return msgspec.json.encode(_Toc(_TOC_VERSION, _Lister(chunk_bytes).listed(entries)))


class _Lister:
    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._users: dict[int, bytes] = {}
        self._groups: dict[int, bytes] = {}

    def listed(self, entries: list[Written]) -> list[TocEntry]:
        names = settle(entries)
        listed: list[TocEntry] = []
        for written, (name, link) in zip(entries, names, strict=True):
            if name is not None:
                self._entry(written, name, link, listed)
        return listed

    def _entry(self, written: Written, name: bytes, link: bytes, listed: list[TocEntry]) -> None:
        header = written.header
        entry = TocEntry(
            name=toc_text(name), type=header.kind, size=header.size, modtime=toc_time(header.mtime, header.mtime_nsec),
            link_name=toc_text(link), mode=header.mode, uid=header.uid, gid=header.gid,
            user_name=self._if_changed(self._users, header.uid, header.user),
            group_name=self._if_changed(self._groups, header.gid, header.group),
            dev_major=header.dev_major, dev_minor=header.dev_minor,
        )  # fmt: skip
        if header.xattrs:
            entry.xattrs = {toc_text(key): value for key, value in sorted(header.xattrs.items())}
        listed.append(entry)
        if header.kind != "reg":
            return
        entry.digest = f"sha256:{written.digest.hex()}"
        part = entry
        for index, place in enumerate(written.places):
            if index:
                part = TocEntry(name=entry.name, type="chunk", chunk_offset=index * self._chunk_bytes)
                listed.append(part)
            part.offset = place.offset
            part.chunk_digest = entry.digest if len(written.places) == 1 else f"sha256:{place.digest.hex()}"
            if header.size - index * self._chunk_bytes >= self._chunk_bytes:
                part.chunk_size = self._chunk_bytes  # left out otherwise: it means "to the end"

    def _if_changed(self, known: dict[int, bytes], number: int, name: bytes) -> str:
        if not name or known.get(number) == name:
            return ""
        known[number] = name
        return toc_text(name)


def settle(entries: list[Written]) -> list[tuple[bytes | None, bytes]]:
    """For each entry, the name under which the TOC lists it and its link target; None for those that are
    gone.

    What is gone: an entry whose name comes again later, and what lay in a directory that became something
    else.
    """
    last = {written.name: index for index, written in enumerate(entries)}
    gone = _gone(entries, last)
    settled: list[tuple[bytes | None, bytes]] = [
        (written.header.name, written.header.link) for written in entries
    ]
    if not gone:
        return settled
    current: dict[bytes, int] = {}
    inode: list[int] = []  # of each entry, the entry that made the inode; -1 when that is in a lower layer
    links: dict[int, list[int]] = {}
    for index, written in enumerate(entries):
        made_by = index
        if written.header.kind == "hardlink":
            target = current.get(clean_name(written.header.link))
            made_by = inode[target] if target is not None else -1
            links.setdefault(made_by, []).append(index)
        inode.append(made_by)
        current[written.name] = index
    for index in gone:
        settled[index] = (None, b"")
    for made_by, linked in links.items():
        if made_by < 0:
            continue
        alive = [index for index in linked if index not in gone]
        if not alive:
            continue
        if made_by in gone:  # the file lives on under the name of its first link
            heir = alive.pop(0)
            settled[made_by] = (entries[heir].header.name, entries[made_by].header.link)
            settled[heir] = (None, b"")
        for index in alive:
            target = last.get(clean_name(entries[index].header.link))
            if target is None or target in gone or inode[target] != made_by or settled[target][0] is None:
                settled[index] = (entries[index].header.name, settled[made_by][0] or b"")
    return settled


def _gone(entries: list[Written], last: dict[bytes, int]) -> set[int]:
    """Indexes of entries that a later one replaces, or lays itself over as a file where a directory was.

    One pass over the names in the order of a walk, in which what is below a name follows it at once: the cost does not
    grow with the depth of the tree.
    """
    gone = (
        set()
        if len(last) == len(entries)
        else {index for index, w in enumerate(entries) if last[w.name] != index}
    )
    covered: dict[bytes, int] = {}  # the last entry of a name that is no directory
    for index, written in enumerate(entries):
        if written.header.kind != "dir":
            covered[written.name] = index
    # NUL sorts before every byte that a name can hold, so `a/b` stands before `a-b`
    order = sorted(range(len(entries)), key=lambda index: entries[index].name.replace(b"/", b"\0"))
    above: list[
        tuple[bytes, int]
    ] = []  # (prefix, last entry that covers it or one above) of the names we are below
    for index in order:
        name = entries[index].name
        while above and not name.startswith(above[-1][0]):
            above.pop()
        if above and above[-1][1] > index:
            gone.add(index)
        at = covered.get(name, -1)
        if at >= 0 and name and (not above or at > above[-1][1]):
            above.append((name + b"/", at))
    return gone
