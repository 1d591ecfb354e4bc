"""What a node and the segment host say to each other besides the messages of `setup`: sans-io.

The host has one control socket, on which the node first says what the host is (HostPart → Ready | Failed); then it passes
one new channel per mount (`NEW_CHANNEL` with a descriptor). A channel begins with an ErofsPart, or with a ResumePart for a
mount whose host is gone, and goes on as that of a tree mode session (`setup`: SegmentsPart*, SessionPart → Ready | Failed,
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


class HostPart(msgspec.Struct, frozen=True, tag="host"):
    """Be a segment host: `name` is what the holder calls it, where there is one. `resume`: go on with the FUSE connection of
    the host of that name, which is gone; it then has no mount of its own, and takes over, but makes none."""

    holder_path: bytes = b""
    name: str = ""
    resume: bool = False


class Hosted(msgspec.Struct, frozen=True):
    """What another host has to know to serve a mount: the numbers by which the kernel has its files open."""

    host: str
    """the name of the FUSE connection at the holder"""
    device: int
    """st_dev of the mount"""
    watch: int
    files: list[int]
    """by segment; 0 where the kernel reads the pool's file itself"""
    bdi_name: str


class ResumePart(msgspec.Struct, frozen=True, tag="resume"):
    """Serve a mount that exists."""

    hosted: Hosted


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
    conclusive: bool = True
    """it is the same until the next boot; else the test could not be made, for now"""


Opening = ErofsPart | ResumePart | SelfTestPart
_host_decoder: Final = msgspec.msgpack.Decoder(HostPart)
_opening_decoder: Final = msgspec.msgpack.Decoder(Opening)
_answer_decoder: Final = msgspec.msgpack.Decoder(SelfTested)


def encode(message: HostPart | Opening | SelfTested) -> bytes:
    """One message as a datagram."""
    return msgspec.msgpack.encode(message)


def decode_host(datagram: bytes) -> HostPart:
    """What a host is to be; raises StateError for anything else."""
    try:
        return _host_decoder.decode(datagram)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"a message to the segment host is not understood: {error}") from error


def decode_opening(datagram: bytes) -> Opening:
    """How a channel begins; raises StateError for anything else."""
    try:
        message: Opening = _opening_decoder.decode(datagram)
        return message
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"a message to the segment host is not understood: {error}") from error


def decode_self_tested(datagram: bytes) -> SelfTested | None:
    """The answer to a SelfTestPart; None when it is another message (a failure, as `setup` encodes it)."""
    try:
        return _answer_decoder.decode(datagram)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
