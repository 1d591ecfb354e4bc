"""Digests, the names of everything in p2pgz, and their CIDs.

Only sha256 is accepted: the TOC formats fix it (eStargz spec, "TOC"), and one algorithm leaves no room for downgrades.
Hot paths carry the 32 raw bytes; `Digest` is the value for documents, errors and people.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pgz.errors import ImageInvalid

if TYPE_CHECKING:
    from multiformats import CID
    from typing_extensions import Buffer

SHA256_BYTES = 32
# multihash table: 0x12 = sha2-256, then the length; built by hand since the library costs 39 us a call
SHA256_MULTIHASH_PREFIX = b"\x12\x20"
_TEXT = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Digest:
    """A sha256 digest. `str()` gives `sha256:<64 lower-case hex digits>`."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != SHA256_BYTES:
            raise ValueError(f"a sha256 digest has {SHA256_BYTES} bytes, not {len(self.raw)}")

    @classmethod
    def parse(cls, text: object, *, where: str = "digest") -> Digest:
        """Parse `sha256:…` exactly (OCI image spec, "Digests"); raises ImageInvalid naming `where`."""
        if not isinstance(text, str) or not _TEXT.match(text):
            shown = repr(text) if not isinstance(text, str) or len(text) <= 80 else repr(text[:77] + "...")
            raise ImageInvalid(f"{where}: {shown} is not a sha256 digest in lower case")
        return cls(bytes.fromhex(text[7:]))

    @classmethod
    def of(cls, data: Buffer) -> Digest:
        """The digest of some bytes."""
        return cls(hashlib.sha256(data).digest())

    @classmethod
    def parse_any(cls, text: str) -> Digest:
        """Parse what a person may type: `sha256:…`, 64 hex digits, or a CID by sha2-256 of any codec and base."""
        if re.fullmatch(r"[0-9a-f]{64}", text):
            return cls(bytes.fromhex(text))
        if text.startswith("sha256:"):
            return cls.parse(text)
        return cls.from_cid(text)

    @classmethod
    def from_cid(cls, text: str) -> Digest:
        """The digest inside a CID; raises ImageInvalid for any other text.

        The codec says how bytes are to be read, not which they are: the same digest names them under each of them.
        """
        from multiformats import CID

        try:
            cid = CID.decode(text)
            multihash = bytes(cid.digest)
        except Exception as error:  # the library raises a dozen types for malformed text
            raise ImageInvalid(f"{text[:80]!r} is neither a sha256 digest nor a CID") from error
        if multihash[:2] != SHA256_MULTIHASH_PREFIX or len(multihash) != 2 + SHA256_BYTES:
            raise ImageInvalid(f"{text[:80]!r} is a CID, but not one by sha2-256")
        return cls(multihash[2:])

    @property
    def hex(self) -> str:
        """The 64 hex digits: the name of files and URLs made from this digest."""
        return self.raw.hex()

    @property
    def multihash(self) -> bytes:
        """The multihash: the DHT key of what this digest names."""
        return SHA256_MULTIHASH_PREFIX + self.raw

    def cid(self) -> CID:
        """CIDv1, raw codec, base32: `bafkrei…`."""
        from multiformats import CID

        return CID("base32", 1, "raw", self.multihash)

    def __str__(self) -> str:
        return f"sha256:{self.raw.hex()}"
