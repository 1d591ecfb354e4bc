"""The records that an `fs` process and its node exchange, and nothing but the records: no sockets, no clock.

Used by `link` (fs side) and `session` (node side) over a SOCK_SEQPACKET unix socket. A datagram is a row of 1 to
RECORDS_PER_DATAGRAM records of RECORD_BYTES each, little-endian, so that neither side ever assembles a stream:

    offset  size  field
    0       1     kind
    1       1     priority    REQUEST: 0 a blocked reader, 1 read-ahead of one
    2       2     errno       REPLY: 0, or what the reader gets
    4       4     segment     index into the session's list of segments
    8       4     first       first chunk (TOC order)
    12      4     amount      number of chunks, at least 1
    16      8     id          REQUEST, REPLY, CANCEL: request id; PING, PONG: echoed

No chunk bytes travel here: the node sets presence bits in shared memory, then answers. Records of unknown kind and
datagrams of another length are counted and ignored by the receiver, so that versions may add kinds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

CHANNEL_VERSION: Final = 1
RECORD: Final = struct.Struct("<BBHIIIQ")
RECORD_BYTES: Final = RECORD.size
assert RECORD_BYTES == 1 + 1 + 2 + 4 + 4 + 4 + 8
RECORDS_PER_DATAGRAM: Final = (
    64  # 1.5 KiB: one copy in the kernel, and no datagram ever nears a socket buffer's limit
)
DATAGRAM_BYTES: Final = RECORDS_PER_DATAGRAM * RECORD_BYTES


class Kind(IntEnum):
    """What a record says."""

    HELLO = 1
    """fs → node, first on every connection: `first` is CHANNEL_VERSION, `amount` the number of segments, `id` the pid"""
    REQUEST = 2
    """fs → node: make these chunks present"""
    REPLY = 3
    """node → fs: they are (errno 0), or could not be had"""
    CANCEL = 4
    """fs → node: nobody waits for this request any more; no reply is expected"""
    PING = 5
    """node → fs: are you there?"""
    PONG = 6
    """fs → node: yes; `amount` is the number of requests without an answer, `segment` and `first` are how many look-ups
    and reads the kernel has sent so far (modulo 2^32)"""
    OBSERVED = 7
    """fs → node: these chunks are read for the first time; only when the session asked for it"""
    READ_AHEAD = 8
    """node → fs: set the kernel's read-ahead of this mount to `amount` KiB"""
    DRAIN = 9
    """node → fs: read no more requests of the kernel, answer those you have read, then end; a successor takes over"""
    DRAINING = 10
    """fs → node: I read no more of them"""
    UNKEPT = 11
    """node → fs: chunk `first` has no place in the pool; its `amount` bytes are in the memfd that comes along. Alone in its
    datagram, and before the REPLY to `id`"""
    INVALIDATE = 12
    """node → fs: the bytes of these chunks were wrong on the disk, and their bits are cleared; what the kernel has cached of
    them is to be forgotten"""
    OBSERVE = 13
    """node → fs: tell of no more first reads"""


class Record(NamedTuple):
    """One message; fields that a kind does not use are 0."""

    kind: Kind
    priority: int = 0
    errno: int = 0
    segment: int = 0
    first: int = 0
    amount: int = 0
    id: int = 0


_KINDS: Final = {int(kind): kind for kind in Kind}


def encode(records: Iterable[Record]) -> bytes:
    """The datagram for some records; the caller keeps to RECORDS_PER_DATAGRAM."""
    return b"".join([RECORD.pack(*record) for record in records])


def decode(datagram: bytes) -> tuple[list[Record], int]:
    """The records of a datagram, and how many were not understood (a datagram of a wrong length counts as one)."""
    if not datagram or len(datagram) % RECORD_BYTES or len(datagram) > DATAGRAM_BYTES:
        return [], 1
    records = []
    unknown = 0
    for kind, *fields in RECORD.iter_unpack(datagram):
        known = _KINDS.get(kind)
        if known is None:
            unknown += 1
        else:
            records.append(Record(known, *fields))
    return records, unknown
