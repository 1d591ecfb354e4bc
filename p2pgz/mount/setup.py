"""What a node tells an `fs` process before the records of `channel` begin, and what it answers: messages with descriptors.

Sans-io: functions make rows of (datagram, descriptors to pass along); `Assembler` takes them in. Used by `session`
(node side), `fs` and `relink` (fs side) over the same SOCK_SEQPACKET socket. Several hundred segments are usual for
large images, more than one datagram may carry descriptors for, hence the parts. The order of a new session:

    node → fs   SegmentsPart*, SessionPart          fs → node   Ready (with the mount's descriptor) | Failed

and of a node that was restarted and finds an `fs` of its predecessor by its socket:

    fs → node   SegmentsPart*, SessionPart (no descriptors)      node → fs   PresencePart+
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from p2pgz import __version__
from p2pgz.errors import ImageInvalid, MountUnavailable, P2pgzError, ResendUnavailable, StateError

FDS_PER_DATAGRAM: Final = 64  # the kernel takes 253 (SCM_MAX_FD)
PART_BYTES: Final = 48 << 10  # far below the default socket buffer of 208 KiB
MESSAGE_BYTES: Final = 64 << 10
MAX_SEGMENTS: Final = 65_536
# A registry's time-out and one retry fit in, and it is half of the kernel's hung-task warning (120 s)
READ_DEADLINE_SECONDS: Final = 60.0
READ_AHEAD_COLD_KB: Final = 128  # the kernel's default: bounds over-fetch while chunks are missing
READ_AHEAD_COMPLETE_KB: Final = 1024  # the largest read FUSE passes on (256 pages)


class SegmentFiles(msgspec.Struct, frozen=True, kw_only=True):
    """One segment of a session: its table, its bytes, and which of its chunks are present.

    On the node's side `presence_fd` is the pool's and stays its own; in `fs` it is a descriptor of its own.
    """

    table_path: str | Path
    data_path: str | Path
    presence_fd: int
    presence_count: int


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an `fs` process needs to know."""

    tree_path: str | Path
    segments: Sequence[SegmentFiles]
    """in the order of the tree file's segments"""
    source_name: str
    """the image's reference: the `source` of the mount"""
    directory: str = ""
    """where to mount; used when not root, else the mount stays detached and the command attaches it"""
    suid: bool = False
    dev: bool = False
    context: str = ""
    allow_other: bool = True
    read_deadline_seconds: float = READ_DEADLINE_SECONDS
    read_ahead_kb: int = READ_AHEAD_COLD_KB
    observe: bool = False
    """report the first read of every chunk, until the node has heard enough"""
    socket_path: str | Path = ""
    """where a later node finds this `fs`; empty: nowhere"""
    holder_path: str | Path = ""
    """the holder that keeps the mount's descriptor; empty: nobody does"""
    hold_id: str = ""
    """the mount's name there"""
    resume: bool = False
    """the mount exists: take its descriptor from the holder in place of making one"""
    resend: bool = True
    """when resuming, ask the kernel for the requests that the last `fs` had read and not answered"""
    version: str = __version__
    """of p2pgz in this `fs`; told to a node that takes over"""


class _SegmentsPart(msgspec.Struct, frozen=True, tag="segments"):
    tables: list[bytes]
    data: list[bytes]
    counts: list[int]


class _SessionPart(msgspec.Struct, frozen=True, tag="session"):
    tree_path: bytes
    source_name: str
    directory: bytes
    suid: bool
    dev: bool
    context: str
    allow_other: bool
    read_deadline_seconds: float
    read_ahead_kb: int
    observe: bool
    socket_path: bytes
    # an `fs` of an older version does not say these
    holder_path: bytes = b""
    hold_id: str = ""
    resume: bool = False
    resend: bool = True
    version: str = ""


class PresencePart(msgspec.Struct, frozen=True, tag="presence"):
    """New presence bitmaps, in the order of the segments; `last` says that all came."""

    counts: list[int]
    last: bool


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The image is served; the mount's descriptor comes along unless it is attached already."""

    pid: int
    device: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It is not, and why: the name of the error's class and its texts."""

    kind: str
    what: str
    hint: str


Message = _SegmentsPart | _SessionPart | PresencePart | Ready | Failed
Datagram = tuple[bytes, list[int]]
_decoder: Final = msgspec.msgpack.Decoder(Message)
_KINDS: Final[dict[str, type[P2pgzError]]] = {
    kind.__name__: kind for kind in (MountUnavailable, ResendUnavailable, StateError, ImageInvalid)
}


def encode(message: Message) -> bytes:
    """One message as a datagram."""
    return msgspec.msgpack.encode(message)


def decode(datagram: bytes) -> Message:
    """The message in a datagram; raises StateError for anything else (the other side is another version)."""
    try:
        message: Message = _decoder.decode(datagram)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"a message between node and fs is not understood: {error}") from error
    return message


