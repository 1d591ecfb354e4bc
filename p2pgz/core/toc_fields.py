"""Single fields of a TOC entry: names, times, digests, extended attributes. Text in, checked values out, or
ImageInvalid.

Called by `core.toc_entries` once per field and file of a layer, so the usual case of each function is short.
"""

from __future__ import annotations

import binascii
import re
from datetime import date
from typing import Final

from p2pgz.errors import ImageInvalid

# Linux: NAME_MAX, PATH_MAX without its NUL, XATTR_NAME_MAX, XATTR_SIZE_MAX, XATTR_LIST_MAX. Nothing beyond
# them could ever have been on a file system, or be shown by one.
MAX_NAME_BYTES: Final = 255
MAX_PATH_BYTES: Final = 4095
MAX_XATTR_NAME_BYTES: Final = 255
MAX_XATTR_VALUE_BYTES: Final = 64 << 10
MAX_XATTR_LIST_BYTES: Final = 64 << 10

_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
# Go writers print their zero time where a tar header has none
_GO_ZERO_TIME = "0001-01-01T00:00:00Z"


def shown(text: str) -> str:
    """A name for a message: quoted and not endless."""
    return repr(text) if len(text) <= 100 else repr(text[:97] + "...")


def clean_name(text: str) -> bytes:
    """A path as the name below the root: `.`, `..` and empty components resolved, never above the root; b""
    is the root.

    Raises ImageInvalid for names that no file system holds.
    """
    name = text.encode().rstrip(b"/")
    # "/." covers both dots inside, the last test those at the start, and the empty name
    if b"//" in name or b"/." in name or name[:1] in b"./":
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                del parts[-1:]
            elif part not in (b"", b"."):
                parts.append(part)
        name = b"/".join(parts)
    if b"\0" in name:
        raise ImageInvalid(f"TOC: {shown(text)} has a NUL in its name")
    if len(name) > MAX_NAME_BYTES:
        if len(name) > MAX_PATH_BYTES:
            raise ImageInvalid(f"TOC: {shown(text)} is longer than {MAX_PATH_BYTES} bytes")
        if max(map(len, name.split(b"/"))) > MAX_NAME_BYTES:
            raise ImageInvalid(f"TOC: {shown(text)} has a component of more than {MAX_NAME_BYTES} bytes")
    return name


def symlink_target(text: str, name: str) -> bytes:
    """The target of a symlink, which is data: unchanged, wherever it points."""
    target = text.encode()
    if not target or len(target) > MAX_PATH_BYTES or b"\0" in target:
        raise ImageInvalid(f"TOC: symlink {shown(name)} has an impossible target {shown(text)}")
    return target


def parse_time(text: str) -> tuple[int, int]:
    """RFC 3339 as seconds and nanoseconds since 1970; no time is 1970 itself."""
    if not text or text == _GO_ZERO_TIME:
        return 0, 0
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ImageInvalid(f"TOC: modtime {shown(text)} is not RFC 3339")
    year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
    fraction, sign, offset_hours, offset_minutes = match.group(7, 8, 9, 10)
    if hour > 23 or minute > 59 or second > 59:  # a leap second has no place in Unix time
        raise ImageInvalid(f"TOC: modtime {shown(text)} is no time of day")
    try:
        days = date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError as error:
        raise ImageInvalid(f"TOC: modtime {shown(text)} is no date") from error
    seconds = days * 86400 + hour * 3600 + minute * 60 + second
    if sign:
        offset = int(offset_hours) * 3600 + int(offset_minutes) * 60
        seconds += offset if sign == "-" else -offset
    return seconds, int(fraction.ljust(9, "0")) if fraction else 0


def parse_sha256(text: str, what: str, name: str) -> bytes:
    """The 32 bytes of `sha256:<hex in lower case>`; `Digest.parse` for people, this for hundreds of
    thousands."""
    # fromhex() skips white space, so with any the result is too short
    if len(text) == 71 and text.startswith("sha256:") and text.islower():
        try:
            raw = bytes.fromhex(text[7:])
        except ValueError:
            raw = b""
        if len(raw) == 32:
            return raw
    raise ImageInvalid(f"TOC: {what} of {shown(name)}: {shown(text)} is not a sha256 digest in lower case")


def parse_xattrs(raw: dict[str, str | None], name: str) -> dict[bytes, bytes]:
    """Extended attributes: base64 values; null is an empty one, as Go's decoder reads it."""
    xattrs: dict[bytes, bytes] = {}
    list_bytes = 0
    for key, text in raw.items():
        key_bytes = key.encode()
        if not 0 < len(key_bytes) <= MAX_XATTR_NAME_BYTES or b"\0" in key_bytes:
            raise ImageInvalid(f"TOC: {shown(name)} has an attribute of the impossible name {shown(key)}")
        try:
            value = binascii.a2b_base64(text or "", strict_mode=True)
        except ValueError as error:
            raise ImageInvalid(f"TOC: attribute {shown(key)} of {shown(name)} is not base64") from error
        list_bytes += len(key_bytes) + 1
        if len(value) > MAX_XATTR_VALUE_BYTES or list_bytes > MAX_XATTR_LIST_BYTES:
            raise ImageInvalid(f"TOC: {shown(name)} has more extended attributes than Linux allows")
        xattrs[key_bytes] = value
    return xattrs
