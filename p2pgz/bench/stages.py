"""The stages that a byte passes on its way from a source to the pool, each by itself on one core.

What a mount can reach at the most: the slowest of them, or their sum where one core does all.
"""

from __future__ import annotations

import os
import random
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import deflate
import zstandard

from p2pgz.core.digest import Digest
from p2pgz.core.members import MemberInflater
from p2pgz.core.verify import verify
from p2pgz.p2p.identity import Identity

MIB: Final = 1 << 20
CHUNK_BYTES: Final = MIB
# long enough for a clock of this resolution and short enough that nobody waits
STAGE_SECONDS: Final = 0.5
# what programs and libraries compress to, about
COMPRESSIBLE_SHARE: Final = 0.6
SEED: Final = 7
# written, then synced: what a pool commits in about a second
SYNCED_CHUNKS: Final = 64


class Stage(NamedTuple):
    """One row of the table."""

    name: str
    bytes_per_second: float
    """of uncompressed bytes"""


def sample() -> bytes:
    """A chunk that compresses to a half, the same each time."""
    rng = random.Random(SEED)  # noqa: S311  # for bytes, not for secrets
    parts: list[bytes] = []
    size = 0
    while size < CHUNK_BYTES:
        part = rng.randbytes(512) if rng.random() > COMPRESSIBLE_SHARE else bytes([rng.randrange(256)]) * 512
        parts.append(part)
        size += len(part)
    return b"".join(parts)[:CHUNK_BYTES]


def measure(directory: Path, *, seconds: float = STAGE_SECONDS) -> list[Stage]:
    """Run each stage for `seconds`; `directory` is on the disk that is written to."""
    chunk = sample()
    gzip = bytes(deflate.gzip_compress(chunk, 6))
    zstd = zstandard.ZstdCompressor(level=3).compress(chunk)
    digest = Digest.of(chunk).raw

    def inflate_gzip() -> None:
        MemberInflater("gzip", [(0, len(chunk))]).feed(gzip)

    def inflate_zstd() -> None:
        MemberInflater("zstd", [(0, len(chunk))]).feed(zstd)

    def check() -> None:
        verify(digest, chunk, source="bench")

    tls = _Tls()
    stages = [
        Stage("inflate gzip", _rate(inflate_gzip, seconds)),
        Stage("inflate zstd", _rate(inflate_zstd, seconds)),
        Stage("sha256", _rate(check, seconds)),
        Stage("TLS, both ends", _rate(lambda: tls.carry(chunk), seconds)),
    ]
    with tempfile.TemporaryFile(dir=directory) as file:
        at = 0

        def write() -> None:
            nonlocal at
            os.pwrite(file.fileno(), chunk, at)
            at += len(chunk)

        stages.append(Stage("write", _rate(write, seconds)))
        os.fdatasync(file.fileno())
        began, start_at = time.perf_counter(), at
        for _ in range(SYNCED_CHUNKS):
            write()
        os.fdatasync(file.fileno())
        stages.append(Stage("write, until on disk", (at - start_at) / (time.perf_counter() - began)))
    return stages


def _rate(step: Callable[[], None], seconds: float) -> float:
    step()
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        step()
        count += 1
    return count * CHUNK_BYTES / took


class _Tls:
    """Two ends of TLS 1.3 that talk through memory."""

    def __init__(self) -> None:
        accepting, dialling = Identity.new().tls_contexts()
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._sender = accepting.wrap_bio(up, down, server_side=True)
        self._receiver = dialling.wrap_bio(down, up)
        done = False
        while not done:
            received = self._shake(self._receiver)
            done = self._shake(self._sender) and received

    @staticmethod
    def _shake(end: ssl.SSLObject) -> bool:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def carry(self, data: bytes) -> None:
        self._sender.write(data)
        left = len(data)
        while left:
            left -= len(self._receiver.read(left))
