"""What this host tells the DHT: every TOC with chunks here, every open document, and the layers that nobody converted.

Driven by `fetch.discovery` every few seconds: compares what the pool has with what has been announced, in steps that hold
up nobody. Only what `fetch.shares` says is for every peer is named. Chunks are found by way of their TOC (`p2p.announce`),
and announced one by one only on demand (`peers.provide`), which is for small sets.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
import trio

from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX, Digest
from p2pgz.core.model import ChunkKind
from p2pgz.fetch.shares import Shares
from p2pgz.pool.pool import Pool, Segment
from p2pgz.pool.segment import SHARED_DOMAIN

if TYPE_CHECKING:
    from p2pgz.p2p.dht import Dht

log = structlog.get_logger(component="peers")

# how often what the pool has is compared with what is announced
ANNOUNCED_EVERY_SECONDS: Final = 5.0
# 5 us each, but 0.2 ms for one that has to be opened
SEGMENTS_BETWEEN_CHECKPOINTS: Final = 20
# An open segment has five descriptors: with this share of the limit they take a third of it
FILES_PER_SEGMENT: Final = 15
OPEN_SEGMENTS_MAX: Final = 20_000
# With `provide = "chunk"`. Each key is a walk every half hour: at this number one a second, all day, for one host
CHUNK_KEYS_MAX: Final = 2000
# A TOC that fills is pointed at again once it has a quarter more chunks, but not more often than this
GROWN_SHARE: Final = 1.25
GROWN_SECONDS: Final = 300.0

LayerNames = Callable[[Digest], Sequence[Digest]]
"""under which other digests a segment is asked for: diffID and blob digest of a plain layer"""


class _Told(NamedTuple):
    """What the DHT knows of a segment."""

    chunks: int
    complete: bool
    at: float
    names: tuple[bytes, ...]
    """further keys under which it is announced"""


class Announcing:
    """What one node announces. `provide_chunks`: each chunk by itself, too."""

    def __init__(
        self,
        pool: Pool,
        shares: Shares,
        *,
        provide_chunks: bool = False,
        layer_names: LayerNames = lambda segment: (),
    ) -> None:
        self._pool = pool
        self._shares = shares
        self._provide_chunks = provide_chunks
        self._layer_names = layer_names
        self._told: dict[Digest, _Told] = {}
        self._documents: set[Digest] = set()
        self._chunk_keys: set[bytes] = set()
        self._too_many = False
        self._left_out = 0

    def begin(self) -> None:
        """A new DHT knows nothing of us yet."""
        self._told, self._documents, self._chunk_keys = {}, set(), set()

    async def compare(self, dht: Dht) -> None:
        """Announce what is new, withdraw what is gone."""
        seen = set()
        open_now = self._pool.segments()
        opened = {segment.id for segment in open_now if segment.domain == SHARED_DOMAIN}
        room = open_segments_max() - len(open_now)
        left_out = 0
        for number, name in enumerate(self._shares.open_segments(), 1):
            if number % SEGMENTS_BETWEEN_CHECKPOINTS == 0:
                await trio.lowlevel.checkpoint()
            if name not in opened:
                if room <= 0:
                    left_out += 1
                    continue
                room -= 1
            if self._segment(dht, name):
                seen.add(name)
        if left_out > self._left_out:
            log.warning(
                "peers.not_all_announced",
                layers=left_out,
                effect="layers that nothing has used since the start are not announced",
                hint="raise the limit of open files (LimitNOFILE= of the service)",
            )
        self._left_out = left_out
        for name in self._told.keys() - seen:
            self._withdraw(dht, name)
        self._compare_documents(dht)
        if self._provide_chunks:
            await self._compare_chunks(dht)
        await trio.lowlevel.checkpoint()

    def _segment(self, dht: Dht, name: Digest) -> bool:
        """Whether there is anything of it here, after it has been announced as it is now."""
        segment = self._pool.segment(name)
        present = segment.presence.present_count() if segment is not None else 0
        if segment is None or not present:
            return False
        complete = is_complete(segment)
        told = self._told.get(name)
        now = trio.current_time()
        grown = (
            told is not None
            and not complete
            and present >= told.chunks * GROWN_SHARE
            and now >= told.at + GROWN_SECONDS
        )
        if told is not None and told.complete == complete and not grown:
            return True
        names = told.names if told is not None else ()
        if told is None:
            dht.announcer.provide(name.multihash)
        if complete and not names:  # only the whole of it is what its other names stand for
            names = tuple(other.multihash for other in self._layer_names(name))
            for key in names:
                dht.announcer.provide(key)
        dht.announcer.hold(name.raw, self._digests_of(name), complete=complete, grown=grown)
        self._told[name] = _Told(present, complete, now, names)
        return True

    def _digests_of(self, name: Digest) -> Callable[[], Iterator[bytes]]:
        def digests() -> Iterator[bytes]:
            segment = self._pool.segment(name)
            if segment is not None:
                table, has = segment.table, segment.presence.has
                yield from (table.digest(n) for n in range(table.chunk_count) if has(n))

        return digests

    def _withdraw(self, dht: Dht, name: Digest) -> None:
        told = self._told.pop(name)
        for key in (name.multihash, *told.names):
            dht.announcer.withdraw(key)
        dht.announcer.drop(name.raw)

    def _compare_documents(self, dht: Dht) -> None:
        # a TOC with chunks here is in `_told`
        documents = set(self._shares.open_documents()) - self._told.keys()
        for digest in documents - self._documents:
            dht.announcer.provide(digest.multihash)
        for digest in self._documents - documents - self._told.keys():
            dht.announcer.withdraw(digest.multihash)
        self._documents = documents

    async def _compare_chunks(self, dht: Dht) -> None:
        found = await self._chunks()
        if found is None and not self._too_many:
            log.warning(
                "peers.too_many_chunks",
                limit=CHUNK_KEYS_MAX,
                effect="chunks are not announced one by one; they are found by way of their TOCs",
                hint='peers.provide = "toc"',
            )
        self._too_many = found is None
        keys = found or set()
        for key in keys - self._chunk_keys:
            dht.announcer.provide(key)
        for key in self._chunk_keys - keys:
            dht.announcer.withdraw(key)
        self._chunk_keys = keys

    async def _chunks(self) -> set[bytes] | None:
        """The keys of all chunks here; None when they are too many to announce."""
        if sum(told.chunks for told in self._told.values()) > CHUNK_KEYS_MAX:
            return None
        keys: set[bytes] = set()
        for name in list(self._told):
            keys.update(SHA256_MULTIHASH_PREFIX + digest for digest in self._digests_of(name)())
            await trio.lowlevel.checkpoint()
        return keys if len(keys) <= CHUNK_KEYS_MAX else None


def open_segments_max() -> int:
    """How many segments may be open for others' sake: files must be left for readers and connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        OPEN_SEGMENTS_MAX
        if soft == resource.RLIM_INFINITY
        else min(OPEN_SEGMENTS_MAX, soft // FILES_PER_SEGMENT)
    )


def is_complete(segment: Segment) -> bool:
    """Whether all of it is here; chunks of zeros need nobody."""
    kind, count = segment.table.kind, segment.table.chunk_count
    if segment.presence.present_count() + bytes(kind).count(ChunkKind.ZEROS) < count:
        return False
    return all(kind[n] == ChunkKind.ZEROS for n in segment.presence.missing(0, count))
