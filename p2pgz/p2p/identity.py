"""Who this node is: an Ed25519 key on disk, the peer id made from it, and the TLS contexts that prove it.

Called once at start. `identity.key` in the state directory is the raw 32-byte seed (RFC 8032), for the owner only.
`identity.machine` says on which machine it was made: a golden image that is cloned with its state directory makes a new
identity on each host, since two hosts of one identity would drive each other out. The private key never leaves this module
and the key of the TLS certificate never touches a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from p2pgz.core.peerid import PeerId
from p2pgz.errors import StateError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = structlog.get_logger(component="identity")

SEED_BYTES: Final = 32
KEY_FILE: Final = "identity.key"
MACHINE_FILE: Final = "identity.machine"
MACHINE_ID: Final = Path("/etc/machine-id")
ALPN: Final = "p2pgz/1"
# machine-id(5): it must not be given away, so only a hash of it with a purpose is written down
_MACHINE_PURPOSE: Final = b"p2pgz identity\0"


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """The key of this node. Made by `load_identity`, or from a seed for tests."""

    peer_id: PeerId
    seed: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a raw Ed25519 seed."""
        return cls(PeerId.of_ed25519(_private_key(seed).public_key().public_bytes_raw()), seed)

    @classmethod
    def new(cls) -> Identity:
        """A random one, not kept."""
        return cls.from_seed(secrets.token_bytes(SEED_BYTES))

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        return _private_key(self.seed).sign(message)

    def tls_contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Contexts for the accepting and the dialling end, TLS 1.3 only, with one new certificate.

        OpenSSL verifies nobody here: the dialling end must call `certificate.certified_peer`, the accepting end takes
        the proof from HELLO.
        """
        from p2pgz.p2p.certificate import make_certificate

        accepting = _context(ssl.PROTOCOL_TLS_SERVER)
        accepting.num_tickets = 0  # a resumed session would skip the certificate
        certificate, key = make_certificate(_private_key(self.seed))
        _load(accepting, certificate + key)
        return accepting, _context(ssl.PROTOCOL_TLS_CLIENT)


def load_identity(state_dir: Path, *, machine_id: Path = MACHINE_ID) -> Identity:
    """The identity kept in the state directory, or a new one; raises StateError. The caller holds the directory's lock."""
    key_path, machine_path = state_dir / KEY_FILE, state_dir / MACHINE_FILE
    machine = _machine(machine_id)
    try:
        seed = _read_seed(key_path)
        made_on = machine_path.read_text().strip() if machine_path.exists() else ""
        if seed is not None and made_on and machine and made_on != machine:
            log.warning(
                "identity.cloned",
                peer=str(Identity.from_seed(seed).peer_id),
                effect="the state directory comes from another machine: this node gets a new identity",
            )
            # first, so that a crash cannot leave the old key with this machine's name
            key_path.unlink()
            seed = None
        if seed is None or (machine and not made_on):
            _write(machine_path, machine.encode() + b"\n")
        if seed is None:
            seed = secrets.token_bytes(SEED_BYTES)
            _write(key_path, seed)
    except OSError as error:
        raise StateError(f"{key_path}: the node's identity cannot be kept: {error.strerror}") from error
    return Identity.from_seed(seed)


def _read_seed(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        seed = file.read(SEED_BYTES + 1)
    if mode & 0o077:
        raise StateError(
            f"{path} can be read by others than its owner",
            hint="chmod 600, or remove it: the node then makes a new identity",
        )
    if len(seed) != SEED_BYTES:
        raise StateError(
            f"{path} is no key: {len(seed)} bytes instead of {SEED_BYTES}",
            hint="remove it: the node then makes a new identity",
        )
    return seed


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once and durably, for the owner only."""
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _machine(path: Path) -> str:
    """A name for this machine; empty where it has no id (then keys are not bound)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return ""
    if not text or text == "uninitialized":
        return ""
    return hashlib.sha256(_MACHINE_PURPOSE + text.encode()).hexdigest()


def _private_key(seed: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    return context


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """`load_cert_chain` wants a path: give it one that is only in memory."""
    fd = os.memfd_create("p2pgz-certificate", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:  # a descriptor, not a path
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
