"""Layers that are lazy on a trusted maker's word: checked like any other once all of them is here.

Run by the node beside everything else. Until then their indexes are not told to peers. When the stream is not what the maker
signed, it is said loudly, nothing of the layer is read any more, the index is never used again, and its makers are not
believed until the node starts anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import structlog
import trio

from p2pgz.core import indexdoc
from p2pgz.core.digest import Digest
from p2pgz.core.indexcheck import IndexCheck
from p2pgz.core.model import ChunkKind
from p2pgz.core.verify import verify
from p2pgz.errors import ChunkCorrupt, ImageInvalid, P2pgzError
from p2pgz.fetch.indexes import IndexRecord, PlainIndexes
from p2pgz.fetch.plainshare import PlainShare
from p2pgz.fetch.spool import numbered_chunks
from p2pgz.pool.disk import read_fully
from p2pgz.pool.pool import Pool
from p2pgz.pool.segment import Segment

log = structlog.get_logger(component="fetch")

# How soon it is noticed that all of a layer is here
LOOK_SECONDS: Final = 2.0

Refuse = Callable[[Segment, P2pgzError], None]


class SignedLayers:
    """`run` it. `refuse` is to make every further read of a segment fail with the error."""

    def __init__(self, pool: Pool, indexes: PlainIndexes, share: PlainShare, refuse: Refuse) -> None:
        self._pool = pool
        self._indexes = indexes
        self._share = share
        self._refuse = refuse
        self._wake = trio.Event()
        share.on_signed = self._woken

    def _woken(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """For ever; asleep while there is nothing to check."""
        while True:
            self._wake = trio.Event()
            pending = await trio.to_thread.run_sync(lambda: list(self._indexes.unchecked()))
            for diff_id, record in pending:
                try:
                    await self._look(diff_id, record)
                except P2pgzError as error:
                    log.warning("plain.not_checked", diff_id=str(diff_id), reason=str(error))
            with trio.move_on_after(LOOK_SECONDS if pending else float("inf")):
                await self._wake.wait()

    async def _look(self, diff_id: Digest, record: IndexRecord) -> None:
        segment = self._pool.segment(record.segment)
        if segment is None:
            return
        kind, presence = segment.table.kind, segment.presence
        if any(kind[n] == ChunkKind.DATA for n in presence.missing(0, segment.table.chunk_count)):
            return
        data = await self._pool.get_object(record.document)
        if data is None:
            return
        try:
            await trio.to_thread.run_sync(_check, segment, data)
        except ChunkCorrupt as error:  # the disk, or an eviction under our hands: not the maker's fault
            log.info("plain.not_checked", diff_id=str(diff_id), reason=error.what)
        except ImageInvalid as error:
            await self._lied(diff_id, record, segment, error)
        else:
            await self._indexes.write(diff_id, msgspec.structs.replace(record, checked=True))
            log.info("plain.checked", diff_id=str(diff_id), bytes=segment.held_bytes)

    async def _lied(
        self, diff_id: Digest, record: IndexRecord, segment: Segment, error: ImageInvalid
    ) -> None:
        makers = [str(peer) for peer in record.makers]
        log.error(
            "plain.maker_lied", diff_id=str(diff_id), makers=makers, reason=error.what,
            effect="files of this layer that were read may have been wrong; it is not read any more",
            hint="remove the makers from peers.trusted_indexers, and mount the image again",
        )  # fmt: skip
        self._share.distrust(record.makers)
        await self._indexes.mark_lie(diff_id, record)
        refusal = ImageInvalid(
            f"layer with diff id {diff_id}: the index that {', '.join(makers)} signed is a lie: {error.what}",
            hint="remove the makers from peers.trusted_indexers, and mount the image again",
        )
        self._refuse(segment, refusal)


def _check(segment: Segment, data: bytes) -> None:
    """Hash and index the whole stream from the segment's file. Blocks for 2 ms per MiB."""
    index = indexdoc.from_bytes(data)
    check = IndexCheck(index)
    table = segment.table
    for n, _ in numbered_chunks(index.toc):
        try:
            payload = read_fully(segment.data_fd, table.size[n], table.segment_offset[n])
        except OSError as error:
            raise ChunkCorrupt(f"{segment.path}: {error.strerror}") from error
        verify(table.digest(n), payload, source=str(segment.path))
        check.take(payload)
    check.finish()
