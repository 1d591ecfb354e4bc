"""The name of a whole file's bytes, by which a file that some segment already holds is found again.

The pool records each file of a segment under its key; building a merged tree asks for the keys of a layer's
files, and refers to what is there instead of fetching it again. The key is made of chunk digests only, so it
says as much as they do.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.model import Chunk

_SIZE = struct.Struct("<Q")
# Not sha256: a file of one chunk whose content is another file's list of sizes and digests would get that
# file's key, and an image that has such a file could put it in the place of another image's.
_PERSON = b"p2pgz file"


class FileRef(NamedTuple):
    """A complete file in a segment: where its bytes begin and which chunks they are."""

    segment: Digest
    segment_offset: int
    first_chunk: int
    chunk_count: int


SharedFiles = Callable[[list[bytes]], dict[bytes, FileRef]]
"""Answers content keys with files that are completely present; keys it does not know are left out."""


def content_key(chunks: Sequence[Chunk]) -> bytes:
    """The key (32 bytes) of a file: its only chunk's digest, else one over its chunks' sizes and digests.

    The sizes are in it because the same bytes cut elsewhere are other chunks, which another segment's table
    could not serve.
    """
    if len(chunks) == 1:
        return chunks[0].digest
    hasher = hashlib.blake2b(digest_size=SHA256_BYTES, person=_PERSON)
    for chunk in chunks:
        hasher.update(_SIZE.pack(chunk.size) + chunk.digest)
    return hasher.digest()
