"""Compression of chunks on the wire: when it pays, and how compressed bytes are let in.

Called by the two ends of the exchange. A peer's frame is looked at before a byte of it is decoded: it must state the size
that the TOC gives the chunk, so the output cannot be larger than what we asked for. The library's own limit is no guard:
it is ignored when the frame states a size (2 067 bytes became 64 MiB). RFC 8878; design, section 6.
"""

from __future__ import annotations

from typing import Final

import zstandard

from p2pgz.errors import ChunkCorrupt

LEVEL: Final = 1  # 387 MB/s at a ratio of .46 on our images; level 3 gives 237 MB/s for a few percent
WINDOW_MAX_BYTES: Final = 8 << 20
# below, the frame's own bytes and the thread cost more than the link saves
COMPRESS_FROM_BYTES: Final = 4 << 10
# above, compressing would hold a worker and twice the memory for long
COMPRESS_TO_BYTES: Final = 4 << 20
# The link is the narrow place when writes to it have waited this long
BLOCKED_FROM_SECONDS: Final = 0.005
RATIO_BELOW: Final = 0.8
_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def pays(*, size: int, toc_ratio: float, blocked_seconds: float, worker_idle: bool) -> bool:
    """Whether to compress a chunk of `size` bytes from a layer that its own writer compressed to `toc_ratio`."""
    return (
        worker_idle
        and COMPRESS_FROM_BYTES <= size <= COMPRESS_TO_BYTES
        and toc_ratio < RATIO_BELOW
        and blocked_seconds > BLOCKED_FROM_SECONDS
    )


def compress(data: bytes | bytearray | memoryview) -> bytes | None:
    """The chunk as one frame, or None when that is no smaller."""
    packed = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False).compress(
        data
    )
    return packed if len(packed) < len(data) else None


def decompress(packed: bytes | bytearray | memoryview, size: int, *, source: str) -> bytes:
    """The `size` bytes inside; raises ChunkCorrupt naming `source` for anything but one honest frame."""
    if len(packed) >= size:
        raise ChunkCorrupt(f"{source}: a compressed chunk that is no smaller than the chunk")
    try:
        frame = zstandard.get_frame_parameters(packed)
        honest = (
            bytes(packed[:4]) == _MAGIC
            and frame.content_size == size
            and frame.window_size <= WINDOW_MAX_BYTES
            and frame.dict_id == 0
        )
        if not honest:
            raise ChunkCorrupt(
                f"{source}: a zstd frame of {frame.content_size} bytes, window {frame.window_size}, "
                f"dictionary {frame.dict_id} for a chunk of {size} bytes"
            )
        decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX_BYTES)
        data = decoder.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChunkCorrupt(f"{source}: not one zstd frame: {error}") from None
    if (
        len(data) != size
    ):  # pragma: no cover  # this decoder notices by itself; another version of it might not
        raise ChunkCorrupt(f"{source}: {len(data)} bytes came out of a frame that states {size}")
    return data
