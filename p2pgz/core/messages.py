"""What peers say to each other in `p2pgz/1`: one frozen value per frame, and the limits of their fields.

Made by `core.frames` from bytes and by `p2p.connection` to be sent. docs/reference/wire.md is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from typing import Final

import msgspec

# One part of a chunk: 1 MiB is p2pgz's own chunk size, takes 8 ms on a link of 1 Gbit/s, and so is as long as a blocked
# read ever waits behind somebody else's
PART_MAX_BYTES: Final = 1 << 20
NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
# A request: what one round trip may ask for. 4 096 chunks of the median 8 KB are 32 MiB.
RUNS_MAX: Final = 512
REQUEST_CHUNKS_MAX: Final = 4096
# the limit of `pool.presence`
CHUNK_NUMBER_END: Final = 1 << 27
ALTERNATIVES_MAX: Final = 8
ADDRESS_MAX_BYTES: Final = 128
RETRY_MAX_MS: Final = 60_000
# Bits of one bitmap; a layer of more chunks is not shared by bitmap
BITMAP_CHUNKS_MAX: Final = 1 << 23
# documents are TOCs, manifests and configs; the largest TOC that core.toc accepts bounds them
DOCUMENT_MAX_BYTES: Final = 256 << 20
REASON_MAX_BYTES: Final = 200

Run = tuple[int, int]
"""first chunk, count"""


class FrameType(IntEnum):
    """The type byte. 0x20 to 0x2f are in `core.crowdmsg`, 0x30 to 0x3f are about proofs of access."""

    HELLO = 0x01
    PING = 0x02
    PONG = 0x03
    GOODBYE = 0x04
    WANT = 0x10
    DATA = 0x11
    MISSING = 0x12
    BUSY = 0x13
    FORGET = 0x14
    DOC_WANT = 0x15
    DOC = 0x16
    INDEX_WANT = 0x17
    JOIN = 0x18
    LEAVE = 0x19
    BITMAP = 0x1A
    BITMAP_DELTA = 0x1B
    PROOF_JOIN = 0x30
    PROOF = 0x31
    PROOF_DOC_WANT = 0x32


class Feature(IntFlag):
    """What a node can do beyond the frames of its version; unknown bits are ignored."""

    ZSTD = 1
    """DATA may come compressed"""
    PROOF = 2
    """swarms and documents that need a proof: the frames from 0x30 on"""
    INDEX = 4
    """INDEX_WANT"""
    LEASES = 8
    """the frames of `core.crowdmsg` about leases"""
    MEMBERS = 16
    """those about members"""


class DataFlag(IntFlag):
    """How the bytes of a DATA frame are packed; an unknown bit is a fault, since the bytes could not be read."""

    RAW = 0
    ZSTD = 1


class GoodbyeReason(IntEnum):
    """Why a node ends a connection; unknown ones are read as LEAVING."""

    LEAVING = 0
    NOT_ADMITTED = 1
    VERSION = 2
    FAULT = 3
    TOO_MANY = 4
    IDLE = 5


class Hello(msgspec.Struct, frozen=True):
    """First frame of both ends. `signature` is empty in the accepting end's: its certificate has proven it."""

    lowest: int
    highest: int
    features: int
    nonce: bytes
    peer: bytes
    signature: bytes = b""
    proofs: tuple[bytes, ...] = ()


class Ping(msgspec.Struct, frozen=True):
    """Are you there?"""

    token: int


class Pong(msgspec.Struct, frozen=True):
    """Yes."""

    token: int


class Goodbye(msgspec.Struct, frozen=True):
    """The last frame of a connection; the text is for logs."""

    reason: GoodbyeReason
    text: str = ""


class Want(msgspec.Struct, frozen=True):
    """Asks for chunks of a swarm. Each of them gets one final answer: its last DATA, MISSING, or the request's BUSY."""

    request: int
    priority: int
    swarm: bytes
    runs: tuple[Run, ...]


class Data(msgspec.Struct, frozen=True):
    """A part of a chunk: `payload` stands at `offset` of the `total` bytes that travel for it. Parts come in order."""

    request: int
    chunk: int
    flags: DataFlag
    offset: int
    total: int
    payload: bytes | memoryview


class Missing(msgspec.Struct, frozen=True):
    """These chunks will not come. No runs: the document, or all that is left of the request."""

    request: int
    runs: tuple[Run, ...] = ()


class Alternative(msgspec.Struct, frozen=True):
    """Another peer that may have it: peer id and multiaddr."""

    peer: bytes
    address: str


class Busy(msgspec.Struct, frozen=True):
    """All that is left of the request will not come now: ask again after `retry_ms`, or ask one of these."""

    request: int
    retry_ms: int
    alternatives: tuple[Alternative, ...] = ()


class Forget(msgspec.Struct, frozen=True):
    """Nobody waits for these any more (no runs: all of the request); they are answered by MISSING or were sent already."""

    request: int
    runs: tuple[Run, ...] = ()


class DocWant(msgspec.Struct, frozen=True):
    """Asks for a TOC, manifest or config by its sha256."""

    request: int
    digest: bytes


class IndexWant(msgspec.Struct, frozen=True):
    """Asks for what is known of the own index of the layer with this diffID (`core.indexclaim`). Answered as DocWant is."""

    request: int
    diff_id: bytes


class Doc(msgspec.Struct, frozen=True):
    """A part of a document, like Data."""

    request: int
    offset: int
    total: int
    payload: bytes | memoryview


class Join(msgspec.Struct, frozen=True):
    """Send the bitmap of this swarm, and its changes from then on."""

    swarm: bytes


class Leave(msgspec.Struct, frozen=True):
    """No more of them."""

    swarm: bytes


class Bitmap(msgspec.Struct, frozen=True):
    """Which chunks the sender has: bit n is bit n % 8 of byte n // 8. `count` 0: none, or nothing it would tell."""

    swarm: bytes
    count: int
    bits: bytes | memoryview


class BitmapDelta(msgspec.Struct, frozen=True):
    """What the sender has got and lost since the last BITMAP or BITMAP_DELTA."""

    swarm: bytes
    got: tuple[Run, ...]
    lost: tuple[Run, ...] = ()


class ProofJoin(msgspec.Struct, frozen=True):
    """The same as Join, of a swarm that is for those who know its image: with the proof that the sender does."""

    swarm: bytes
    proof: bytes


class Proof(msgspec.Struct, frozen=True):
    """The sender knows the image of this swarm, too. Comes before the first Bitmap of such a swarm that has anything."""

    swarm: bytes
    proof: bytes


class ProofDocWant(msgspec.Struct, frozen=True):
    """The same as DocWant, of a document of such an image, by the name that only those who know the image can compute."""

    request: int
    name: bytes
    proof: bytes


Frame = (
    Hello | Ping | Pong | Goodbye | Want | Data | Missing | Busy | Forget | DocWant | Doc | Join | Leave
    | Bitmap | BitmapDelta | IndexWant | ProofJoin | Proof | ProofDocWant
)  # fmt: skip


def runs_of(chunks: Iterable[int]) -> tuple[Run, ...]:
    """Ascending chunk numbers as runs."""
    runs: list[Run] = []
    first = count = 0
    for n in chunks:
        if count and n == first + count:
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = n, 1
    if count:
        runs.append((first, count))
    return tuple(runs)


def chunks_of(runs: Iterable[Run]) -> Iterator[int]:
    """The chunk numbers of runs."""
    for first, count in runs:
        yield from range(first, first + count)
