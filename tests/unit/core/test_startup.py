"""Start-up lists: what a recording takes, how recordings and peers' words become one list, and what a liar can do."""

from __future__ import annotations

import contextlib
import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core import startup
from p2pgz.core.digest import Digest
from p2pgz.core.startup import (
    AGE_MAX,
    CHUNKS_MAX,
    LAYERS_MAX,
    LIST_MAX_BYTES,
    NOTHING,
    PHASE_SECONDS,
    QUIET_SECONDS,
    Recording,
    Spot,
    StartUpList,
    agreed,
    from_bytes,
    from_file,
    lies,
    merged,
    name_of,
    to_bytes,
    to_file,
)
from p2pgz.errors import PeerFault, StateError

A, B = Digest.of(b"a").raw, Digest.of(b"b").raw
some_spots = st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 12)), unique=True)


def spots(text: str) -> list[Spot]:
    """One chunk of layer A for each letter."""
    return [(A, ord(letter)) for letter in text]


def text(found: list[Spot]) -> str:
    return "".join(chr(n) for _, n in found)


def recorded(*texts: str) -> StartUpList:
    known = NOTHING
    for one in texts:
        known = merged(known, spots(one))
    return known


# --- recording


def test_chunk_counts_when_it_is_read_first() -> None:
    recording = Recording()
    assert recording.ends_at() is None
    assert recording.note(0, 5, 2, 100.0) == [5, 6]
    assert recording.note(0, 6, 2, 101.0) == [7]
    assert recording.note(1, 6, 1, 102.0) == [6]
    assert recording.note(0, 5, 3, 109.0) == []
    assert list(recording.read) == [(0, 5), (0, 6), (0, 7), (1, 6)]
    assert recording.ends_at() == 102.0 + QUIET_SECONDS


def test_start_up_that_never_becomes_quiet_ends_all_the_same() -> None:
    recording = Recording()
    for second in range(int(PHASE_SECONDS)):
        recording.note(0, second, 1, 50.0 + second)
    assert recording.ends_at() == 50.0 + PHASE_SECONDS


def test_recording_is_bounded() -> None:
    recording = Recording()
    assert len(recording.note(0, 0, CHUNKS_MAX + 100, 0.0)) == CHUNKS_MAX
    assert recording.full
    assert recording.note(1, 0, 1, 1.0) == []


# --- merging


def test_last_recording_gives_the_order_and_what_it_missed_stays_behind_its_neighbour() -> None:
    assert text(recorded("abcdef").spots) == "abcdef"
    assert text(recorded("abcdef", "ca").spots) == "cdefab"
    assert text(recorded("xyab", "b").spots) == "xyab"[:3] + "b"


def test_what_no_recording_sees_any_more_is_forgotten() -> None:
    assert text(recorded("ab", *["b"] * AGE_MAX).spots) == "ab"
    assert text(recorded("ab", *["b"] * (AGE_MAX + 1)).spots) == "b"
    assert text(recorded("ab", *["b"] * AGE_MAX, "ab", "b").spots) == "ab"


def test_few_reads_of_something_else_forget_nothing() -> None:
    others = ["z", "", "ya"] * (AGE_MAX + 1)
    assert set(text(recorded("abcdefghij", *others).spots)) == set("abcdefghijyz")
    assert recorded("abc", "").recordings == 2


def test_merged_list_is_bounded() -> None:
    first = merged(NOTHING, [(A, n) for n in range(CHUNKS_MAX + 5)])
    assert len(merged(first, [(B, 1)]).ages) == CHUNKS_MAX


@given(st.lists(some_spots, max_size=6))
def test_any_recordings_keep_the_last_order(recordings: list[list[Spot]]) -> None:
    known = NOTHING
    for read in recordings:
        before = known
        known = merged(known, read)
        assert [spot for spot in known.spots if spot in set(read)] == read
        assert set(known.ages) <= set(before.ages) | set(read)
    assert from_file(to_file(known)) == known


# --- files


def test_damaged_file_is_noticed() -> None:
    data = to_file(recorded("abc", "ad"))
    assert text(from_file(data).spots) == "abcd"
    for at in range(len(data)):
        with pytest.raises(StateError):
            from_file(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StateError):
            from_file(data[:at])


