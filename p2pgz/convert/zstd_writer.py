"""zstd:chunked as stargz-snapshotter reads it: the members of eStargz as zstd frames, TOC and footer in skippable frames.

podman cannot read this dialect in parts and pulls such a layer whole; `containers_writer` has podman's. One layer cannot
be both: podman refuses one that has its own annotations and stargz-snapshotter's. Called by `layer`.
"""

from __future__ import annotations

import threading

import zstandard

from p2pgz.convert.packer import Compress
from p2pgz.convert.writer import END_OF_ARCHIVE, LayerWriter, WrittenLayer
from p2pgz.core.digest import Digest
from p2pgz.core.footer import SKIPPABLE_HEADER_BYTES, make_skippable_frame, make_zstd_sgz_footer
from p2pgz.core.toc import SGZ_CHECKSUM_ANNOTATION, SGZ_POSITION_ANNOTATION, TOC_DIGEST_ANNOTATION

_MANIFEST_TYPE = 1  # the only schema of TOCs


class StargzZstdWriter(LayerWriter):
    """The stream ends as a tar does; the TOC is no part of it."""

    def finish(self) -> WrittenLayer:
        self._packer.add(END_OF_ARCHIVE)
        toc_offset = self._packer.flush() + SKIPPABLE_HEADER_BYTES
        toc = self._toc_json()
        packed = bytes(self._packer.compress(toc))
        self._packer.write_raw(make_skippable_frame(packed))
        self._packer.write_raw(make_skippable_frame(make_zstd_sgz_footer(toc_offset, len(packed), len(toc))))
        position = f"{toc_offset}:{len(packed)}:{len(toc)}:{_MANIFEST_TYPE}"
        annotations = {
            TOC_DIGEST_ANNOTATION: str(Digest.of(toc)),
            SGZ_CHECKSUM_ANNOTATION: str(Digest.of(packed)),
            SGZ_POSITION_ANNOTATION: position,
        }
        return self._result(toc, annotations)


def zstd_compressor(level: int) -> Compress:
    """One zstd frame that states its content's size."""
    local = threading.local()  # a compressor holds a megabyte of tables and serves one thread at a time

    def compress(member: bytes) -> bytes:
        compressor: zstandard.ZstdCompressor | None = getattr(local, "compressor", None)
        if compressor is None:
            compressor = local.compressor = zstandard.ZstdCompressor(level=level)
        return compressor.compress(member)

    return compress
