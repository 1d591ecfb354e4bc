"""py-libp2p and we take each other's peer ids and certificates."""

from __future__ import annotations

import ssl
import warnings
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pgz.p2p.certificate import certified_peer, make_certificate
from p2pgz.p2p.identity import Identity

SEED = bytes(range(32))


@pytest.fixture(scope="module")
def libp2p() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        return pytest.importorskip("libp2p")


def test_same_seed_gives_the_same_peer_id(libp2p: Any) -> None:
    pair = libp2p.create_identity_from_seed(SEED)
    assert str(libp2p.generate_peer_id_from(pair)) == str(Identity.from_seed(SEED).peer_id)


def test_libp2p_takes_our_certificate(libp2p: Any) -> None:
    from libp2p.peer.id import ID
    from libp2p.security.tls.certificate import verify_certificate_chain

    pem, _ = make_certificate(Ed25519PrivateKey.from_private_bytes(SEED))
    key = verify_certificate_chain([x509.load_pem_x509_certificate(pem)])
    assert str(ID.from_pubkey(key)) == str(Identity.from_seed(SEED).peer_id)


def test_we_take_libp2ps_certificate(libp2p: Any) -> None:
    from libp2p.security.tls.certificate import create_cert_template, generate_certificate

    pair = libp2p.create_identity_from_seed(SEED)
    pem, _ = generate_certificate(pair.private_key, create_cert_template())
    assert certified_peer(ssl.PEM_cert_to_DER_cert(pem)) == Identity.from_seed(SEED).peer_id