@pytest.mark.parametrize(
    "body",
    [
        [2, to_bytes(spots("a")), b"\0", 1], [1, to_bytes(spots("a")), b"\0\0", 1], [1, b"", b"", 1], 5,
        [1, msgspec.msgpack.encode([7, "later"]), b"", 1],
    ],
    ids=str,
)  # fmt: skip
def test_file_of_another_version_is_refused(body: object) -> None:
    data = msgspec.msgpack.encode(body)
    with pytest.raises(StateError):
        from_file(hashlib.sha256(data).digest() + data)


# --- travelling


@given(some_spots)
def test_what_is_written_is_read(found: list[Spot]) -> None:
    assert from_bytes(to_bytes(found)) == found


def test_largest_list_fits_its_limit() -> None:
    layers = [Digest.of(str(n).encode()).raw for n in range(LAYERS_MAX)]
    found = [(layers[n % LAYERS_MAX], (1 << 27) - 1 - n) for n in range(CHUNKS_MAX)]
    data = to_bytes(found)
    assert len(data) <= LIST_MAX_BYTES
    assert from_bytes(data) == found


def test_layers_beyond_the_limit_are_left_out() -> None:
    layers = [Digest.of(str(n).encode()).raw for n in range(LAYERS_MAX + 1)]
    found = [(layer, 0) for layer in layers] + [(layers[0], 1)]
    assert from_bytes(to_bytes(found)) == [*found[:LAYERS_MAX], found[-1]]


def test_list_of_a_later_format_says_nothing() -> None:
    assert from_bytes(msgspec.msgpack.encode([2, "whatever"])) is None


@pytest.mark.parametrize(
    "document",
    [
        [], [1], {}, 5, [1, [], [[0, 0, 1]]], [1, [b"short"], []], [1, [A], [[1, 0, 1]]], [1, [A], [[-1, 0, 1]]],
        [1, [A], [[0, -1, 1]]], [1, [A], [[0, 0, 0]]], [1, [A], [[0, 1 << 27, 1]]], [1, [A], [[0, 0, 1], [0, 0, 1]]],
        [1, [A], [[0, 0, 5], [0, 4, 1]]], [1, [A], [[0, 0, 10_000_000]]], [1, [A], [[0, 0, 1]] * (CHUNKS_MAX + 1)],
        [1, [A] * (LAYERS_MAX + 1), []], [1, [A], [[0, 0, 1]], 1], [1, [A, A], [[0, 3, 1], [1, 3, 1]]],
    ],
    ids=lambda document: str(document)[:60],
)  # fmt: skip
def test_nonsense_is_a_fault(document: object) -> None:
    with pytest.raises(PeerFault):
        from_bytes(msgspec.msgpack.encode(document))


def test_long_list_is_a_fault() -> None:
    with pytest.raises(PeerFault, match="limit"):
        from_bytes(bytes(LIST_MAX_BYTES + 1))


@settings(max_examples=200)
@given(st.integers(0, 600), st.integers(0, 255), st.binary(max_size=5))
def test_damaged_lists_parse_or_raise_peer_fault(at: int, byte: int, more: bytes) -> None:
    data = bytearray(to_bytes([(A, 1), (A, 2), (B, 7), (A, 900)]))
    data[at % len(data)] = byte
    with contextlib.suppress(PeerFault):
        from_bytes(bytes(data) + more)


@given(st.binary(max_size=100))
def test_any_bytes_parse_or_raise_peer_fault(data: bytes) -> None:
    with contextlib.suppress(PeerFault):
        from_bytes(data)


def test_name_is_nobodys_digest() -> None:
    manifest = Digest.of(b"manifest")
    assert name_of(manifest) == Digest.of(b"p2pgz start-up list 1\0" + manifest.raw)


# --- several peers


def test_what_most_peers_name_comes_first() -> None:
    assert text(agreed([spots("xab"), spots("abc"), spots("acb")], {A: 200})) == "abcx"
    assert text(agreed([spots("ab"), spots("bc")], {A: 200})) == "abc"
    assert agreed([], {A: 200}) == []


def test_chunks_that_the_image_has_not_are_left_out() -> None:
    found: list[Spot] = [(A, 1), (A, 10), (B, 0)]
    assert agreed([found], {A: 10}) == [(A, 1)]
    assert lies(found, {A: 10})
    assert not lies(found, {A: 11})
    assert not lies(found, {})


def test_list_is_named_after_its_version() -> None:
    assert startup._NAME.endswith(b" 1\0")