def encode_session(options: SessionOptions, *, with_fds: bool) -> Iterator[Datagram]:
    """The datagrams that describe a session."""
    part = _SegmentsPart([], [], [])
    fds: list[int] = []
    size_bytes = 0
    for segment in options.segments:
        table, data = os.fsencode(segment.table_path), os.fsencode(segment.data_path)
        size_bytes += len(table) + len(data) + 16
        if len(part.counts) >= FDS_PER_DATAGRAM or size_bytes > PART_BYTES:
            yield encode(part), fds
            part, fds = _SegmentsPart([], [], []), []
            size_bytes = len(table) + len(data) + 16
        part.tables.append(table)
        part.data.append(data)
        part.counts.append(segment.presence_count)
        if with_fds:
            fds.append(segment.presence_fd)
    if part.counts:
        yield encode(part), fds
    last = _SessionPart(
        tree_path=os.fsencode(options.tree_path),
        source_name=options.source_name,
        directory=os.fsencode(options.directory),
        suid=options.suid,
        dev=options.dev,
        context=options.context,
        allow_other=options.allow_other,
        read_deadline_seconds=options.read_deadline_seconds,
        read_ahead_kb=options.read_ahead_kb,
        observe=options.observe,
        socket_path=os.fsencode(options.socket_path),
        holder_path=os.fsencode(options.holder_path),
        hold_id=options.hold_id,
        resume=options.resume,
        resend=options.resend,
        version=options.version,
    )
    yield encode(last), []


def encode_presence(segments: Sequence[SegmentFiles]) -> Iterator[Datagram]:
    """The datagrams that replace all presence bitmaps of a session."""
    for start in range(0, max(1, len(segments)), FDS_PER_DATAGRAM):
        batch = segments[start : start + FDS_PER_DATAGRAM]
        message = PresencePart([s.presence_count for s in batch], start + FDS_PER_DATAGRAM >= len(segments))
        yield encode(message), [s.presence_fd for s in batch]


def encode_failure(error: P2pgzError) -> bytes:
    """Tell the node why there is no mount."""
    return encode(Failed(type(error).__name__, error.what[:4000], error.hint[:4000]))


def to_error(failed: Failed) -> P2pgzError:
    """The error that the other side met."""
    return _KINDS.get(failed.kind, MountUnavailable)(failed.what, hint=failed.hint)


class Assembler:
    """Collects the parts of a session. Descriptors fed in belong to it until it hands out the options."""

    def __init__(self, *, with_fds: bool) -> None:
        self._with_fds = with_fds
        self._segments: list[SegmentFiles] = []

    def feed(self, datagram: bytes, fds: list[int]) -> SessionOptions | None:
        """Take the next datagram; the options when complete. Raises StateError, with all descriptors closed."""
        try:
            message = decode(datagram)
            if isinstance(message, _SessionPart) and not fds:
                return self._finish(message)
            if not isinstance(message, _SegmentsPart):
                raise StateError("a message between node and fs came out of order")
            count = len(message.counts)
            wanted_fds = count if self._with_fds else 0
            if not (len(message.tables) == len(message.data) == count and len(fds) == wanted_fds):
                raise StateError("a message between node and fs does not agree with itself")
            if len(self._segments) + count > MAX_SEGMENTS:
                raise StateError(f"a session of more than {MAX_SEGMENTS} segments")
        except StateError:
            close_all(fds)
            self.close()
            raise
        for n in range(count):
            self._segments.append(
                SegmentFiles(
                    table_path=os.fsdecode(message.tables[n]),
                    data_path=os.fsdecode(message.data[n]),
                    presence_fd=fds[n] if self._with_fds else -1,
                    presence_count=message.counts[n],
                )
            )
        return None

    def _finish(self, part: _SessionPart) -> SessionOptions:
        segments, self._segments = self._segments, []
        return SessionOptions(
            tree_path=os.fsdecode(part.tree_path),
            segments=segments,
            source_name=part.source_name,
            directory=os.fsdecode(part.directory),
            suid=part.suid,
            dev=part.dev,
            context=part.context,
            allow_other=part.allow_other,
            read_deadline_seconds=part.read_deadline_seconds,
            read_ahead_kb=part.read_ahead_kb,
            observe=part.observe,
            socket_path=os.fsdecode(part.socket_path),
            holder_path=os.fsdecode(part.holder_path),
            hold_id=part.hold_id,
            resume=part.resume,
            resend=part.resend,
            version=part.version,
        )

    def close(self) -> None:
        """Close the descriptors of a session that never became complete."""
        close_all([s.presence_fd for s in self._segments if s.presence_fd >= 0])
        self._segments = []


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came along with something useless."""
    for fd in fds:
        os.close(fd)
