"""The start-up list of an image: which chunks were read first after a mount, in that order. Sans-io.

Recorded by `mount.startup`, kept and given to peers by `fetch.startup`, spent by `fetch.prefetch`. A chunk is named by its
layer's TOC and its number there. A list is a hint about order and nothing else: what it leads to is verified like any chunk,
and one that lies costs bytes that the image has anyway. docs/reference/wire.md and disk-format.md are the specification.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final

import msgspec

from p2pgz.core.digest import SHA256_BYTES, Digest
from p2pgz.core.messages import CHUNK_NUMBER_END
from p2pgz.errors import PeerFault, StateError

Spot = tuple[bytes, int]
"""the sha256 of a TOC, and the number of a chunk there"""

# What starts an image is some thousand chunks: `import` of everything that the python image has reads 3 000
CHUNKS_MAX: Final = 16_384
LAYERS_MAX: Final = 1024
# CHUNKS_MAX runs of one chunk each, and LAYERS_MAX layers
LIST_MAX_BYTES: Final = 320 << 10
# A chunk that so many recordings in a row did not see is forgotten. They count when they saw at least this share of the
# list: one that reads a few files of an image says nothing about how it starts.
AGE_MAX: Final = 5
AGING_SHARE: Final = 0.25
# Nothing new is read for so long: the image has started. Or it works all the time, and that is no start-up any more.
QUIET_SECONDS: Final = 10.0
PHASE_SECONDS: Final = 60.0

_FORMAT: Final = 1
_NAME: Final = b"p2pgz start-up list 1\0"


def name_of(manifest: Digest) -> Digest:
    """What peers ask for to get the list of an image; nothing has this digest."""
    return Digest.of(_NAME + manifest.raw)


# --- recording


class Recording:
    """The first reads of one mount: (segment, chunk) in order, while the image starts. Times are passed in."""

    def __init__(self) -> None:
        self.read: dict[tuple[int, int], None] = {}
        self._first_at = self._last_at = 0.0

    @property
    def full(self) -> bool:
        """Whether no more is taken."""
        return len(self.read) >= CHUNKS_MAX

    def note(self, segment: int, first: int, count: int, now: float) -> list[int]:
        """These chunks are read; returns those that were not before."""
        new = [n for n in range(first, first + count) if (segment, n) not in self.read]
        new = new[: CHUNKS_MAX - len(self.read)]
        if new:
            self._first_at = self._first_at if self.read else now
            self._last_at = now
            self.read.update(dict.fromkeys((segment, n) for n in new))
        return new

    def ends_at(self) -> float | None:
        """When the start-up is over, as things are; None while nothing was read."""
        if not self.read:
            return None
        return min(self._first_at + PHASE_SECONDS, self._last_at + QUIET_SECONDS)


# --- keeping


class StartUpList(msgspec.Struct, frozen=True):
    """What this host knows from its own mounts: chunks in order, each with the number of recordings since it was read."""

    ages: dict[Spot, int]
    recordings: int = 0

    @property
    def spots(self) -> list[Spot]:
        """The chunks in order."""
        return list(self.ages)


NOTHING: Final = StartUpList({})


def merged(known: StartUpList, read: Sequence[Spot]) -> StartUpList:
    """The list after another recording. Its order counts; what it did not see stays behind what it came after before.

    Not seen does not mean not needed: the kernel reads some bytes without telling anybody.
    """
    fresh = dict.fromkeys(read[:CHUNKS_MAX])
    older = int(len(known.ages.keys() & fresh.keys()) >= AGING_SHARE * len(known.ages))
    behind: dict[Spot | None, list[Spot]] = {}
    before: Spot | None = None
    for spot, age in known.ages.items():
        if spot in fresh:
            before = spot
        elif age + older <= AGE_MAX:
            behind.setdefault(before, []).append(spot)
    order = chain(behind.get(None, ()), *((spot, *behind.get(spot, ())) for spot in fresh))
    ages = {spot: 0 if spot in fresh else known.ages[spot] + older for spot in order}
    kept = {spot: ages[spot] for spot in list(ages)[:CHUNKS_MAX]}
    return StartUpList(kept, known.recordings + 1)


class _File(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: int
    list: bytes
    ages: bytes
    recordings: int


def to_file(known: StartUpList) -> bytes:
    """The list as it is kept: a sha256, then the rest."""
    file = _File(_FORMAT, to_bytes(known.spots), bytes(known.ages.values()), known.recordings)
    body = msgspec.msgpack.encode(file)
    return hashlib.sha256(body).digest() + body


def from_file(data: bytes) -> StartUpList:
    """The list that `to_file` wrote; raises StateError for anything else."""
    body = data[SHA256_BYTES:]
    try:
        if hashlib.sha256(body).digest() != data[:SHA256_BYTES]:
            raise ValueError("its checksum is wrong")
        file = msgspec.msgpack.decode(body, type=_File)
        spots = from_bytes(file.list)
        if file.format != _FORMAT or spots is None or len(spots) != len(file.ages):
            raise ValueError("another version wrote it")
    except (msgspec.MsgspecError, ValueError, RecursionError, PeerFault) as error:
        raise StateError(f"a start-up list cannot be read: {error}", hint="it is recorded again") from None
    return StartUpList(dict(zip(spots, file.ages, strict=True)), file.recordings)


# --- travelling


class _Document(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: int
    layers: list[bytes]
    runs: list[tuple[int, int, int]]
    """layer, first chunk, count"""


def to_bytes(spots: Sequence[Spot]) -> bytes:
    """The list as it travels; neighbours that follow each other are one run. Layers beyond LAYERS_MAX are left out."""
    layers: dict[bytes, int] = {}
    runs: list[tuple[int, int, int]] = []
    for toc, n in spots[:CHUNKS_MAX]:
        if toc not in layers and len(layers) >= LAYERS_MAX:
            continue
        layer = layers.setdefault(toc, len(layers))
        if runs and runs[-1][0] == layer and sum(runs[-1][1:]) == n:
            runs[-1] = (layer, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((layer, n, 1))
    return msgspec.msgpack.encode(_Document(_FORMAT, list(layers), runs))


def from_bytes(data: bytes) -> list[Spot] | None:
    """What somebody says the list is; None in a later version's words. Raises PeerFault for nonsense.

    Bounded before anything is unrolled: a few bytes could name 10 million chunks.
    """
    if len(data) > LIST_MAX_BYTES:
        raise PeerFault(f"a start-up list of {len(data)} bytes, the limit is {LIST_MAX_BYTES}")
    try:
        if msgspec.msgpack.decode(data, type=list)[:1] not in ([_FORMAT], []):
            return None
        document = msgspec.msgpack.decode(data, type=_Document)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise PeerFault("a start-up list that is malformed") from None
    layers = document.layers
    if len(layers) > LAYERS_MAX or any(len(toc) != SHA256_BYTES for toc in layers):
        raise PeerFault("a start-up list with layers that are none")
    if any(
        not 0 <= layer < len(layers) or first < 0 or count < 1 or first + count > CHUNK_NUMBER_END
        for layer, first, count in document.runs
    ):
        raise PeerFault("a start-up list with runs out of range")
    total = sum(count for _, _, count in document.runs)
    if total > CHUNKS_MAX:
        raise PeerFault(f"a start-up list of {total} chunks, the limit is {CHUNKS_MAX}")
    spots = [(layers[layer], n) for layer, first, count in document.runs for n in range(first, first + count)]
    if len(set(spots)) != total:
        raise PeerFault("a start-up list that names a chunk twice")
    return spots


def agreed(lists: Sequence[Sequence[Spot]], chunk_counts: Mapping[bytes, int]) -> list[Spot]:
    """One list of several hosts' ones: what at least half of them name first, each part in the order of its first mention.

    Chunks that the image does not have are left out.
    """
    votes = Counter(chain.from_iterable(lists))
    sound = [
        spot for spot in dict.fromkeys(chain.from_iterable(lists)) if spot[1] < chunk_counts.get(spot[0], 0)
    ]
    sound.sort(key=lambda spot: 2 * votes[spot] < len(lists))
    return sound[:CHUNKS_MAX]


def lies(spots: Sequence[Spot], chunk_counts: Mapping[bytes, int]) -> bool:
    """Whether a list names chunks that a TOC of the image does not have. TOCs that are not known here prove nothing."""
    return any(n >= chunk_counts.get(toc, CHUNK_NUMBER_END) for toc, n in spots)
