"""TLS certificates that carry a libp2p identity (libp2p specs, "TLS Handshake").

A certificate has a key of its own, made for this process. An extension holds the identity's public key and its signature
over the certificate's key; so TLS proves the one key and the extension binds it to the peer id. No authority signs
anything, and dates are not looked at: a clock that jumps must not cut a host off, and the key dies with its process.
"""

from __future__ import annotations

import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID, ObjectIdentifier

from p2pgz.core.peerid import ED25519_KEY_PREFIX, PeerId
from p2pgz.errors import PeerFault

EXTENSION: Final = ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
_LABEL: Final = b"libp2p-tls-handshake:"
# what others write into the dates must not be judged by our clock, nor ours by theirs
_NOT_BEFORE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER: Final = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
# a certificate of ours has 500 bytes, one with an RSA key of 4 096 bits about 2 000
CERTIFICATE_MAX_BYTES: Final = 8 << 10
_SEQUENCE: Final = 0x30
_OCTETS: Final = 0x04


def make_certificate(identity: ed25519.Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """A certificate and its private key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = identity.public_key().public_bytes_raw()
    signature = identity.sign(_LABEL + _key_info(key.public_key()))
    value = _der(_SEQUENCE, _der(_OCTETS, ED25519_KEY_PREFIX + public) + _der(_OCTETS, signature))
    name = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, str(PeerId.of_ed25519(public))[-20:])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.UnrecognizedExtension(EXTENSION, value), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def certified_peer(der: bytes) -> PeerId:
    """The peer id that a certificate proves, given that TLS has proven its key; raises PeerFault."""
    if len(der) > CERTIFICATE_MAX_BYTES:
        raise PeerFault(f"a certificate of {len(der)} bytes, the limit is {CERTIFICATE_MAX_BYTES}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        extensions = list(certificate.extensions)
        certificate.verify_directly_issued_by(certificate)
        key_info = _key_info(certificate.public_key())
    except Exception:  # noqa: BLE001  # a dozen types for malformed certificates, some of them directly below Exception
        raise PeerFault("a certificate that is malformed or not signed by its own key") from None
    value = None
    for extension in extensions:
        if extension.oid == EXTENSION and isinstance(extension.value, x509.UnrecognizedExtension):
            value = extension.value.value
        elif extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
            raise PeerFault(
                f"a certificate with the unknown critical extension {extension.oid.dotted_string}"
            )
    if value is None:
        raise PeerFault("a certificate without a libp2p identity", hint="something else answers on this port")
    public_key, signature = _signed_key(value)
    if not public_key.startswith(ED25519_KEY_PREFIX):
        raise PeerFault(
            "a certificate whose identity is no Ed25519 key", hint="the exchange knows no other keys"
        )
    raw_key = public_key[len(ED25519_KEY_PREFIX) :]
    try:
        peer = PeerId.of_ed25519(raw_key)
    except ValueError:
        raise PeerFault("a certificate with a malformed identity") from None
    if not verify_signature(raw_key, signature, _LABEL + key_info):
        raise PeerFault(f"a certificate that was not made by {peer}, whom it names")
    return peer


def verify_signature(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an Ed25519 signature is right."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _key_info(key: object) -> bytes:
    """SubjectPublicKeyInfo of a public key, DER."""
    der: bytes = key.public_bytes(  # type: ignore[attr-defined]  # every kind of public key has it, their union no name
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _signed_key(value: bytes) -> tuple[bytes, bytes]:
    """SignedKey ::= SEQUENCE { publicKey OCTET STRING, signature OCTET STRING }."""
    content, rest = _read(_SEQUENCE, value)
    public_key, after = _read(_OCTETS, content)
    signature, end = _read(_OCTETS, after)
    if rest or end:
        raise PeerFault("a certificate with bytes after its identity")
    return public_key, signature


def _read(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The content of a DER value and what follows it."""
    if len(data) >= 2 and data[0] == tag:
        at, size = 2, data[1]
        if size & 0x80:
            at += size & 0x7F
            size = int.from_bytes(data[2:at], "big")
        if at <= 4 and at + size <= len(data):
            return data[at : at + size], data[at + size :]
    raise PeerFault("a certificate with a malformed identity")
