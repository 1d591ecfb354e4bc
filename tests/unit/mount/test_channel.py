"""The records between fs and node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.mount.channel import (
    DATAGRAM_BYTES,
    RECORD_BYTES,
    RECORDS_PER_DATAGRAM,
    Kind,
    Record,
    decode,
    encode,
)

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
records = st.builds(Record, st.sampled_from(Kind), U8, U16, U32, U32, U32, U64)


def test_layout_is_as_documented() -> None:
    datagram = encode(
        [Record(Kind.REQUEST, 1, 0x0203, 0x04050607, 0x08090A0B, 0x0C0D0E0F, 0x1011121314151617)]
    )
    assert datagram.hex() == "02010302" + "07060504" + "0b0a0908" + "0f0e0d0c" + "1716151413121110"
    assert len(datagram) == RECORD_BYTES == 24


@given(st.lists(records, min_size=1, max_size=RECORDS_PER_DATAGRAM))
def test_what_is_written_is_read(sent: list[Record]) -> None:
    assert decode(encode(sent)) == (sent, 0)


@given(st.binary(max_size=DATAGRAM_BYTES + 48))
def test_any_bytes_are_records_or_counted(datagram: bytes) -> None:
    found, unknown = decode(datagram)
    if len(datagram) % RECORD_BYTES or not datagram or len(datagram) > DATAGRAM_BYTES:
        assert (found, unknown) == ([], 1)
    else:
        assert len(found) + unknown == len(datagram) // RECORD_BYTES


@pytest.mark.parametrize("size", [0, 1, RECORD_BYTES - 1, RECORD_BYTES + 1, DATAGRAM_BYTES + RECORD_BYTES])
def test_datagram_of_wrong_length_is_one_fault(size: int) -> None:
    assert decode(b"\x02" * size) == ([], 1)


def test_unknown_kinds_are_skipped_among_known_ones() -> None:
    ping = Record(Kind.PING, id=7)
    assert decode(encode([ping]) + b"\xee" * RECORD_BYTES + encode([ping])) == ([ping, ping], 1)
