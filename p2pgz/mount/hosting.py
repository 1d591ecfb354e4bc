"""What a node and the segment host say to each other besides the messages of `setup`: sans-io.

The host has one control socket; on it the node passes one new channel per mount (`NEW_CHANNEL` with a descriptor). A channel
begins with an ErofsPart and goes on as that of a tree mode session (`setup`: SegmentsPart*, SessionPart → Ready | Failed,
then the records of `channel`), or it is one question: SelfTestPart → SelfTested | Failed.
"""

from __future__ import annotations

from typing import Final

import msgspec

from p2pgz.errors import StateError

NEW_CHANNEL: Final = b"c"
DEVICE_READ_AHEAD_COLD_KB: Final = 128  # of a segment file; fixed when the kernel opens it, that is at mount
DEVICE_READ_AHEAD_COMPLETE_KB: Final = 1024
# Of the files of an image: 30 random faults in a cold image fetched 5.9 MB at 128 KiB and 1 MB at 32
FILES_READ_AHEAD_COLD_KB: Final = 32
FILES_READ_AHEAD_COMPLETE_KB: Final = 128  # more brings nothing: the device reads ahead itself


class ErofsPart(msgspec.Struct, frozen=True, tag="erofs"):
    """Mount this metadata; the segments with these indexes are complete and read by the kernel itself."""

    metadata_path: bytes
    native: list[int]
    complete: bool = False


class SelfTestPart(msgspec.Struct, frozen=True, tag="self-test"):
    """Find out whether this kernel may be trusted with images whose devices fail; `folder` is for scratch files."""

    folder: bytes


class SelfTested(msgspec.Struct, frozen=True, tag="self-tested"):
    """It may, or why not."""

    passed: bool
    reason: str


_opening_decoder: Final = msgspec.msgpack.Decoder(ErofsPart | SelfTestPart)
_answer_decoder: Final = msgspec.msgpack.Decoder(SelfTested)


def encode(message: ErofsPart | SelfTestPart | SelfTested) -> bytes:
    """One message as a datagram."""
    return msgspec.msgpack.encode(message)


def decode_opening(datagram: bytes) -> ErofsPart | SelfTestPart:
    """How a channel begins; raises StateError for anything else."""
    try:
        message: ErofsPart | SelfTestPart = _opening_decoder.decode(datagram)
        return message
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"a message to the segment host is not understood: {error}") from error


def decode_self_tested(datagram: bytes) -> SelfTested | None:
    """The answer to a SelfTestPart; None when it is another message (a failure, as `setup` encodes it)."""
    try:
        return _answer_decoder.decode(datagram)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
