"""A streaming tar parser without input or output: bytes in, entries and payload out.

For `core.ownindex` (layers that nobody converted) and `convert` (which writes a layer anew). It reads what
real layers hold: ustar and v7, PAX with global headers, GNU long names, base-256 numbers, and the sparse
files of GNU tar and PAX, whose holes become `Hole` events. Every byte that is fed comes out again in exactly
one event, in order, so that a stream can be rebuilt from them. It must never guess: what breaks the format or
a limit raises ImageInvalid. The standard library's tarfile is its oracle in the tests; it is not used here
since it reads files, costs five times as much per entry and takes damaged archives for shorter ones.
POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Tar Internals".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import msgspec

from p2pgz.core.pax import apply_records, read_records
from p2pgz.core.sparse import SparseFile
from p2pgz.core.tarfields import BLOCK_BYTES, GNU_MAGIC, HEADER, checksum_fits, cut, number
from p2pgz.errors import ImageInvalid

MAX_EXTENDED_BYTES = 1 << 20  # one PAX header, long name or sparse map; Go's archive/tar has the same limit
MAX_EXTENDED_HEADERS = 16  # extended headers before one entry; real archives have at most three
MAX_NAME_BYTES = 1 << 16  # a path; Linux opens at most 4096 bytes at once, but walks deeper trees
MAX_WARNINGS = 64
MAX_FILE_BYTES = 1 << 40  # stored or expanded size of one file

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_KINDS = {
    b"0": "reg", b"\0": "reg", b"7": "reg", b"S": "reg",
    b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo",
}  # fmt: skip


class Header(msgspec.Struct, gc=False, kw_only=True):
    """An entry begins. `name` and `link` are the bytes of the archive; `size` is the file's, holes included.

    `raw` are all bytes of its headers, extended ones before it included. `plain` tells that they say all by
    themselves: no global header, hole or odd type takes part.
    """

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_nsec: int
    link: bytes
    user: bytes
    group: bytes
    dev_major: int
    dev_minor: int
    xattrs: dict[bytes, bytes]
    raw: bytes
    plain: bool


class Payload(msgspec.Struct, gc=False):
    """The next bytes of the current file."""

    data: bytes


class Hole(msgspec.Struct, gc=False):
    """So many zero bytes of the current file come next; the archive does not hold them."""

    size: int


class EntryEnd(msgspec.Struct, gc=False):
    """The current entry is complete."""


class Other(msgspec.Struct, gc=False):
    """Bytes that belong to no entry: padding, global headers, skipped types, the end of the archive."""

    data: bytes


Event = Header | Payload | Hole | EntryEnd | Other
_END = EntryEnd()


class TarParser:
    """Feed it a tar stream in pieces of any size; see the module's words. One stream per parser."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.position = 0
        """bytes of the stream that were told of in events (plus extended headers held for the next entry)"""
        self._held = bytearray()
        self._wanted_bytes = BLOCK_BYTES  # the next step needs this many bytes at once
        self._payload_bytes = 0  # left of the stored payload run
        self._padding_bytes = 0  # left now
        self._padding_after = 0  # due when the payload is complete
        self._skip_bytes = 0  # payload and padding of an entry of a skipped type
        self._raw = b""  # headers collected for the next entry
        self._extended_count = 0
        self._extended_kind = b""
        self._extended_bytes = 0
        self._local: dict[bytes, bytes] = {}
        self._runs: list[bytes] = []  # PAX sparse 0.0: offset, size, offset, … as they came
        self._global: dict[bytes, bytes] = {}
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._sparse: SparseFile | None = None  # its map is not complete
        self._steps: Iterator[tuple[bool, int]] | None = None  # holes and runs of a sparse file still to come
        self._ending = False
        self._ended = False

    def feed(self, data: bytes) -> list[Event]:
        """Events of the bytes so far; raises ImageInvalid, after which the parser must not be used."""
        events: list[Event] = []
        start = 0
        size = len(data)
        while start < size:
            if self._payload_bytes:
                taken = min(self._payload_bytes, size - start)
                events.append(Payload(data[start : start + taken]))
                self._payload_bytes -= taken
                start += taken
                self.position += taken
                if not self._payload_bytes:
                    self._payload_done(events)
                continue
            passed = self._padding_bytes or self._skip_bytes or (size - start if self._ended else 0)
            if passed:
                taken = min(passed, size - start)
                events.append(Other(data[start : start + taken]))
                if self._padding_bytes:
                    self._padding_bytes -= taken
                elif self._skip_bytes:
                    self._skip_bytes -= taken
                start += taken
                self.position += taken
                continue
            if self._held:
                taken = min(self._wanted_bytes - len(self._held), size - start)
                self._held += data[start : start + taken]
                start += taken
                if len(self._held) < self._wanted_bytes:
                    break
                block = bytes(self._held)
                self._held.clear()
            elif size - start < self._wanted_bytes:
                self._held += data[start:]
                break
            else:
                block = data[start : start + self._wanted_bytes]
                start += self._wanted_bytes
            self.position += len(block)
            if self._extended_kind:
                self._extended(block, events)
            elif self._sparse is not None:
                self._sparse_block(block, events)
            else:
                self._header(block, events)
        return events

    def finish(self) -> None:
        """The stream ended; raises ImageInvalid unless that was between two entries."""
        if (
            self._held or self._payload_bytes or self._padding_bytes or self._skip_bytes
            or self._raw or self._extended_kind or self._sparse is not None or self._steps is not None
        ):  # fmt: skip
            self._fail("the stream ends in the middle of an entry")

    def _fail(self, what: str) -> NoReturn:
        raise ImageInvalid(
            f"tar stream: {what} (at byte {self.position})", hint="the layer is damaged or not a tar archive"
        )

    def _warn(self, text: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _header(self, block: bytes, events: list[Event]) -> None:
        if block == _ZERO_BLOCK:
            if self._raw:
                self._fail("an extended header without its entry")
            events.append(Other(block))
            self._ended = self._ending
            self._ending = True
            return
        if self._ending:
            self._fail("data after a lone block of zeros")
        (
            name,
            mode,
            uid,
            gid,
            stored,
            mtime,
            checksum,
            flag,
            link,
            magic,
            user,
            group,
            major,
            minor,
            prefix,
        ) = HEADER.unpack(block)
        try:
            if not checksum_fits(block, number(checksum)):
                self._fail("a header's checksum is wrong")
            size = number(stored)
            if size < 0 or size > MAX_FILE_BYTES:
                self._fail(f"an entry of {size} bytes; at most {MAX_FILE_BYTES} are supported")
            kind = _KINDS.get(flag)
            if kind is None:
                self._special(flag, size, block, events)
                return
            name = cut(name)
            if prefix[0] and magic != GNU_MAGIC and magic.startswith(b"ustar"):
                name = cut(prefix) + b"/" + name
            header = Header(
                name=name, kind=kind, size=size, mode=number(mode) & 0o7777, uid=number(uid), gid=number(gid),
                mtime=number(mtime), mtime_nsec=0, link=cut(link), user=cut(user), group=cut(group),
                dev_major=0, dev_minor=0, xattrs={}, raw=self._raw + block if self._raw else block,
                plain=flag in b"0125364\0",
            )  # fmt: skip
            if kind in ("char", "block"):
                header.dev_major, header.dev_minor = number(major), number(minor)
        except ValueError:
            self._fail("a header field is not a number")
        if kind != "symlink" and kind != "hardlink":
            header.link = b""
        if self._raw or self._global:
            self._apply_extended(header)
        if flag == b"\0" and header.name.endswith(b"/"):
            header.kind = "dir"  # v7 had no type for directories
        self._begin(header, flag, block, events)

    def _special(self, flag: bytes, size: int, block: bytes, events: list[Event]) -> None:
        padded = (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        if flag in (b"x", b"X", b"g", b"L", b"K"):
            self._extended_count += 1
            if size > MAX_EXTENDED_BYTES:
                self._fail(f"an extended header of {size} bytes; at most {MAX_EXTENDED_BYTES} are supported")
            if self._extended_count > MAX_EXTENDED_HEADERS:
                self._fail("too many extended headers in a row")
            if flag == b"g":
                events.append(Other(block))
            else:
                self._raw += block
            if size == 0:
                if flag == b"g":
                    self._extended_count -= 1
                return
            self._extended_kind, self._extended_bytes = flag, size
            self._wanted_bytes = padded
            return
        name = cut(block[:100]).decode(errors="replace")
        self._warn(f"an entry of type {flag.decode('latin-1')!r} was left out: {name!r}")
        events.append(Other(self._raw + block))
        self._forget_extended()
        self._skip_bytes = padded

    def _extended(self, block: bytes, events: list[Event]) -> None:
        kind, content = self._extended_kind, block[: self._extended_bytes]
        self._extended_kind = b""
        self._wanted_bytes = BLOCK_BYTES
        if kind == b"g":
            events.append(Other(block))
            records, _ = read_records(content)
            self._global.update(records)
            if sum(len(key) + len(value) for key, value in self._global.items()) > MAX_EXTENDED_BYTES:
                self._fail("the global headers are too large")
            self._global = {key: value for key, value in self._global.items() if value}
            self._extended_count = 0
            return
        self._raw += block
        if kind == b"L":
            self._long_name = cut(content)
        elif kind == b"K":
            self._long_link = cut(content)
        else:
            records, runs = read_records(content)
            self._local.update(records)
            self._runs += runs

    def _apply_extended(self, header: Header) -> None:
        if self._global:
            header.plain = False
            apply_records(header, {**self._global, **self._local})
        elif self._local:
            apply_records(header, self._local)
        if self._long_name is not None:
            header.name = self._long_name
        if self._long_link is not None and header.link:
            header.link = self._long_link
        if header.size > MAX_FILE_BYTES:
            self._fail(f"a file of {header.size} bytes; at most {MAX_FILE_BYTES} are supported")

    def _begin(self, header: Header, flag: bytes, block: bytes, events: list[Event]) -> None:
        if len(header.name) > MAX_NAME_BYTES or len(header.link) > MAX_NAME_BYTES:
            self._fail(f"a name of more than {MAX_NAME_BYTES} bytes")
        if header.kind != "reg":
            # Links and directories may state a size (star and pax do) but have no payload, as all readers
            # agree.
            if header.size:
                header.plain = False
                header.size = 0
        elif flag == b"S" or (
            self._raw and (self._runs or any(key.startswith(b"GNU.sparse.") for key in self._local))
        ):
            self._begin_sparse(header, flag, block, events)
            return
        elif header.size:
            self._padding_after = -header.size % BLOCK_BYTES
            self._payload_bytes = header.size
            if self._raw:
                self._forget_extended()
            events.append(header)
            return
        if self._raw:
            self._forget_extended()
        events.append(header)
        events.append(_END)

    def _begin_sparse(self, header: Header, flag: bytes, block: bytes, events: list[Event]) -> None:
        """Find the map of the holes: in the header, in records, or at the start of the payload."""
        header.plain = False
        local, listed = self._local, self._runs
        self._forget_extended()
        sparse = SparseFile(header=header, stored_bytes=header.size)
        self._sparse = sparse
        complete = sparse.add_gnu_header(block) if flag == b"S" else sparse.add_records(local, listed)
        if complete:
            self._start_sparse(events)

    def _sparse_block(self, block: bytes, events: list[Event]) -> None:
        """A block more of a map that is not complete."""
        assert self._sparse is not None
        if self._sparse.add_block(block):
            self._start_sparse(events)

    def _start_sparse(self, events: list[Event]) -> None:
        assert self._sparse is not None
        sparse, self._sparse = self._sparse, None
        if sparse.header.size > MAX_FILE_BYTES or len(sparse.header.name) > MAX_NAME_BYTES:
            self._fail("a sparse file's size or name is beyond the limit")
        self._steps = sparse.steps()
        self._padding_after = -sparse.stored_bytes % BLOCK_BYTES
        events.append(sparse.header)
        self._payload_done(events)

    def _payload_done(self, events: list[Event]) -> None:
        """A run of payload is complete: holes follow, another run, or the end of the file."""
        if self._steps is not None:
            for is_hole, size in self._steps:
                if not is_hole:
                    self._payload_bytes = size
                    return
                events.append(Hole(size))
            self._steps = None
        self._padding_bytes = self._padding_after
        events.append(_END)

    def _forget_extended(self) -> None:
        self._raw = b""
        self._extended_count = 0
        self._local = {}
        self._runs = []
        self._long_name = self._long_link = None
