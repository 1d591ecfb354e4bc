"""Faults cost peers their place; compressed chunks are let in only when they are honest."""

from __future__ import annotations

import contextlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.peerid import PeerId
from p2pgz.core.standing import BAN_MAX_SECONDS, BAN_START_SECONDS, PEERS_MAX, Fault, Standing
from p2pgz.core.wirezstd import WINDOW_MAX_BYTES, compress, decompress, pays
from p2pgz.errors import ChunkCorrupt

A = PeerId.of_ed25519(bytes(32))


def test_grave_faults_ban_for_longer_each_time() -> None:
    standing = Standing()
    now = 1000.0
    for times in range(10):
        until = standing.fault(A, Fault.CORRUPT, now)
        assert until - now == min(BAN_MAX_SECONDS, BAN_START_SECONDS * 2**times)
        assert standing.banned(A, now)
        assert standing.out_until(A, until) == 0.0
        now = until
    standing.good(A)
    assert standing.fault(A, Fault.PROTOCOL, now) - now == BAN_MAX_SECONDS


def test_innocent_failures_cost_seconds_and_are_forgiven() -> None:
    standing = Standing()
    assert standing.fault(A, Fault.LOST, 0) == 1
    assert standing.fault(A, Fault.SLOW, 1) == 3
    assert not standing.banned(A, 1)
    standing.good(A)
    assert standing.out_until(A, 1) == 0
    assert standing.fault(A, Fault.LOST, 2) == 3
    assert standing.counts == {Fault.LOST: 2, Fault.SLOW: 1}


def test_it_is_known_who_did_what_and_who_is_out() -> None:
    standing = Standing()
    b = PeerId.of_ed25519(b"b" * 32)
    standing.fault(A, Fault.LOST, 0)
    standing.fault(b, Fault.CORRUPT, 0)
    standing.fault(A, Fault.SLOW, 0)
    assert standing.faults_of(A) == {"lost": 1, "slow": 1}
    assert standing.faults_of(b) == {"corrupt": 1}
    assert standing.faults_of(PeerId.of_ed25519(b"c" * 32)) == {}
    assert standing.out(0.5) == [b, A]
    assert standing.out(10) == [b]
    assert standing.out(BAN_START_SECONDS) == []
    standing.good(A)
    assert standing.faults_of(A) == {"lost": 1, "slow": 1}  # forgiven, not forgotten


def test_a_lost_connection_does_not_shorten_a_ban() -> None:
    standing = Standing()
    until = standing.fault(A, Fault.CORRUPT, 0)
    standing.fault(A, Fault.LOST, 10)
    assert standing.out_until(A, 11) >= until
    assert standing.banned(A, 11)


def test_a_day_without_a_fault_and_the_peer_is_as_good_as_new() -> None:
    standing = Standing()
    for now in (0.0, 1.0, 2.0):
        standing.fault(A, Fault.CORRUPT, now)
    now = 3.0 + BAN_MAX_SECONDS
    assert standing.fault(A, Fault.CORRUPT, now) - now == BAN_START_SECONDS


def test_an_innocent_failure_after_a_ban_costs_seconds() -> None:
    """A peer that was bad once and is cut off later must be back as soon as others."""
    standing = Standing()
    until = standing.fault(A, Fault.CORRUPT, 0)
    assert standing.fault(A, Fault.LOST, until + 400) == until + 401
    assert not standing.banned(A, until + 400)


def test_reaching_a_peer_forgives_that_it_could_not_be_reached_and_nothing_else() -> None:
    standing = Standing()
    standing.fault(A, Fault.LOST, 0)
    standing.reached(A)
    assert standing.out_until(A, 0) == 0
    standing.reached(A)
    standing.fault(A, Fault.SLOW, 0)
    standing.reached(A)
    assert standing.out_until(A, 0) == 1
    standing.fault(A, Fault.CORRUPT, 0)
    standing.reached(A)
    assert standing.banned(A, 0)


def test_many_identities_cost_bounded_memory() -> None:
    standing = Standing()
    for n in range(PEERS_MAX + 50):
        standing.fault(PeerId.of_ed25519(n.to_bytes(32, "big")), Fault.CORRUPT, float(n))
    assert len(standing._bans) == PEERS_MAX


@given(st.binary(min_size=1, max_size=20), st.integers(50, 5000))
def test_compressed_chunks_come_out_as_they_went_in(word: bytes, times: int) -> None:
    data = word * times
    packed = compress(data)
    assert packed is None or decompress(packed, len(data), source="test") == data


def test_what_does_not_shrink_is_not_sent_compressed() -> None:
    import random

    assert compress(random.Random(1).randbytes(10_000)) is None


def test_compression_pays_only_on_a_blocked_link_with_an_idle_worker() -> None:
    good = {"size": 1 << 20, "toc_ratio": 0.4, "blocked_seconds": 0.02, "worker_idle": True}
    assert pays(**good)
    for worse in (
        {"size": 100},
        {"size": 64 << 20},
        {"toc_ratio": 0.9},
        {"blocked_seconds": 0.001},
        {"worker_idle": False},
    ):
        assert not pays(**{**good, **worse})


SIZE = 100_000
TEXT = b"some text " * (SIZE // 10)
HONEST = zstandard.ZstdCompressor(level=1).compress(TEXT)
DISHONEST = {
    "bomb": zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20)),
    "no size": zstandard.ZstdCompressor(level=1, write_content_size=False).compress(TEXT),
    "smaller": zstandard.ZstdCompressor(level=1).compress(TEXT[:-1]),
    "two frames": HONEST + HONEST,
    "bytes after it": HONEST + b"\0",
    "skippable frame after it": HONEST + b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "cut short": HONEST[:-3],
    "dictionary": zstandard.ZstdCompressor(
        level=1, dict_data=zstandard.train_dictionary(2000, [b"some text %d" % n * 20 for n in range(500)])
    ).compress(TEXT),
    "no smaller": bytes(SIZE),
    "empty": b"",
    "garbage": b"\x28\xb5\x2f\xfd" + bytes(range(100)),
}


@pytest.mark.parametrize("name", DISHONEST)
def test_dishonest_frames_are_corrupt_chunks(name: str) -> None:
    with pytest.raises(ChunkCorrupt, match="a peer"):
        decompress(DISHONEST[name], SIZE, source="a peer")


def test_window_is_bounded_before_it_is_allocated() -> None:
    size = WINDOW_MAX_BYTES * 2
    packer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=24)
    )
    packed = packer.compress(b"ab" * (size // 2))
    assert zstandard.get_frame_parameters(packed).window_size > WINDOW_MAX_BYTES
    with pytest.raises(ChunkCorrupt, match="window"):
        decompress(packed, size, source="a peer")


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_bytes_are_a_chunk_or_corrupt(packed: bytes, size: int) -> None:
    with contextlib.suppress(ChunkCorrupt):
        assert len(decompress(b"\x28\xb5\x2f\xfd" + packed, size, source="x")) == size
