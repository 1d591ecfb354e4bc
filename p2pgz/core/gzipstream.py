"""The codec for one gzip member, chosen by the member's first bytes.

For `core.members` (chunks) and `core.decompress` (whole layers). It must never choose the fast codec for a header that
it misreads. RFC 1952, 2.3.1.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final, Protocol, cast

from isal import isal_zlib
from isal.igzip_lib import IsalError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The choice needs this much of a member: magic, method and flags
GZIP_CHOICE_BYTES: Final = 4
GZIP_ERRORS: Final[tuple[type[Exception], ...]] = (IsalError, zlib.error, ValueError)  # type: ignore[assignment]  # isal's stub declares an instance
# zlib's number for "gzip header and trailer, 32 KiB window"
_GZIP_WBITS: Final = 31
_FLAGS_AT: Final = 3
_FLAG_EXTRA: Final = 4


class GzipStream(Protocol):
    """What isal's and zlib's decompression objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: Buffer, max_length: int, /) -> bytes: ...


def gzip_stream(head: memoryview | bytes) -> GzipStream:
    """The codec for the member that starts with `head`, of which GZIP_CHOICE_BYTES or more must be there.

    isal is twice as fast, but loses its place when a header with a file name and comment, or with a checksum,
    arrives in pieces. No layer writer makes such headers, but gzip(1) does.
    """
    if head[_FLAGS_AT] & ~_FLAG_EXTRA:
        return zlib.decompressobj(_GZIP_WBITS)
    return cast("GzipStream", isal_zlib.decompressobj(_GZIP_WBITS))
