"""Claims about indexes: what is written is read, signatures bind, nonsense is a peer's fault and nothing worse."""

from __future__ import annotations

import contextlib
import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.indexclaim import (
    CLAIM_MAX_BYTES,
    MAKERS_MAX,
    IndexClaim,
    from_bytes,
    merged,
    statement,
    to_bytes,
)
from p2pgz.core.peerid import PeerId
from p2pgz.errors import PeerFault

DIFF_ID = Digest.of(b"stream")
DOCUMENT = Digest.of(b"index")
PEERS = [PeerId.of_ed25519(bytes([n]) * 32) for n in range(MAKERS_MAX + 2)]


def sign(peer: PeerId, message: bytes) -> bytes:
    assert peer.ed25519_key is not None
    return hashlib.sha512(peer.ed25519_key + message).digest()


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    return hashlib.sha512(key + message).digest() == signature


def claim(*peers: PeerId, diff_id: Digest = DIFF_ID) -> IndexClaim:
    return IndexClaim(DOCUMENT, 1000, {peer: sign(peer, statement(diff_id, DOCUMENT)) for peer in peers})


def test_statement_is_what_the_specification_says() -> None:
    assert statement(DIFF_ID, DOCUMENT) == b"p2pgz own index 1\0" + DIFF_ID.raw + DOCUMENT.raw


@pytest.mark.parametrize("count", [0, 1, MAKERS_MAX])
def test_what_is_written_is_read(count: int) -> None:
    data = to_bytes(claim(*PEERS[:count]))
    assert len(data) <= CLAIM_MAX_BYTES
    assert from_bytes(data, DIFF_ID, verify) == claim(*PEERS[:count])


def test_no_more_makers_are_written_than_are_read() -> None:
    found = from_bytes(to_bytes(claim(*PEERS)), DIFF_ID, verify)
    assert found is not None
    assert list(found.makers) == PEERS[:MAKERS_MAX]


def test_signature_for_another_layer_is_forged() -> None:
    with pytest.raises(PeerFault, match="did not sign"):
        from_bytes(to_bytes(claim(PEERS[0], diff_id=Digest.of(b"other"))), DIFF_ID, verify)


def test_claim_of_a_later_format_says_nothing() -> None:
    assert from_bytes(msgspec.msgpack.encode([2, "whatever"]), DIFF_ID, verify) is None


@pytest.mark.parametrize(
    "document",
    [
        [], [1], {}, 5, [1, b"short", 5, []], [1, DOCUMENT.raw, 0, []], [1, DOCUMENT.raw, 1 << 40, []],
        [1, DOCUMENT.raw, 5, [[b"no peer", b""]]], [1, DOCUMENT.raw, 5, [[PEERS[0].raw, b"x" * 64]]],
        [1, DOCUMENT.raw, 5, [[PEERS[0].raw, sign(PEERS[0], statement(DIFF_ID, DOCUMENT))]] * 2],
        [1, DOCUMENT.raw, 5, [], 1],
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_a_fault(document: object) -> None:
    with pytest.raises(PeerFault):
        from_bytes(msgspec.msgpack.encode(document), DIFF_ID, verify)


def test_long_claim_is_a_fault() -> None:
    with pytest.raises(PeerFault, match="limit"):
        from_bytes(bytes(CLAIM_MAX_BYTES + 1), DIFF_ID, verify)


@settings(max_examples=200)
@given(st.integers(0, 600), st.integers(0, 255), st.binary(max_size=5))
def test_damaged_claims_parse_or_raise_peer_fault(at: int, byte: int, more: bytes) -> None:
    data = bytearray(to_bytes(claim(*PEERS[:3])))
    data[at % len(data)] = byte
    with contextlib.suppress(PeerFault):
        from_bytes(bytes(data) + more, DIFF_ID, verify)


@given(st.binary(max_size=100))
def test_any_bytes_parse_or_raise_peer_fault(data: bytes) -> None:
    with contextlib.suppress(PeerFault):
        from_bytes(data, DIFF_ID, verify)


def test_trusted_makers_are_kept_when_there_are_too_many() -> None:
    kept = merged([claim(*PEERS[:6]).makers, claim(*PEERS[5:]).makers], [PEERS[-1]])
    assert len(kept) == MAKERS_MAX
    assert PEERS[-1] in kept
