"""Peer ids: who a node is, made from its Ed25519 public key as libp2p does (libp2p specs, "Peer Ids and Keys").

Called by everything that names peers. A peer id is a multihash of the protobuf-encoded public key; keys of up to 42
encoded bytes are not hashed but carried whole (multihash "identity"), so that an Ed25519 peer id *is* the key. Text
form: base58btc, `12D3KooW…`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2pgz.errors import ConfigError

ED25519_KEY_BYTES: Final = 32
# protobuf PublicKey{Type = 1 (Ed25519), Data = 32 bytes}: field 1 varint, field 2 with its length
ED25519_KEY_PREFIX: Final = b"\x08\x01\x12\x20"
# multihash: code 0x00 (identity), length 36 = the four bytes above and the key
_IDENTITY_PREFIX: Final = b"\x00\x24"
# sha2-256 multihash: how peers with RSA keys are named
_SHA256_PREFIX: Final = b"\x12\x20"
PEER_ID_MAX_BYTES: Final = 2 + 42
# bitcoin's alphabet: no 0, O, I and l
_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES: Final = {letter: value for value, letter in enumerate(_ALPHABET)}
# 44 bytes give at most 61 letters; longer text is not looked at, since base58 takes time in the square of the length
_TEXT_MAX_LETTERS: Final = 64


@dataclass(frozen=True, slots=True)
class PeerId:
    """A peer id, as its multihash. `str()` gives the base58 text; order is that of the bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        head, size = self.raw[:2], len(self.raw)
        hashed = head == _SHA256_PREFIX and size == 34
        whole = size > 2 and head[0] == 0 and head[1] == size - 2 and size <= PEER_ID_MAX_BYTES
        if not hashed and not whole:
            raise ValueError(f"{self.raw.hex()} is not a peer id")

    @classmethod
    def of_ed25519(cls, public_key: bytes) -> PeerId:
        """The peer id of a raw Ed25519 public key."""
        if len(public_key) != ED25519_KEY_BYTES:
            raise ValueError(f"an Ed25519 public key has {ED25519_KEY_BYTES} bytes, not {len(public_key)}")
        return cls(_IDENTITY_PREFIX + ED25519_KEY_PREFIX + public_key)

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Parse `12D3KooW…` or `Qm…`; raises ConfigError, since only people write peer ids as text."""
        try:
            return cls(base58_decode(text))
        except ValueError:
            raise ConfigError(
                f"{text[:80]!r} is not a peer id", hint="it looks like 12D3KooW…; `p2pgz status` prints it"
            ) from None

    @property
    def ed25519_key(self) -> bytes | None:
        """The public key inside, or None for peers with keys of another kind."""
        head = _IDENTITY_PREFIX + ED25519_KEY_PREFIX
        if self.raw.startswith(head) and len(self.raw) == len(head) + ED25519_KEY_BYTES:
            return self.raw[len(head) :]
        return None

    def __str__(self) -> str:
        return base58_encode(self.raw)

    def __lt__(self, other: PeerId) -> bool:
        return self.raw < other.raw


def base58_encode(data: bytes) -> str:
    """Base58 with bitcoin's alphabet; each leading zero byte becomes a `1`."""
    zeros = len(data) - len(data.lstrip(b"\0"))
    number = int.from_bytes(data, "big")
    letters = []
    while number:
        number, value = divmod(number, 58)
        letters.append(_ALPHABET[value])
    return "1" * zeros + "".join(reversed(letters))


def base58_decode(text: str) -> bytes:
    """Undo `base58_encode`; raises ValueError."""
    if len(text) > _TEXT_MAX_LETTERS:
        raise ValueError("too long")
    number = 0
    for letter in text:
        if letter not in _VALUES:
            raise ValueError(f"{letter!r} is no base58 letter")
        number = number * 58 + _VALUES[letter]
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
