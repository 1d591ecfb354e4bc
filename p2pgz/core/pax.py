"""PAX extended headers: records, and what they change in an entry.

For `core.tar` only. Records are read exactly (a length that lies is an error, as in Go's archive/tar), values
stay bytes. POSIX.1-2017 pax, "pax Extended Header"; SCHILY.xattr is star's, LIBARCHIVE.xattr libarchive's,
GNU.sparse GNU tar's.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote_to_bytes

from p2pgz.errors import ImageInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_RECORDS = (
    20_000  # in one extended header; ten thousand attributes on one file is the most seen in the wild
)
_NANOSECONDS = 1_000_000_000
_MAX_SECONDS = 1 << 62
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?\Z")
_XATTR = b"SCHILY.xattr."
_XATTR_BASE64 = b"LIBARCHIVE.xattr."
_SPARSE_RUN = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


class _Entry(Protocol):
    """The fields of an entry that records change."""

    name: bytes
    link: bytes
    kind: str
    size: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    user: bytes
    group: bytes
    dev_major: int
    dev_minor: int
    xattrs: dict[bytes, bytes]


def read_records(content: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """The records of an extended header, and apart from them the repeated ones that list the runs of a sparse
    file (0.0).
    """
    records: dict[bytes, bytes] = {}
    runs: list[bytes] = []
    at = 0
    end = len(content)
    count = 0
    while at < end:
        if content[at] == 0 and not content[at:].strip(b"\0"):
            break  # some writers count their padding as content
        space = content.find(b" ", at, at + 10)
        digits = content[at:space] if space > 0 else b""
        if not digits.isdigit():
            raise ImageInvalid("tar stream: a PAX record does not begin with its length")
        record_end = at + int(digits)
        equals = content.find(b"=", space, record_end)
        if (
            record_end > end
            or equals <= space + 1
            or content[record_end - 1] != 0x0A
            or equals > record_end - 2
        ):
            raise ImageInvalid("tar stream: a PAX record is not `length key=value`")
        key, value = content[space + 1 : equals], content[equals + 1 : record_end - 1]
        if b"\0" in key:
            raise ImageInvalid("tar stream: a PAX record's key holds a NUL byte")
        if key in _SPARSE_RUN:
            if _SPARSE_RUN[len(runs) % 2] != key:
                raise ImageInvalid("tar stream: the records of a sparse file are out of order")
            runs.append(value)
        else:
            records[key] = value
        at = record_end
        count += 1
        if count > MAX_RECORDS:
            raise ImageInvalid(f"tar stream: more than {MAX_RECORDS} records in a PAX header")
    return records, runs


def parse_time(text: bytes) -> tuple[int, int]:
    """Seconds and nanoseconds (0..999999999) of a PAX time such as `-0.5`; raises ValueError."""
    match = _TIME.match(text)
    if match is None:
        raise ValueError("not a time")
    sign, whole, fraction = match.groups()
    seconds = int(whole)
    if seconds > _MAX_SECONDS:
        raise ValueError("beyond all time")
    nanoseconds = int((fraction or b"")[:9].ljust(9, b"0"))
    if sign:
        seconds = -seconds
        if nanoseconds:
            return seconds - 1, _NANOSECONDS - nanoseconds
    return seconds, nanoseconds


def _decimal(value: bytes) -> int:
    digits = value[1:] if value[:1] == b"-" else value
    if not digits.isdigit() or len(digits) > 19:
        raise ValueError("not a number")
    return int(value)


def apply_records(entry: _Entry, records: Mapping[bytes, bytes]) -> None:
    """Let records override what an entry's own header says; an empty value means that the header's counts."""
    try:
        for key, value in records.items():
            if key.startswith(_XATTR):
                entry.xattrs[_attribute(key[len(_XATTR) :])] = value
            elif key.startswith(_XATTR_BASE64):
                name = _attribute(unquote_to_bytes(key[len(_XATTR_BASE64) :]))
                padded = value + b"=" * (-len(value) % 4)  # libarchive leaves the padding out
                entry.xattrs.setdefault(name, base64.b64decode(padded, validate=True))
            elif value:
                _apply(entry, key, value)
    except (ValueError, binascii.Error) as error:
        raise ImageInvalid(
            f"tar stream: a PAX record of {entry.name[:200]!r} is malformed: {error}"
        ) from None


def _attribute(name: bytes) -> bytes:
    if not name:
        raise ValueError("an attribute without a name")
    return name


def _apply(entry: _Entry, key: bytes, value: bytes) -> None:
    if key == b"path":
        entry.name = _text(value)
    elif key == b"linkpath":
        if entry.kind in ("symlink", "hardlink"):
            entry.link = _text(value)
    elif key == b"mtime":
        entry.mtime, entry.mtime_nsec = parse_time(value)
    elif key == b"size":
        entry.size = _decimal(value)
        if entry.size < 0:
            raise ValueError("a negative size")
    elif key == b"uid":
        entry.uid = _decimal(value)
    elif key == b"gid":
        entry.gid = _decimal(value)
    elif key == b"uname":
        entry.user = _text(value)
    elif key == b"gname":
        entry.group = _text(value)
    elif key == b"SCHILY.devmajor" and entry.kind in ("char", "block"):
        entry.dev_major = _decimal(value)
    elif key == b"SCHILY.devminor" and entry.kind in ("char", "block"):
        entry.dev_minor = _decimal(value)


def _text(value: bytes) -> bytes:
    if b"\0" in value:
        raise ValueError("a name holds a NUL byte")
    return value
