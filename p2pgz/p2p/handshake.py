"""From a TCP connection (or a libp2p stream) to two ends that know each other: TLS 1.3, then HELLO both ways.

Called by the exchange for connections that it dials and accepts, under a deadline of the caller's. Nothing of the pool is
within reach before both ids are proven and admitted. A TLS end without our ALPN is somebody else's (OpenSSL completes
the handshake all the same, so both ends look).
"""

from __future__ import annotations

import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from p2pgz.core.admission import Admission
from p2pgz.core.frames import encode
from p2pgz.core.hello import (
    FEATURES,
    HIGHEST_VERSION,
    LOWEST_VERSION,
    Agreement,
    Refused,
    agree,
    check_accepting,
    check_dialling,
    statement,
)
from p2pgz.core.messages import NONCE_BYTES, Feature, Goodbye, GoodbyeReason, Hello
from p2pgz.core.peerid import PeerId
from p2pgz.core.sharing import Proofs
from p2pgz.core.wire import AnyFrame, FrameReader
from p2pgz.errors import PeerFault, SourceUnavailable
from p2pgz.p2p.certificate import certified_peer, verify_signature
from p2pgz.p2p.identity import ALPN, Identity
from p2pgz.p2p.tls import TlsStream

# how long a refusal may take to leave; the peer may not be reading
_GOODBYE_SECONDS = 1.0


class WrongPeer(SourceUnavailable):
    """Somebody else answers at an address: neither of the two has done anything wrong."""


class Unproven(SourceUnavailable):
    """What answers at an address spoke out of turn before it had proven who it is: nobody can be blamed."""


