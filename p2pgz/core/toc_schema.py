"""The TOC's JSON as its writers spell it, decoded with exact types: nothing is coerced, unknown keys are
ignored.

Called by `core.toc_entries` only. Everything decoded here is still unchecked: names, chunk lists and links
mean nothing yet. Keys and their meaning: eStargz specification, "TOC"; containers' zstd:chunked adds
endOffset, chunkType and others.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from p2pgz.errors import ImageInvalid

# Real layers have up to 300 000 entries of about 315 bytes of JSON each; one entry costs about 1 KB of memory
# once parsed.
MAX_TOC_JSON_BYTES: Final = 256 << 20
MAX_TOC_ENTRIES: Final = 1_000_000

_MAX_INT63: Final = (1 << 63) - 1
_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT63)]
# Writers copy the tar header's mode, with or without the type bits
_Mode = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# 2^32-1 is "leave the owner" to chown and no user
_Id = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)]
# What the kernel's dev_t holds (12 and 20 bits); more would silently name another device
_Major = Annotated[int, msgspec.Meta(ge=0, le=0xFFF)]
_Minor = Annotated[int, msgspec.Meta(ge=0, le=0xF_FFFF)]


class RawEntry(msgspec.Struct, gc=False):
    """One element of `entries`, field for field."""

    name: str
    type: str
    size: _Size = 0
    modtime: str = ""
    link_name: str = msgspec.field(default="", name="linkName")
    mode: _Mode = 0
    uid: _Id = 0
    gid: _Id = 0
    offset: _Size = 0
    inner_offset: _Size = msgspec.field(default=0, name="innerOffset")
    dev_major: _Major = msgspec.field(default=0, name="devMajor")
    dev_minor: _Minor = msgspec.field(default=0, name="devMinor")
    xattrs: dict[str, str | None] | None = None
    digest: str = ""
    chunk_offset: _Size = msgspec.field(default=0, name="chunkOffset")
    chunk_size: _Size = msgspec.field(default=0, name="chunkSize")
    chunk_digest: str = msgspec.field(default="", name="chunkDigest")
    chunk_type: str = msgspec.field(default="", name="chunkType")
    end_offset: _Size = msgspec.field(default=0, name="endOffset")


class _RawToc(msgspec.Struct, gc=False):
    version: int
    entries: list[RawEntry] | None = None


_DECODER = msgspec.json.Decoder(_RawToc)


def decode_toc(toc_json: bytes) -> list[RawEntry]:
    """The entries of a TOC, an empty layer's `null` as []; raises ImageInvalid for anything but a TOC of
    version 1."""
    if len(toc_json) > MAX_TOC_JSON_BYTES:
        raise ImageInvalid(f"TOC of {len(toc_json)} bytes is larger than {MAX_TOC_JSON_BYTES}")
    # The decoder has no limit of its own. Every entry has a brace, so this bounds what it may build (xattrs
    # and odd names have braces as well, hence the factor).
    if toc_json.count(b"{") > 2 * MAX_TOC_ENTRIES + 1:
        raise ImageInvalid(f"TOC has more than {MAX_TOC_ENTRIES} entries")
    try:
        raw = _DECODER.decode(toc_json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageInvalid(f"TOC is malformed: {error}") from error
    except RecursionError as error:
        raise ImageInvalid("TOC is malformed: nested too deeply") from error
    if raw.version != 1:
        raise ImageInvalid(
            f"TOC has version {raw.version}, only 1 is known", hint="a newer p2pgz may know it"
        )
    entries = raw.entries or []
    if len(entries) > MAX_TOC_ENTRIES:
        raise ImageInvalid(f"TOC has {len(entries)} entries, more than {MAX_TOC_ENTRIES}")
    return entries
