"""The frames of the peer exchange: what is written is read, in pieces of any size, and damage raises PeerFault only."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.crowdmsg import CrowdType
from p2pgz.core.frames import BODY_MAX_BYTES, FRAME_MAX_BYTES, encode, parse_body
from p2pgz.core.messages import (
    Alternative,
    Bitmap,
    BitmapDelta,
    Busy,
    Data,
    DataFlag,
    Doc,
    DocWant,
    Forget,
    Frame,
    FrameType,
    Goodbye,
    GoodbyeReason,
    Hello,
    IndexWant,
    Join,
    Leave,
    Missing,
    Ping,
    Pong,
    Proof,
    ProofDocWant,
    ProofJoin,
    Want,
    chunks_of,
    runs_of,
)
from p2pgz.core.peerid import PeerId
from p2pgz.core.wire import HEADER, OPTIONAL_MAX_BYTES, FrameReader
from p2pgz.errors import PeerFault

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
B32 = st.binary(min_size=32, max_size=32)
PEER = B32.map(lambda key: PeerId.of_ed25519(key).raw)
RUNS = st.sets(st.integers(0, 3000), max_size=60).map(lambda chunks: runs_of(sorted(chunks)))


@st.composite
def part(draw: st.DrawFn) -> tuple[int, int, bytes]:
    payload = draw(st.binary(min_size=1, max_size=300))
    offset = draw(st.integers(0, 1000))
    return offset, offset + len(payload) + draw(st.integers(0, 1000)), payload


@st.composite
def bitmap(draw: st.DrawFn) -> Bitmap:
    count = draw(st.integers(0, 200))
    bits = draw(st.integers(0, 2**count - 1)).to_bytes((count + 7) // 8, "little")
    return Bitmap(draw(B32), count, bits)


hellos = st.tuples(st.integers(1, 100), st.integers(0, 100)).flatmap(
    lambda v: st.builds(
        Hello,
        st.just(v[0]),
        st.just(v[0] + v[1]),
        U64,
        B32,
        PEER,
        st.binary(max_size=64),
        st.lists(B32, max_size=2).map(tuple),
    )
)
frames: st.SearchStrategy[Frame] = st.one_of(
    hellos,
    st.builds(Ping, U64),
    st.builds(Pong, U64),
    st.builds(Goodbye, st.sampled_from(GoodbyeReason), st.text("abc ", max_size=40)),
    st.builds(Want, U32, U8, B32, RUNS.filter(bool)),
    st.builds(
        lambda r, n, f, p: Data(r, n, f, *p), U32, U32, st.sampled_from([DataFlag.RAW, DataFlag.ZSTD]), part()
    ),
    st.builds(Missing, U32, RUNS),
    st.builds(
        Busy,
        U32,
        st.integers(0, 60_000),
        st.lists(st.builds(Alternative, PEER, st.text("/ip4tcp.0123", max_size=100)), max_size=8).map(tuple),
    ),
    st.builds(Forget, U32, RUNS),
    st.builds(DocWant, U32, B32),
    st.builds(IndexWant, U32, B32),
    st.builds(lambda r, p: Doc(r, *p), U32, part()),
    st.builds(Join, B32),
    st.builds(Leave, B32),
    bitmap(),
    st.builds(BitmapDelta, B32, RUNS, RUNS),
    st.builds(ProofJoin, B32, B32),
    st.builds(Proof, B32, B32),
    st.builds(ProofDocWant, U32, B32, B32),
)


def opened() -> FrameReader:
    return FrameReader(first=frozenset())


def read(reader: FrameReader, pieces: list[bytes]) -> list[bytes]:
    """The frames as bytes again: payloads are views of buffers, which do not compare by value everywhere."""
    return [encode(frame) for piece in pieces for frame in reader.feed(piece)]


@given(st.lists(frames, max_size=8))
def test_what_is_written_is_read(sent: list[Frame]) -> None:
    written = [encode(frame) for frame in sent]
    reader = opened()
    assert read(reader, [b"".join(written)]) == written
    assert not reader.in_frame


@given(st.lists(frames, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_pieces_of_any_size_give_the_same_frames(sent: list[Frame], rng: random.Random) -> None:
    whole = b"".join(map(encode, sent))
    assert read(opened(), [whole[i : i + 1] for i in range(len(whole))]) == list(map(encode, sent))
    cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(5))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(opened(), pieces) == list(map(encode, sent))


@settings(max_examples=400)
@given(st.lists(frames, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_damaged_frames_parse_or_raise_peer_fault(sent: list[Frame], rng: random.Random) -> None:
    data = bytearray(b"".join(map(encode, sent)))
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(3):
            case 0:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 1:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randint(1, 5))
            case _:
                at = rng.randrange(len(data))
                del data[at : at + rng.randint(1, 5)]
                if not data:
                    return

    def outcome(pieces: list[bytes]) -> list[bytes] | str:
        try:
            return read(opened(), pieces)
        except PeerFault as error:
            return str(error)

    whole = outcome([bytes(data)])
    bytewise = outcome([bytes([b]) for b in data])
    assert whole == bytewise


@settings(max_examples=300)
@given(st.sampled_from(FrameType), st.binary(max_size=400))
def test_any_body_parses_or_raises_peer_fault(kind: FrameType, body: bytes) -> None:
    with contextlib.suppress(PeerFault):
        parse_body(kind, memoryview(body))


@given(st.sampled_from(FrameType))
def test_no_frame_is_collected_beyond_its_limit(kind: FrameType) -> None:
    limit = BODY_MAX_BYTES[kind]
    assert limit + HEADER.size <= FRAME_MAX_BYTES
    with pytest.raises(PeerFault, match="limit"):
        opened().feed(HEADER.pack(limit + 1, kind))
    with pytest.raises(PeerFault, match="limit"):
        opened().feed(HEADER.pack(0xFFFF_FFFF, kind))


@given(st.integers(0x80, 0xFF), st.integers(0, OPTIONAL_MAX_BYTES))
def test_optional_frames_are_skipped_without_being_collected(kind: int, size: int) -> None:
    reader = opened()
    whole = HEADER.pack(size, kind) + bytes(size) + encode(Ping(3))
    assert read(reader, [whole]) == [encode(Ping(3))]
    assert reader.skipped_frames == 1
    with pytest.raises(PeerFault):
        opened().feed(HEADER.pack(OPTIONAL_MAX_BYTES + 1, kind))


@given(st.integers(0, 0x7F).filter(lambda kind: kind not in {*FrameType, *CrowdType}))
def test_unknown_frames_that_are_not_optional_are_a_fault(kind: int) -> None:
    with pytest.raises(PeerFault, match="unknown type"):
        opened().feed(HEADER.pack(0, kind))


@given(frames)
def test_nothing_is_read_before_the_hello(frame: Frame) -> None:
    reader = FrameReader()
    if isinstance(frame, Hello | Goodbye):
        assert reader.feed(encode(frame) + encode(Ping(1)))[1:] == [Ping(1)]
    else:
        with pytest.raises(PeerFault, match="before the hello"):
            reader.feed(encode(frame))


@given(hellos, st.binary(max_size=40))
def test_later_versions_may_append_to_the_hello(hello: Hello, more: bytes) -> None:
    body = encode(hello)[HEADER.size :] + more
    assert FrameReader().feed(HEADER.pack(len(body), FrameType.HELLO) + body) == [hello]


@given(st.sets(st.integers(0, 500)))
def test_runs_name_the_chunks(chunks: set[int]) -> None:
    assert list(chunks_of(runs_of(sorted(chunks)))) == sorted(chunks)


def test_requests_ask_for_something_and_for_not_too_much() -> None:
    with pytest.raises(PeerFault, match="for nothing"):
        opened().feed(encode(Want(1, 0, bytes(32), ())))
    with pytest.raises(PeerFault, match="the limit is 4096"):
        opened().feed(encode(Want(1, 0, bytes(32), ((0, 4097),))))
    assert opened().feed(encode(Want(1, 0, bytes(32), ((0, 4096),)))) == [Want(1, 0, bytes(32), ((0, 4096),))]


def test_fields_out_of_range_are_faults() -> None:
    hello = encode(Hello(1, 1, 0, bytes(32), bytes(34)))
    backwards = hello[: HEADER.size] + b"\x00\x02\x00\x01" + hello[HEADER.size + 4 :]
    other = Alternative(bytes(34), "/ip4/10.0.0.1/tcp/1")
    busy = encode(Busy(1, 2, (other,)))
    for broken in (
        backwards,
        encode(Hello(1, 1, 0, bytes(32), bytes(34), b"", (bytes(32),) * 3)),
        encode(Hello(1, 1, 0, bytes(32), bytes(45))),
        encode(Busy(1, 60_001)),
        busy.replace(b"/ip4", b"/ip\xff"),
        HEADER.pack(len(busy) - HEADER.size + 1, FrameType.BUSY) + busy[HEADER.size :] + b"x",
        encode(Bitmap(bytes(32), 9, b"\xff\x02")),
        encode(Data(1, 2, DataFlag.RAW, 5, 5, b"x")),
        encode(Doc(1, 0, 2**31, b"x")),
        encode(ProofJoin(bytes(32), bytes(31))),
        encode(Proof(bytes(32), bytes(33))),
        HEADER.pack(67, FrameType.PROOF_DOC_WANT) + bytes(67),
    ):
        with pytest.raises(PeerFault):
            FrameReader(first=frozenset()).feed(broken)
