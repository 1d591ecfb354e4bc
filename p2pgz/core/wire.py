"""Framing of the peer exchange `p2pgz/1`: bytes in, frames out. docs/reference/wire.md is the specification.

Called by the two ends of a connection (`p2p.connection`) and nobody else. Sans-io: no clock, no socket. The bytes of a frame
are collected only after its header has passed the limits of its type, so that no peer makes us hold more than one frame
of FRAME_MAX_BYTES. `core.frames` says what the frames mean.

    offset  size  field
    0       4     length of the body, big-endian
    4       1     type; from 0x80 on optional: who does not know it skips it
    5       -     body
"""

from __future__ import annotations

import struct
from typing import Final

from p2pgz.core import crowdframes, frames
from p2pgz.core.crowdmsg import CrowdFrame, CrowdType
from p2pgz.core.frames import FRAME_MAX_BYTES
from p2pgz.core.messages import Frame, FrameType
from p2pgz.errors import PeerFault

HEADER: Final = struct.Struct(">IB")
OPTIONAL_FROM: Final = 0x80
# Optional frames of later versions: room for what they may need, not for a chunk
OPTIONAL_MAX_BYTES: Final = 64 << 10

BODY_MAX_BYTES: Final = {**frames.BODY_MAX_BYTES, **crowdframes.BODY_MAX_BYTES}
# what a connection may begin with
HELLO_FIRST: Final = frozenset({FrameType.HELLO, FrameType.GOODBYE})

AnyFrame = Frame | CrowdFrame

__all__ = ["BODY_MAX_BYTES", "FRAME_MAX_BYTES", "HEADER", "HELLO_FIRST", "AnyFrame", "FrameReader"]


class FrameReader:
    """Cuts what arrives into frames. After a PeerFault it must not be fed again.

    The first frame must be one of `first`: nobody who has not said hello makes us parse anything else.
    """

    __slots__ = ("_at", "_body", "_first", "_head", "_skip_bytes", "_type", "skipped_frames")

    def __init__(self, *, first: frozenset[int] = HELLO_FIRST) -> None:
        self._head = bytearray()
        self._body: bytearray | None = None
        self._at = 0
        self._type = 0
        self._skip_bytes = 0
        self._first: frozenset[int] | None = first or None
        self.skipped_frames = 0
        """optional frames that were not understood"""

    @property
    def in_frame(self) -> bool:
        """Whether the stream ended here would be cut inside a frame."""
        return bool(self._head) or self._body is not None or self._skip_bytes > 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[AnyFrame]:
        """The frames that `data` completes, in order; raises PeerFault at the first one that breaks the protocol."""
        found: list[AnyFrame] = []
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._skip_bytes:
                taken = min(self._skip_bytes, end - at)
                self._skip_bytes -= taken
                at += taken
                continue
            body = self._body
            if body is None:
                taken = min(HEADER.size - len(self._head), end - at)
                self._head += view[at : at + taken]
                at += taken
                if len(self._head) == HEADER.size:
                    self._begin(found)
                continue
            taken = min(len(body) - self._at, end - at)
            body[self._at : self._at + taken] = view[at : at + taken]
            self._at += taken
            at += taken
            if self._at == len(body):
                self._body = None
                found.append(_parse(self._type, memoryview(body)))
        return found

    def _begin(self, found: list[AnyFrame]) -> None:
        size, kind = HEADER.unpack(self._head)
        self._head.clear()
        limit = BODY_MAX_BYTES.get(kind)
        if self._first is not None and kind not in self._first:
            raise PeerFault(f"a frame of type {kind:#04x} before the hello")
        self._first = None
        if limit is None:
            if kind < OPTIONAL_FROM:
                raise PeerFault(f"a frame of unknown type {kind:#04x}")
            if size > OPTIONAL_MAX_BYTES:
                raise PeerFault(f"an optional frame of {size} bytes, the limit is {OPTIONAL_MAX_BYTES}")
            self._skip_bytes = size
            self.skipped_frames += 1
            return
        if size > limit:
            raise PeerFault(f"a {_name(kind)} frame of {size} bytes, the limit is {limit}")
        self._type = kind
        self._at = 0
        if size == 0:
            found.append(_parse(kind, memoryview(b"")))
        else:
            self._body = bytearray(size)


def _parse(kind: int, body: memoryview) -> AnyFrame:
    parse = crowdframes.parse_body if kind in crowdframes.BODY_MAX_BYTES else frames.parse_body
    return parse(kind, body)


def _name(kind: int) -> str:
    return (CrowdType(kind) if kind in crowdframes.BODY_MAX_BYTES else FrameType(kind)).name
