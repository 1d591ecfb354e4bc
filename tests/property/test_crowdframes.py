"""The frames about leases and members: what is written is read, and damage raises PeerFault only."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.crowdframes import (
    BODY_MAX_BYTES,
    down_statement,
    encode,
    member_statement,
    parse_body,
    peer_key,
)
from p2pgz.core.crowdmsg import (
    BUCKETS,
    DEPTH_MAX,
    DEPTH_NONE,
    ENTRIES_MAX,
    EXTENT_DOCUMENT,
    Ask,
    AskFlag,
    CrowdFrame,
    CrowdType,
    Done,
    Down,
    Follow,
    Giveup,
    GiveupReason,
    Gone,
    Gossip,
    Grant,
    Have,
    Heartbeat,
    LeaseRef,
    Level,
    Member,
    NotHome,
    Parent,
    Pending,
    Range,
    Ranges,
    Renew,
)
from p2pgz.core.messages import FrameType, runs_of
from p2pgz.core.peerid import PeerId
from p2pgz.core.wire import FRAME_MAX_BYTES, HEADER, FrameReader
from p2pgz.errors import PeerFault

U8, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
B32 = st.binary(min_size=32, max_size=32)
PEER = B32.map(lambda key: PeerId.of_ed25519(key).raw)
PEERS = st.lists(PEER, max_size=8).map(tuple)
RUNS = st.sets(st.integers(0, 3000), min_size=1, max_size=60).map(lambda chunks: runs_of(sorted(chunks)))
LEVEL = st.sampled_from(Level)
DEPTH = st.integers(0, DEPTH_MAX)
REF = st.builds(LeaseRef, B32, U32, LEVEL, U64)
TEXT = st.text("/ip4tcp.0123 -", max_size=60)
MEMBER = st.builds(Member, PEER, U64, U64, U8, TEXT, TEXT, st.binary(min_size=64, max_size=64))
DOWN = st.builds(Down, PEER, U64, PEER, st.binary(min_size=64, max_size=64))
frames: st.SearchStrategy[CrowdFrame] = st.one_of(
    st.builds(
        Ask,
        U32,
        B32,
        U32,
        LEVEL,
        U8,
        st.sampled_from(AskFlag),
        U64,
        U64,
        DEPTH | st.just(DEPTH_NONE),
        PEERS,
        PEERS,
    ),
    st.builds(Grant, U32, U64, U32),
    st.builds(Parent, U32, U64, DEPTH, PEER),
    st.builds(Have, U32, PEERS),
    st.builds(NotHome, U32, U64),
    st.builds(Renew, REF, U64),
    st.builds(Done, REF, st.booleans()),
    st.builds(Giveup, REF, st.sampled_from(GiveupReason)),
    st.builds(Follow, U32, U8, B32, st.integers(0, EXTENT_DOCUMENT - 1), LEVEL, U64, DEPTH, RUNS),
    st.builds(Follow, U32, U8, B32, st.just(EXTENT_DOCUMENT), LEVEL, U64, DEPTH, st.just(())),
    st.builds(Pending, st.lists(U32, max_size=20).map(tuple)),
    st.builds(Gone, U32, RUNS | st.just(())),
    st.builds(Heartbeat, U64, U32),
    st.builds(
        Gossip, st.booleans(), st.lists(MEMBER, max_size=3).map(tuple), st.lists(DOWN, max_size=3).map(tuple)
    ),
    st.builds(Ranges, st.lists(U64, min_size=BUCKETS, max_size=BUCKETS).map(tuple)),
    st.builds(Range, st.lists(U8, max_size=20).map(tuple)),
)


def parsed(data: bytes) -> CrowdFrame:
    size, kind = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    assert size == len(body) <= BODY_MAX_BYTES[kind]
    return parse_body(kind, memoryview(body))


@settings(max_examples=150)
@given(frames)
def test_what_is_written_is_read(frame: CrowdFrame) -> None:
    assert parsed(encode(frame)) == frame


@given(frames)
def test_a_connection_reads_them_in_pieces_of_any_size(frame: CrowdFrame) -> None:
    reader = FrameReader(first=frozenset())
    data = encode(frame)
    assert [found for byte in data for found in reader.feed(bytes([byte]))] == [frame]
    assert reader.feed(data) == [frame]


@given(st.sampled_from(CrowdType))
def test_a_connection_collects_none_beyond_its_limit(kind: CrowdType) -> None:
    limit = BODY_MAX_BYTES[kind]
    assert limit + HEADER.size <= FRAME_MAX_BYTES
    with pytest.raises(PeerFault, match=f"{kind.name} frame of {limit + 1} bytes"):
        FrameReader(first=frozenset()).feed(HEADER.pack(limit + 1, kind))


@given(frames)
def test_cut_and_lengthened_frames_are_faults(frame: CrowdFrame) -> None:
    data = encode(frame)
    _, kind = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    ends = {0, len(body) // 2, len(body) - 1} - {len(body)}
    for broken in [*(body[:end] for end in ends), body + b"\0"]:
        with pytest.raises(PeerFault):
            parse_body(kind, memoryview(broken))


@settings(max_examples=150)
@given(frames, st.randoms(use_true_random=False))
def test_damaged_frames_parse_or_raise_peer_fault(frame: CrowdFrame, rng: random.Random) -> None:
    body = bytearray(encode(frame)[HEADER.size :])
    for _ in range(rng.randint(1, 3)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    _, kind = HEADER.unpack_from(encode(frame))
    with contextlib.suppress(PeerFault):
        again = parse_body(kind, memoryview(bytes(body)))
        assert parsed(encode(again)) == again


@settings(max_examples=150)
@given(st.sampled_from(CrowdType), st.binary(max_size=300))
def test_any_body_parses_or_raises_peer_fault(kind: CrowdType, body: bytes) -> None:
    with contextlib.suppress(PeerFault):
        parse_body(kind, memoryview(body))


def test_the_types_are_those_kept_for_them() -> None:
    assert all(0x20 <= kind <= 0x2F for kind in CrowdType)
    assert not set(map(int, CrowdType)) & set(map(int, FrameType))
    assert set(BODY_MAX_BYTES) == set(CrowdType)


@given(B32)
def test_the_key_of_a_member_is_in_its_id(key: bytes) -> None:
    assert peer_key(PeerId.of_ed25519(key).raw) == key


def test_fields_out_of_range_are_faults() -> None:
    peer = PeerId.of_ed25519(bytes(32)).raw
    ask = Ask(1, bytes(32), 2, Level.ZONE, 0, AskFlag.NONE, 0)
    member = Member(peer, 1, 1, 0, "zone", "/ip4/10.0.0.1/tcp/1", bytes(64))
    for broken in (
        encode(ask).replace(bytes([0, 0, 0, 2, 0]), bytes([0, 0, 0, 2, 9]), 1),  # level
        encode(Ask(1, bytes(32), 2, Level.ZONE, 0, AskFlag.NONE, 0, 0, DEPTH_MAX + 1)),
        encode(Ask(1, bytes(32), 2, Level.ZONE, 0, AskFlag.NONE, 0, exclude=(peer,) * 9)),
        encode(Parent(1, 1, DEPTH_NONE, peer)),
        encode(Have(1, (peer + bytes(7),))),
        encode(Follow(1, 0, bytes(32), 1, Level.ZONE, 1, 1, ())),
        encode(Follow(1, 0, bytes(32), EXTENT_DOCUMENT, Level.ZONE, 1, 1, ((0, 1),))),
        encode(Follow(1, 0, bytes(32), 1, Level.ZONE, 1, 1, ((0, 4097),))),
        encode(Follow(1, 0, bytes(32), 1, Level.ZONE, 1, 1, ((5, 1), (3, 1)))),
        encode(Gossip(False, (member,) * (ENTRIES_MAX + 1))),
        encode(Gossip(False, (member,))).replace(b"zone", b"zo\nn"),
        encode(Gossip(False, (member,))).replace(b"zone", b"zo\xffn"),
    ):
        _, kind = HEADER.unpack_from(broken)
        with pytest.raises(PeerFault):
            parse_body(kind, memoryview(broken)[HEADER.size :])


def test_unknown_reasons_and_flags_are_read_as_known_ones() -> None:
    ref = LeaseRef(bytes(32), 1, Level.ZONE, 5)
    data = bytearray(encode(Giveup(ref, GiveupReason.LEAVING)))
    data[-1] = 77
    assert parsed(bytes(data)) == Giveup(ref, GiveupReason.FAILED)


@given(MEMBER, MEMBER, DOWN, DOWN)
def test_different_entries_are_signed_differently(a: Member, b: Member, c: Down, d: Down) -> None:
    def unsigned(m: Member) -> tuple[object, ...]:
        return (m.peer, m.stamp_ms, m.since_seconds, m.flags, m.zone, m.address)

    assert (member_statement(a) == member_statement(b)) == (unsigned(a) == unsigned(b))
    assert (down_statement(c) == down_statement(d)) == (
        (c.peer, c.stamp_ms, c.reporter) == (d.peer, d.stamp_ms, d.reporter)
    )
