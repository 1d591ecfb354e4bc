"""Tar headers for entries whose own cannot stay: sparse files, entries under a global header, odd types.

Called by `writer`. What ustar cannot hold goes into a PAX header; nothing here depends on time or machine.
POSIX.1-2017 pax.
"""

from __future__ import annotations

import base64
from urllib.parse import quote_from_bytes

from p2pgz.core.tar import Header
from p2pgz.core.tarfields import BLOCK_BYTES, CHECKSUM_FIELD, HEADER, POSIX_MAGIC

_FLAGS = {
    "reg": b"0", "hardlink": b"1", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6",
}  # fmt: skip
_NAME_BYTES = 100
_OWNER_BYTES = 32
_ID_LIMIT = 1 << 21  # seven octal digits
_SIZE_LIMIT = 1 << 33  # eleven


def padding(size: int) -> int:
    """Zero bytes that follow so much payload."""
    return -size % BLOCK_BYTES


def make_header(header: Header) -> bytes:
    """All header blocks of an entry, from its fields alone."""
    records: dict[bytes, bytes] = {}
    name = header.name
    if header.kind == "dir" and not name.endswith(b"/"):
        name += b"/"
    fields = {
        b"path": (name, _NAME_BYTES), b"linkpath": (header.link, _NAME_BYTES), b"uname": (header.user, _OWNER_BYTES),
        b"gname": (header.group, _OWNER_BYTES),
    }  # fmt: skip
    for key, (value, room) in fields.items():
        if len(value) > room:
            records[key] = value
    for key, number, limit in (
        (b"uid", header.uid, _ID_LIMIT), (b"gid", header.gid, _ID_LIMIT), (b"size", header.size, _SIZE_LIMIT),
    ):  # fmt: skip
        if number >= limit:
            records[key] = b"%d" % number
    if header.mtime_nsec or not 0 <= header.mtime < _SIZE_LIMIT:
        records[b"mtime"] = _time(header.mtime, header.mtime_nsec)
    for key, value in sorted(header.xattrs.items()):
        if b"=" in key or b"\0" in key:
            records[b"LIBARCHIVE.xattr." + quote_from_bytes(key, safe="").encode()] = base64.b64encode(value)
        else:
            records[b"SCHILY.xattr." + key] = value
    block = _block(header, name, _FLAGS[header.kind])
    if not records:
        return block
    content = b"".join(_record(key, value) for key, value in records.items())
    base = name.rstrip(b"/").rpartition(b"/")[2]
    extended = Header(
        name=(b"PaxHeaders.0/" + base)[:_NAME_BYTES], kind="reg", mode=0o644, uid=0, gid=0, size=len(content), mtime=0,
        mtime_nsec=0, link=b"", user=b"", group=b"", dev_major=0, dev_minor=0, xattrs={}, raw=b"", plain=True,
    )  # fmt: skip
    return _block(extended, extended.name, b"x") + content + bytes(padding(len(content))) + block


def _time(seconds: int, nanoseconds: int) -> bytes:
    sign = b""
    if seconds < 0:
        sign, seconds = b"-", -seconds
        if nanoseconds:
            seconds, nanoseconds = seconds - 1, 1_000_000_000 - nanoseconds
    fraction = b".%09d" % nanoseconds if nanoseconds else b""
    return sign + b"%d" % seconds + fraction.rstrip(b"0")


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, the length counting itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _octal(number: int, limit: int, width: int) -> bytes:
    if not 0 <= number < limit:
        number = 0  # a PAX record has it
    return b"%0*o\0" % (width - 1, number)


def _device(number: int) -> bytes:
    if number < _ID_LIMIT:
        return _octal(number, _ID_LIMIT, 8)
    return b"\x80" + number.to_bytes(7, "big")


def _block(header: Header, name: bytes, flag: bytes) -> bytes:
    block = bytearray(
        HEADER.pack(
            name[:_NAME_BYTES], _octal(header.mode, _ID_LIMIT, 8), _octal(header.uid, _ID_LIMIT, 8),
            _octal(header.gid, _ID_LIMIT, 8), _octal(header.size, _SIZE_LIMIT, 12), _octal(header.mtime, _SIZE_LIMIT, 12),
            b" " * 8, flag, header.link[:_NAME_BYTES], POSIX_MAGIC, header.user[:_OWNER_BYTES], header.group[:_OWNER_BYTES],
            _device(header.dev_major), _device(header.dev_minor), b"",
        )
    )  # fmt: skip
    block[CHECKSUM_FIELD] = b"%06o\0 " % sum(block)
    return bytes(block)
