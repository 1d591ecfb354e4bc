"""What members say about leases and about each other: one frozen value per frame, and the limits of their fields.

Made by `core.crowdframes` from bytes and by the state machines of `core.leases`, `core.leasehome` and `core.membership`.
Peers are the bytes of their ids in here: they are keys of many small tables. docs/reference/wire.md is the specification.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

import msgspec

from p2pgz.core.messages import Run

EXCLUDED_MAX: Final = 8
HAVE_MAX: Final = 8
PENDING_MAX: Final = 512
DEPTH_MAX: Final = 16  # parents above one another; a tree of fan-out 2 reaches 65 000 nodes with them
DEPTH_NONE: Final = 0xFF
# A document (manifest, config, TOC) is leased as a whole: `swarm` is its sha256, or its name for those who know the image
EXTENT_DOCUMENT: Final = 0xFFFF_FFFF
ENTRIES_MAX: Final = 64  # of one GOSSIP: about 5 ms of checking signatures
ZONE_MAX_BYTES: Final = 64  # a cloud's zone id, or the value of a node label (63)
MEMBER_ADDRESS_MAX_BYTES: Final = 128
BUCKETS: Final = 256  # of a RANGES: 2 KiB; 39 members in each at 10 000


class CrowdType(IntEnum):
    """The type byte of the frames about leases and members, 0x20 to 0x2f."""

    ASK = 0x20
    GRANT = 0x21
    PARENT = 0x22
    HAVE = 0x23
    NOT_HOME = 0x24
    RENEW = 0x25
    DONE = 0x26
    GIVEUP = 0x27
    FOLLOW = 0x28
    PENDING = 0x29
    GONE = 0x2A
    HEARTBEAT = 0x2B
    GOSSIP = 0x2C
    RANGES = 0x2D
    RANGE = 0x2E


class Level(IntEnum):
    """Whose homes: those of a zone decide who brings an extent into it, those of the cluster who fetches it."""

    ZONE = 0
    CLUSTER = 1


class AskFlag(IntFlag):
    """What a home should know about the asker; unknown bits are ignored."""

    NONE = 0
    NO_GRANT = 1
    """it cannot fetch: no credentials, or no way to the registry"""


class GiveupReason(IntEnum):
    """Why a holder gives its lease back; unknown ones are read as FAILED."""

    FAILED = 0
    REFUSED = 1
    """the registry does not let it"""
    LEAVING = 2


class LeaseRef(msgspec.Struct, frozen=True):
    """Which lease: an extent of a swarm at one level, and the number that the first home gave it."""

    swarm: bytes
    extent: int
    level: Level
    lease: int


class Ask(msgspec.Struct, frozen=True):
    """To a home: may I fetch this extent, or who gets it? After a failed parent: lease and depth so far, and whom not."""

    request: int
    swarm: bytes
    extent: int
    level: Level
    priority: int
    flags: AskFlag
    view: int
    lease: int = 0
    depth: int = DEPTH_NONE
    exclude: tuple[bytes, ...] = ()
    """those that were silent, gone or did not know of it"""
    avoid: tuple[bytes, ...] = ()
    """those that promised and brought nothing: perhaps they are only slow"""


class Grant(msgspec.Struct, frozen=True):
    """Fetch it, on behalf of all. Ends `ttl_ms` after the last RENEW."""

    request: int
    lease: int
    ttl_ms: int


class Parent(msgspec.Struct, frozen=True):
    """Follow this peer, which has it or is getting it; your depth is `depth`."""

    request: int
    lease: int
    depth: int
    peer: bytes


class Have(msgspec.Struct, frozen=True):
    """These have had all of it for a while: ask any of them."""

    request: int
    peers: tuple[bytes, ...]


class NotHome(msgspec.Struct, frozen=True):
    """Not my extent, in my view of the members."""

    request: int
    view: int


class Renew(msgspec.Struct, frozen=True):
    """To each home: I hold this lease. A home that does not know it adopts it.

    `got_bytes` is what the sender has fetched from registries so far, under all its leases: whether it is stuck.
    """

    ref: LeaseRef
    got_bytes: int


class Done(msgspec.Struct, frozen=True):
    """To each home: I have all that I was asked for. I go on answering for the extent, and fetch more of it when asked."""

    ref: LeaseRef
    complete: bool


class Giveup(msgspec.Struct, frozen=True):
    """To each home: I do not hold this lease any more."""

    ref: LeaseRef
    reason: GiveupReason


class Follow(msgspec.Struct, frozen=True):
    """To a parent: chunks that I want once you have them. Answered as WANT is, by PENDING meanwhile, or by GONE."""

    request: int
    priority: int
    swarm: bytes
    extent: int
    level: Level
    lease: int
    depth: int
    runs: tuple[Run, ...]


class Pending(msgspec.Struct, frozen=True):
    """Still at it, four times a second: these FOLLOWs or ASKs of yours are not forgotten."""

    requests: tuple[int, ...]


class Gone(msgspec.Struct, frozen=True):
    """Not from me (any more): these chunks, or without runs all that is left. Ask the home again."""

    request: int
    runs: tuple[Run, ...] = ()


class Heartbeat(msgspec.Struct, frozen=True):
    """I am here, and this is the hash of the members that I know of."""

    view: int
    members: int


class MemberFlag(IntFlag):
    """What a member says of itself; unknown bits are kept, since the signature covers them."""

    NONE = 0
    SEED = 1
    """a seed or bootstrap node: home while nobody is an elder"""
    LEFT = 2
    """this is its last entry"""
    NO_LEASES = 4
    """it takes no part in leases"""


class Member(msgspec.Struct, frozen=True, gc=False):
    """An entry of the member list, signed by the member. The one with the highest stamp counts."""

    peer: bytes
    stamp_ms: int
    """when it was signed"""
    since_seconds: int
    """when the member started"""
    flags: int
    zone: str
    address: str
    signature: bytes


class Down(msgspec.Struct, frozen=True, gc=False):
    """A signed report: `reporter` cannot reach the member of the entry with this stamp."""

    peer: bytes
    stamp_ms: int
    reporter: bytes
    signature: bytes


class Gossip(msgspec.Struct, frozen=True):
    """News of members. `answer`: the other end asked for them by RANGES or RANGE."""

    answer: bool
    members: tuple[Member, ...]
    downs: tuple[Down, ...] = ()


class Ranges(msgspec.Struct, frozen=True):
    """What I know, as one hash per bucket (the last byte of the peer id). Send me what you have where yours differs."""

    hashes: tuple[int, ...]


class Range(msgspec.Struct, frozen=True):
    """Send me what you have in these buckets."""

    buckets: tuple[int, ...]


MemberFrame = Heartbeat | Gossip | Ranges | Range
CrowdFrame = (
    Ask | Grant | Parent | Have | NotHome | Renew | Done | Giveup | Follow | Pending | Gone
    | Heartbeat | Gossip | Ranges | Range
)  # fmt: skip
