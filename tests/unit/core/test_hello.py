"""Peer ids, the hello and admission."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.admission import Admission
from p2pgz.core.hello import Refused, agree, check_accepting, check_dialling, claimed_id, statement
from p2pgz.core.messages import Feature, GoodbyeReason, Hello
from p2pgz.core.peerid import PeerId, base58_decode, base58_encode
from p2pgz.errors import ConfigError, PeerFault

A, B, C = (PeerId.of_ed25519(bytes([n]) * 32) for n in (1, 2, 3))
NONCE = bytes(range(32))
KEY, OLD_KEY = b"k" * 32, b"o" * 32


def hello(
    peer: PeerId,
    *,
    versions: tuple[int, int] = (1, 1),
    proofs: tuple[bytes, ...] = (),
    signature: bytes = b"s",
) -> Hello:
    return Hello(*versions, Feature.ZSTD, NONCE, peer.raw, signature, proofs)


def test_peer_id_is_written_as_in_the_libp2p_specification() -> None:
    # the public key of the Ed25519 example in libp2p's specification of peer ids and keys
    key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    peer = PeerId.of_ed25519(key)
    assert str(peer).startswith("12D3KooW")
    assert len(str(peer)) == 52
    assert PeerId.parse(str(peer)) == peer
    assert peer.ed25519_key == key


def test_hashed_peer_ids_have_no_key_inside() -> None:
    peer = PeerId(b"\x12\x20" + bytes(32))
    assert str(peer).startswith("Qm")
    assert peer.ed25519_key is None
    with pytest.raises(PeerFault, match="no Ed25519"):
        claimed_id(hello(peer))


@given(st.binary(max_size=44))
def test_base58_goes_both_ways(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


@given(st.text(max_size=80))
def test_any_text_is_a_peer_id_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        PeerId.parse(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_peer_id_or_a_fault(raw: bytes) -> None:
    with contextlib.suppress(PeerFault):
        assert claimed_id(Hello(1, 1, 0, NONCE, raw)).raw == raw


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((1, 2), (2, 3), 2), ((2, 3), (1, 2), 2), ((1, 3), (2, 9), 3)],
)
def test_the_highest_common_version_is_spoken(
    ours: tuple[int, int], theirs: tuple[int, int], version: int
) -> None:
    assert agree(hello(A, versions=ours), hello(B, versions=theirs)).version == version


def test_versions_that_do_not_overlap_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="versions 3 to 4") as caught:
        agree(hello(A, versions=(1, 2)), hello(B, versions=(3, 4)))
    assert caught.value.reason is GoodbyeReason.VERSION


def test_unknown_features_are_not_agreed_on() -> None:
    theirs = Hello(1, 1, 0xFFFF_FFFF_FFFF_FFFF, NONCE, B.raw)
    assert agree(hello(A), theirs).features == Feature.ZSTD
    assert agree(hello(A), Hello(1, 1, 0, NONCE, B.raw)).features == Feature(0)


def test_signature_is_bound_to_both_ids_and_the_nonce() -> None:
    messages = {
        statement(A, NONCE, B),
        statement(B, NONCE, A),
        statement(A, os.urandom(32), B),
        statement(A, NONCE, C),
    }
    assert len(messages) == 4


def test_dialling_end_is_who_it_can_prove_to_be() -> None:
    seen = []

    def verify(key: bytes, signature: bytes, message: bytes) -> bool:
        seen.append((key, message))
        return signature == b"right"

    arguments = {"own": A, "nonce": NONCE, "admission": Admission(), "verify": verify}
    assert check_dialling(hello(B, signature=b"right"), **arguments) == B
    assert seen == [(B.ed25519_key, statement(A, NONCE, B))]
    with pytest.raises(PeerFault, match="cannot prove"):
        check_dialling(hello(B, signature=b"wrong"), **arguments)


def test_our_own_identity_elsewhere_is_refused_loudly() -> None:
    with pytest.raises(Refused, match="our identity"):
        check_accepting(hello(A), proven=A, own=A, admission=Admission())


def test_certificate_and_hello_must_name_the_same_peer() -> None:
    with pytest.raises(PeerFault, match="says hello as"):
        check_accepting(hello(C), proven=B, own=A, admission=Admission())


def test_cluster_key_admits_and_another_does_not() -> None:
    cluster = Admission(cluster_keys=[KEY])
    check_accepting(hello(B, proofs=cluster.proofs(B)), proven=B, own=A, admission=cluster)
    for proofs in (
        (),
        cluster.proofs(C),
        Admission(cluster_keys=[OLD_KEY]).proofs(B),
        (bytes(32), bytes(32)),
    ):
        with pytest.raises(Refused) as caught:
            check_accepting(hello(B, proofs=proofs), proven=B, own=A, admission=cluster)
        assert caught.value.reason is GoodbyeReason.NOT_ADMITTED


def test_key_rotation_needs_no_moment_without_a_cluster() -> None:
    old, both, new = (Admission(cluster_keys=keys) for keys in ([OLD_KEY], [KEY, OLD_KEY], [KEY]))
    for ours, theirs in ((old, both), (both, old), (both, new), (new, both)):
        assert ours.admits(B, theirs.proofs(B))
    assert not old.admits(B, new.proofs(B))


def test_allow_list_alone_closes_the_cluster() -> None:
    listed = Admission(allowed=[B])
    assert not listed.open
    assert listed.admits(B, ())
    assert not listed.admits(C, ())
    assert Admission(allowed=[B], cluster_keys=[KEY]).admits(C, Admission(cluster_keys=[KEY]).proofs(C))
    assert Admission().admits(C, ())


def test_keys_that_can_be_guessed_are_refused() -> None:
    with pytest.raises(ConfigError, match="guessed"):
        Admission(cluster_keys=[b"secret"])
    with pytest.raises(ConfigError, match="3 cluster keys"):
        Admission(cluster_keys=[KEY] * 3)


def test_values_that_cannot_be_are_programming_errors() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        PeerId.of_ed25519(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        statement(A, b"short", B)
    with pytest.raises(ConfigError):
        PeerId.parse("1" * 65)
    assert sorted([C, A, B]) == [A, B, C]


def test_who_is_admitted_may_change_while_everybody_holds_the_same_object() -> None:
    held, other = Admission(cluster_keys=[OLD_KEY]), Admission(cluster_keys=[KEY], allowed=[B])
    assert held != other
    held.adopt(other)
    assert held == other
    assert held.admits(B, ())
    assert held.admits(C, Admission(cluster_keys=[KEY]).proofs(C))
    assert not held.admits(C, Admission(cluster_keys=[OLD_KEY]).proofs(C))
    assert held != KEY


def test_what_admitted_peers_say_of_others_counts_unless_there_is_a_list_only() -> None:
    assert Admission().may_be_member(C.raw)
    assert Admission(cluster_keys=[KEY]).may_be_member(C.raw)
    listed = Admission(allowed=[B])
    assert (listed.may_be_member(B.raw), listed.may_be_member(C.raw)) == (True, False)
