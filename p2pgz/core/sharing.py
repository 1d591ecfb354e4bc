"""Who may see what: modes per repository, and how peers prove to each other that they know an image.

Images of mode `cluster` are for every admitted peer. Those of mode `proof` are for peers that have the image's manifest:
everything about them travels under names that only they can compute, and both ends of a connection prove that they can. A
name alone opens nothing, since a peer that was asked for it has seen it. Those of mode `none` never leave the host.
Pure functions and values, called by the exchange, `fetch.shares` and whoever opens images. Nothing here may tell a name
that is unknown from one whose proof is wrong. Design, section 6; docs/reference/wire.md has test vectors.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import translate
from typing import Final, NamedTuple

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.messages import NONCE_BYTES
from p2pgz.core.peerid import PeerId

_SALT: Final = b"p2pgz sharing 1"
_EXPAND: Final = b"image\x01"  # RFC 5869: info, then the number of the only block
_SWARM: Final = b"swarm\0"
_DOCUMENT: Final = b"document\0"
# what is proven: the asking end may join a swarm, the answering end shares it, the asking end may have a document
_JOIN_LABEL: Final = b"req\0"
_ANSWER_LABEL: Final = b"ans\0"
_DOCUMENT_LABEL: Final = b"doc\0"
# Stands in for the secret of a name that is unknown, so that both cases take the same work
_DECOY: Final = secrets.token_bytes(SHA256_BYTES)


class Mode(StrEnum):
    """With whom the images of a repository are shared."""

    CLUSTER = "cluster"
    PROOF = "proof"
    NONE = "none"


class Rule(NamedTuple):
    """Repositories by a glob over `registry/repository`, and their mode."""

    repository: str
    mode: Mode


class Policy:
    """The rules of the configuration: the first that matches counts, and without one the mode is `cluster`."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = [(re.compile(translate(rule.repository)), rule.mode) for rule in rules]

    def mode(self, repository: str) -> Mode:
        """The mode of a repository, as `Reference.name` spells it."""
        for pattern, mode in self._rules:
            if pattern.match(repository):
                return mode
        return Mode.CLUSTER


def image_secret(manifest: bytes) -> bytes:
    """S: HKDF-SHA-256 over the manifest. Who has its bytes has S; its digest, which is public, is of no use."""
    extracted = hmac.digest(_SALT, manifest, "sha256")
    return hmac.digest(extracted, _EXPAND, "sha256")


def swarm_name(secret: bytes, toc: bytes) -> bytes:
    """The name of a layer's swarm among those who know the image."""
    return hmac.digest(secret, _SWARM + toc, "sha256")


def document_name(secret: bytes, digest: bytes) -> bytes:
    """The name of a manifest, config or TOC among them."""
    return hmac.digest(secret, _DOCUMENT + digest, "sha256")


def private_domain(repository: str, manifest: Digest | None = None) -> str:
    """The dedup domain of what is not shared with everyone: one for each image of a repository.

    The repository is part of it: to know a manifest's digest must not be enough to read what another repository's owner
    has brought here. Without `manifest`: where the repository's manifests and indexes themselves are kept.
    """
    owner = hashlib.sha256(repository.encode("utf-8", "surrogateescape")).hexdigest()
    return f"private-{owner[:32]}" + (f"-{manifest.hex}" if manifest is not None else "")


class Proofs:
    """The proofs of one connection: bound to its two ends and to the nonces of their HELLOs, so of no use on another one.

    Each is HMAC(S, label ‖ asking id ‖ answering id ‖ nonce of the end that checks ‖ name), ids with a length byte.
    """

    def __init__(self, *, own: PeerId, own_nonce: bytes, peer: PeerId, peer_nonce: bytes) -> None:
        if len(own_nonce) != NONCE_BYTES or len(peer_nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        own_id, peer_id = (bytes([len(end.raw)]) + end.raw for end in (own, peer))
        self._to_peer = own_id + peer_id + peer_nonce
        self._from_peer = peer_id + own_id + own_nonce
        self._answer_to_peer = peer_id + own_id + peer_nonce
        self._answer_from_peer = own_id + peer_id + own_nonce

    def join(self, secret: bytes, swarm: bytes) -> bytes:
        """We ask for a swarm."""
        return _mac(secret, _JOIN_LABEL, self._to_peer, swarm)

    def document(self, secret: bytes, name: bytes) -> bytes:
        """We ask for a document."""
        return _mac(secret, _DOCUMENT_LABEL, self._to_peer, name)

    def answer(self, secret: bytes, swarm: bytes) -> bytes:
        """We share the swarm that the peer asked for."""
        return _mac(secret, _ANSWER_LABEL, self._answer_to_peer, swarm)

    def may_join(self, secret: bytes | None, swarm: bytes, proof: bytes) -> bool:
        """Whether the peer may join. `secret` is None for a swarm that we do not know; that takes as long."""
        return _check(secret, _JOIN_LABEL, self._from_peer, swarm, proof)

    def may_have(self, secret: bytes | None, name: bytes, proof: bytes) -> bool:
        """The same for a document."""
        return _check(secret, _DOCUMENT_LABEL, self._from_peer, name, proof)

    def shares(self, secret: bytes, swarm: bytes, proof: bytes) -> bool:
        """Whether the peer knows the image of the swarm that we asked for."""
        return _check(secret, _ANSWER_LABEL, self._answer_from_peer, swarm, proof)


def _mac(secret: bytes, label: bytes, ends: bytes, name: bytes) -> bytes:
    return hmac.digest(secret, label + ends + name, "sha256")


def _check(secret: bytes | None, label: bytes, ends: bytes, name: bytes, proof: bytes) -> bool:
    expected = _mac(_DECOY if secret is None else secret, label, ends, name)
    right = hmac.compare_digest(expected, proof)
    return right and secret is not None
