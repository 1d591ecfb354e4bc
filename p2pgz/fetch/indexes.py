"""What this host knows of the own indexes of plain layers: one small file for each diffID, and who signed what.

Kept by whoever opens plain layers, read by the exchange through `fetch.offers`. Only an index that has been checked against
its whole stream is told to peers: who passes on another's word could be made to lie. The documents themselves and the chunks
are the pool's. A file that cannot be read is as good as none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog
import trio

from p2pgz.core import indexclaim
from p2pgz.core.digest import Digest
from p2pgz.core.indexclaim import IndexClaim, statement
from p2pgz.core.messages import DOCUMENT_MAX_BYTES
from p2pgz.core.ownindex import PlainIndex
from p2pgz.core.peerid import PeerId
from p2pgz.errors import PoolFull
from p2pgz.pool.disk import write_durably
from p2pgz.pool.pool import Pool, Segment

log = structlog.get_logger(component="fetch")

# in the state directory
INDEXES: Final = "indexes"
RECORD_SUFFIX: Final = ".json"
LIE_SUFFIX: Final = ".lie"


class Maker(Protocol):
    """An identity that signs; `p2p.identity.Identity` is one."""

    @property
    def peer_id(self) -> PeerId:
        """Who signs."""
        ...

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        ...


class IndexRecord(msgspec.Struct, frozen=True):
    """What is known of a layer. `checked`: its whole stream has been seen, here, and the index says what is in it."""

    document: Digest
    document_bytes: int
    segment: Digest
    makers: dict[PeerId, bytes]
    checked: bool


class _File(msgspec.Struct, frozen=True):
    document: str
    document_bytes: int
    segment: str
    makers: dict[str, bytes]
    checked: bool


class PlainIndexes:
    """The records in `directory`. `maker` signs what this host has made or checked itself; None: nothing is signed."""

    def __init__(self, pool: Pool, directory: Path, maker: Maker | None = None) -> None:
        self._pool = pool
        self._directory = directory
        self._maker = maker
        self._diff_ids: dict[Digest, Digest] = {}

    def record(self, diff_id: Digest) -> IndexRecord | None:
        """What is known of a layer; a file of some hundred bytes is read each time."""
        try:
            found = msgspec.json.decode(self._path(diff_id).read_bytes(), type=_File)
            return IndexRecord(
                Digest.parse(found.document),
                found.document_bytes,
                Digest.parse(found.segment),
                {PeerId.parse(peer): signature for peer, signature in found.makers.items()},
                found.checked,
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  # whatever the disk made of it, it is made again
            log.warning("index.record_unusable", diff_id=str(diff_id), reason=str(error))
            return None

    async def load(self) -> None:
        """Read which segment is which layer; `diff_id_of` knows only new ones before."""

        def read() -> dict[Digest, Digest]:
            found = {}
            for path in self._directory.glob("*" + RECORD_SUFFIX):
                with suppress(ValueError):
                    diff_id = Digest(bytes.fromhex(path.stem))
                    record = self.record(diff_id)
                    if record is not None and record.checked:
                        found[record.segment] = diff_id
            return found

        self._diff_ids = {**await trio.to_thread.run_sync(read), **self._diff_ids}

    def diff_id_of(self, segment: Digest) -> Digest | None:
        """Which layer a segment is, if its index has been checked against the layer's whole stream."""
        return self._diff_ids.get(segment)

    def unchecked(self) -> Iterator[tuple[Digest, IndexRecord]]:
        """Layers of which there is only a trusted maker's word so far."""
        for path in self._directory.glob("*" + RECORD_SUFFIX):
            with suppress(ValueError):
                diff_id = Digest(bytes.fromhex(path.stem))
                record = self.record(diff_id)
                if record is not None and not record.checked:
                    yield diff_id, record

    async def keep(
        self, index: PlainIndex, segment: Digest, data: bytes, *, makers: dict[PeerId, bytes], checked: bool
    ) -> Digest:
        """Keep a document and what is known of it; returns its digest. A full disk costs others the sharing, no more."""
        document = await trio.to_thread.run_sync(Digest.of, data)
        record = IndexRecord(document, len(data), segment, dict(makers), checked)
        try:
            await self._pool.put_object(document, data)
            await self.write(index.toc.digest, record)
        except PoolFull as error:
            log.warning("index.not_kept", diff_id=str(index.toc.digest), reason=str(error))
        return document

    async def write(self, diff_id: Digest, record: IndexRecord) -> None:
        """Replace what is known of a layer. What this host has checked it signs, as if it had made it. Raises PoolFull."""
        makers = dict(record.makers)
        maker = self._maker

        def write() -> None:
            if record.checked and maker is not None and len(makers) < indexclaim.MAKERS_MAX:
                makers.setdefault(maker.peer_id, maker.sign(statement(diff_id, record.document)))
            names = {str(peer): signature for peer, signature in makers.items()}
            file = _File(
                str(record.document), record.document_bytes, str(record.segment), names, record.checked
            )
            self._directory.mkdir(mode=0o700, exist_ok=True)
            write_durably(self._path(diff_id), msgspec.json.encode(file))

        try:
            await trio.to_thread.run_sync(write)
        except OSError as error:
            raise PoolFull(f"{self._directory}: {error.strerror}") from error
        if record.checked:
            self._diff_ids[record.segment] = diff_id

    def claim(self, diff_id: Digest) -> tuple[Segment, Digest, bytes] | None:
        """What peers are told of a layer, with the segment and the document that it is about; None: nothing."""
        record = self.record(diff_id)
        if record is None or not record.checked or record.document_bytes > DOCUMENT_MAX_BYTES:
            return None
        segment = self._pool.segment(record.segment)
        if segment is None:
            return None
        claim = IndexClaim(record.document, record.document_bytes, record.makers)
        return segment, record.document, indexclaim.to_bytes(claim)

    def is_lie(self, segment: Digest) -> bool:
        """Whether the index that names this segment turned out to be none of its layer."""
        return self._lie_path(segment).exists()

    async def mark_lie(self, diff_id: Digest, record: IndexRecord) -> None:
        """Never use this index again."""

        def mark() -> None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            write_durably(self._lie_path(record.segment), str(diff_id).encode() + b"\n")
            self._path(diff_id).unlink(missing_ok=True)

        try:
            await trio.to_thread.run_sync(mark)
        except OSError as error:
            log.error("index.lie_not_kept", diff_id=str(diff_id), reason=str(error))

    def _path(self, diff_id: Digest) -> Path:
        return self._directory / (diff_id.hex + RECORD_SUFFIX)

    def _lie_path(self, segment: Digest) -> Path:
        return self._directory / (segment.hex + LIE_SUFFIX)
