"""The key on disk, and the certificate made from it."""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pgz.errors import PeerFault, StateError
from p2pgz.p2p.certificate import EXTENSION, certified_peer, make_certificate, verify_signature
from p2pgz.p2p.identity import ALPN, KEY_FILE, MACHINE_FILE, Identity, load_identity


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


def der(identity: Identity) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem, _ = make_certificate(Ed25519PrivateKey.from_private_bytes(identity.seed))
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def test_identity_stays_the_same_and_is_for_its_owner(state: Path, machine: Path) -> None:
    first = load_identity(state, machine_id=machine)
    assert load_identity(state, machine_id=machine) == first
    assert stat.S_IMODE((state / KEY_FILE).stat().st_mode) == 0o600
    assert (state / KEY_FILE).read_bytes() == first.seed
    assert first.seed.hex() not in repr(first)
    assert sorted(os.listdir(state)) == [KEY_FILE, MACHINE_FILE]


def test_machine_id_itself_is_not_written_down(state: Path, machine: Path) -> None:
    load_identity(state, machine_id=machine)
    assert machine.read_text().strip() not in (state / MACHINE_FILE).read_text()


def test_cloned_host_makes_a_new_identity(state: Path, machine: Path) -> None:
    first = load_identity(state, machine_id=machine)
    machine.write_text("another\n")
    second = load_identity(state, machine_id=machine)
    assert second != first
    assert load_identity(state, machine_id=machine) == second


def test_crash_between_the_two_files_keeps_no_old_key(state: Path, machine: Path) -> None:
    first = load_identity(state, machine_id=machine)
    (state / KEY_FILE).unlink()
    assert load_identity(state, machine_id=machine) != first


def test_given_key_is_used_and_bound_to_this_machine(state: Path, machine: Path) -> None:
    (state / KEY_FILE).write_bytes(bytes(range(32)))
    (state / KEY_FILE).chmod(0o600)
    assert load_identity(state, machine_id=machine) == Identity.from_seed(bytes(range(32)))
    assert (state / MACHINE_FILE).exists()


def test_machine_without_an_id_keeps_its_key(state: Path, tmp_path: Path) -> None:
    first = load_identity(state, machine_id=tmp_path / "none")
    assert load_identity(state, machine_id=tmp_path / "none") == first


def test_key_that_others_can_read_is_refused(state: Path, machine: Path) -> None:
    load_identity(state, machine_id=machine)
    (state / KEY_FILE).chmod(0o640)
    with pytest.raises(StateError, match="read by others"):
        load_identity(state, machine_id=machine)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_damaged_key_is_refused(state: Path, machine: Path, content: bytes) -> None:
    (state / KEY_FILE).write_bytes(content)
    (state / KEY_FILE).chmod(0o600)
    with pytest.raises(StateError, match="no key"):
        load_identity(state, machine_id=machine)


def test_signatures_verify() -> None:
    identity = Identity.new()
    key = identity.peer_id.ed25519_key
    assert key is not None
    assert verify_signature(key, identity.sign(b"text"), b"text")
    assert not verify_signature(key, identity.sign(b"text"), b"other")
    assert not verify_signature(bytes(31), identity.sign(b"text"), b"text")
    assert not verify_signature(key, b"", b"text")


def handshake(accepting: ssl.SSLContext, dialling: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = accepting.wrap_bio(to_server, to_client, server_side=True)
    client = dialling.wrap_bio(to_client, to_server)
    done = set()
    while len(done) < 2:
        for end in (client, server):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    return server, client


def test_tls_proves_the_peer_id_and_is_1_3_with_our_alpn() -> None:
    identity = Identity.new()
    accepting, _ = identity.tls_contexts()
    _, dialling = Identity.new().tls_contexts()
    server, client = handshake(accepting, dialling)
    certificate = client.getpeercert(binary_form=True)
    assert certificate is not None
    assert certified_peer(certificate) == identity.peer_id
    assert {end.version() for end in (server, client)} == {"TLSv1.3"}
    assert {end.selected_alpn_protocol() for end in (server, client)} == {ALPN}


def test_two_certificates_of_one_identity_have_keys_of_their_own() -> None:
    identity = Identity.new()
    a, b = (x509.load_der_x509_certificate(der(identity)).public_key() for _ in range(2))
    assert a != b


def foreign(value: bytes | None, *, critical: bytes | None = None, other_signer: bool = False) -> bytes:
    """A certificate with any extension value."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    import datetime

    now = datetime.datetime(2024, 1, 1)
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now.replace(year=2025))
    if value is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(EXTENSION, value), critical=False)
    if critical is not None:
        oid = x509.ObjectIdentifier("1.2.3.4")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, critical), critical=True)
    signer = ec.generate_private_key(ec.SECP256R1()) if other_signer else key
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def extension_of(certificate: bytes) -> bytes:
    value = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_oid(EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def test_extension_copied_from_another_certificate_proves_nothing() -> None:
    with pytest.raises(PeerFault, match="not made by"):
        certified_peer(foreign(extension_of(der(Identity.new()))))


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (foreign(None), "without a libp2p identity"),
        (foreign(b""), "malformed identity"),
        (foreign(b"\x30\x04\x04\x00\x04\x00"), "no Ed25519 key"),
        (foreign(extension_of(der(Identity.new())) + b"x"), "bytes after"),
        (foreign(None, critical=b"x"), "unknown critical"),
        (foreign(None, other_signer=True), "not signed by its own key"),
        (b"", "malformed"),
        (bytes(9000), "limit"),
    ],
)
def test_certificates_that_prove_nothing_are_faults(certificate: bytes, reason: str) -> None:
    with pytest.raises(PeerFault, match=reason):
        certified_peer(certificate)


CERTIFICATE = der(Identity.from_seed(bytes(32)))


@settings(max_examples=200)
@given(st.integers(0, len(CERTIFICATE) - 1), st.integers(1, 255))
@example(12, 1)  # another X.509 version
def test_damaged_certificates_prove_no_other_peer(at: int, change: int) -> None:
    damaged = bytearray(CERTIFICATE)
    damaged[at] ^= change
    with contextlib.suppress(PeerFault):  # a few bits of the encoding say nothing
        assert certified_peer(bytes(damaged)) == Identity.from_seed(bytes(32)).peer_id