class Ourselves(SourceUnavailable):
    """Our own identity answers at an address. `twin`: not this process, so the identity is on two hosts."""

    def __init__(self, *, twin: bool) -> None:
        if twin:
            super().__init__(
                "another node with our identity answers here",
                hint="identities must not be copied between hosts: remove identity.key on one of them",
            )
        else:
            super().__init__("this is our own address")
        self.twin = twin


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who we are, whom we let in, and what we speak."""

    identity: Identity
    admission: Admission
    accepting: ssl.SSLContext
    dialling: ssl.SSLContext
    features: Feature = FEATURES
    versions: tuple[int, int] = (LOWEST_VERSION, HIGHEST_VERSION)
    nonces: set[bytes] = field(default_factory=set)
    """those of the handshakes that we are accepting now: whoever shows us one of them is this process"""

    @classmethod
    def make(cls, identity: Identity, admission: Admission, features: Feature = FEATURES) -> Credentials:
        """With a new certificate."""
        accepting, dialling = identity.tls_contexts()
        return cls(
            identity=identity,
            admission=admission,
            accepting=accepting,
            dialling=dialling,
            features=features,
        )

    def hello(self, nonce: bytes, signature: bytes = b"") -> Hello:
        """Our HELLO."""
        own = self.identity.peer_id
        proofs = self.admission.proofs(own)
        return Hello(*self.versions, self.features, nonce, own.raw, signature, proofs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshaken:
    """A connection with a proven, admitted peer. `frames` came right behind its HELLO; `proofs` hold on it only."""

    stream: TlsStream
    peer: PeerId
    agreement: Agreement
    proofs: Proofs
    reader: FrameReader
    frames: list[AnyFrame]


async def accept(raw: trio.abc.Stream, credentials: Credentials) -> Handshaken:
    """The accepting end; raises PeerFault and its kin. Does not close the stream when it fails."""
    stream = TlsStream(raw, credentials.accepting, accepting=True)
    await _tls(stream)
    ours = credentials.hello(secrets.token_bytes(NONCE_BYTES))
    reader = FrameReader()
    credentials.nonces.add(ours.nonce)
    try:
        await stream.send_all(encode(ours))
        theirs, frames = await _receive_hello(stream, reader)
    finally:
        credentials.nonces.discard(ours.nonce)
    async with _telling(stream):
        agreement = agree(ours, theirs)
        peer = check_dialling(
            theirs,
            own=credentials.identity.peer_id,
            nonce=ours.nonce,
            admission=credentials.admission,
            verify=verify_signature,
        )
    own = credentials.identity.peer_id
    proofs = Proofs(own=own, own_nonce=ours.nonce, peer=peer, peer_nonce=theirs.nonce)
    return Handshaken(
        stream=stream, peer=peer, agreement=agreement, proofs=proofs, reader=reader, frames=frames
    )


async def dial(
    raw: trio.abc.Stream, credentials: Credentials, *, expected: PeerId | None = None
) -> Handshaken:
    """The dialling end. With `expected`, any other peer is refused before it learns anything of us.

    Raises Unproven, WrongPeer and Ourselves for what is no fault of the expected peer's.
    """
    stream = TlsStream(raw, credentials.dialling, accepting=False)
    try:
        await _tls(stream)
        certificate = stream.certificate
        if certificate is None:
            raise PeerFault("the peer showed no certificate")
        proven = certified_peer(certificate)
    except PeerFault as error:
        raise Unproven(error.what, hint=error.hint) from error
    if expected is not None and proven != expected:
        raise WrongPeer(
            f"peer {proven} answers where {expected} should be", hint="the address is out of date"
        )
    reader = FrameReader()
    theirs, frames = await _receive_hello(stream, reader)
    own = credentials.identity
    if proven == own.peer_id:
        raise Ourselves(twin=theirs.nonce not in credentials.nonces)
    signature = own.sign(statement(proven, theirs.nonce, own.peer_id))
    ours = credentials.hello(secrets.token_bytes(NONCE_BYTES), signature)
    async with _telling(stream):
        agreement = agree(ours, theirs)
        check_accepting(theirs, proven=proven, own=own.peer_id, admission=credentials.admission)
    # what we want may follow at once: if they refuse us, they say so instead of answering
    await stream.send_all(encode(ours))
    proofs = Proofs(own=own.peer_id, own_nonce=ours.nonce, peer=proven, peer_nonce=theirs.nonce)
    return Handshaken(
        stream=stream, peer=proven, agreement=agreement, proofs=proofs, reader=reader, frames=frames
    )


@asynccontextmanager
async def _telling(stream: TlsStream) -> AsyncIterator[None]:
    """Tell the peer when it is refused in the body."""
    refusal: Refused | None = None
    try:
        yield
    except Refused as error:
        refusal = error
    if refusal is not None:
        await say_goodbye(stream, refusal.reason)
        raise refusal


async def _tls(stream: TlsStream) -> None:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        raise SourceUnavailable(f"TLS handshake failed: {error}") from error
    if stream.protocol != ALPN:
        raise PeerFault(f"the other end does not speak {ALPN}", hint="is this the port of a p2pgz node?")


async def _receive_hello(stream: TlsStream, reader: FrameReader) -> tuple[Hello, list[AnyFrame]]:
    while True:
        try:
            data = await stream.receive()
        except trio.BrokenResourceError as error:
            raise SourceUnavailable("the connection broke before the peer said hello") from error
        if not data:
            raise SourceUnavailable("the peer closed the connection before it said hello")
        frames = reader.feed(data)
        if not frames:
            continue
        first, *rest = frames
        if isinstance(first, Goodbye):
            raise SourceUnavailable(f"the peer refused us: {first.reason.name.lower()} {first.text}".rstrip())
        assert isinstance(first, Hello)
        return first, rest


async def say_goodbye(stream: TlsStream, reason: GoodbyeReason, text: str = "") -> None:
    """Tell the peer why; it need not be listening."""
    with (
        trio.move_on_after(_GOODBYE_SECONDS),
        contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
    ):
        await stream.send_all(encode(Goodbye(reason, text)))
