"""What to ask a source for next: plain decisions, no awaits, time and state passed in.

Called by `fetch.dispatch`. The currency is the compressed byte range: one request carries every wanted chunk near its
first one, and for a blocked read as much of the neighbourhood as costs about one round trip, because the files of a
directory are read together and stand together in the blob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Final


class Priority(IntEnum):
    """Classes of wanted chunks; a smaller one goes first and makes the others wait."""

    BLOCKED_READ = 0
    READ_AHEAD = 1
    START_UP = 2
    FILL = 3


# A hole of unwanted bytes up to this size is cheaper to transfer than a further request: about 2.5 ms at 100 Mbit/s, less
# than any round trip outside a rack.
GAP_BYTES: Final = 32 << 10
# The start-up list has been made into groups already (`startplan`): only padding between members is bridged
SEAM_BYTES: Final = 4 << 10
# The neighbourhood of a blocked read starts at 256 KiB (20 ms at 100 Mbit/s: one round trip to a region's registry) and
# follows the measured rate x delay within these bounds. Above 512 KiB the bytes cost more than the requests saved.
WINDOW_START_BYTES: Final = 256 << 10
WINDOW_MIN_BYTES: Final = 64 << 10
WINDOW_MAX_BYTES: Final = 512 << 10
# One request never carries more: a dropped connection loses at most this, and a blocked read waits behind at most this.
REQUEST_MAX_BYTES: Final = {
    Priority.BLOCKED_READ: 4 << 20,
    Priority.READ_AHEAD: 4 << 20,
    Priority.START_UP: 8 << 20,
    Priority.FILL: 8 << 20,
}
# Sequential readers: each chunk that follows its predecessor doubles the read-ahead, up to this many uncompressed bytes.
READ_AHEAD_MAX_BYTES: Final = 16 << 20
READ_AHEAD_MIN_BYTES: Final = 512 << 10
# Who has gone from the end of one file to the next so often will go on to further ones (tar, cp, grep); programs that start
# read a file here and one there
FILES_IN_A_ROW: Final = 3
# Chunks that are here already and may lie between the last missing one of a reader and the next
STEP_OVER_CHUNKS: Final = 64
# EWMA weight of a new sample: the last ~8 requests count
LINK_SAMPLE_WEIGHT: Final = 0.125
# The smallest delay is the network's; a larger one is mostly a busy host's, here or there, and counts this little
DELAY_RISE_WEIGHT: Final = 1 / 256


class LinkEstimate:
    """Delay to the first byte and rate of a source, as exponentially weighted means of its requests."""

    __slots__ = ("bytes_per_second", "delay_seconds", "first_byte_seconds")

    def __init__(self) -> None:
        self.first_byte_seconds = 0.0
        self.delay_seconds = 0.0
        """the smallest of late: what a request costs when nobody is busy"""
        self.bytes_per_second = 0.0

    def sample(self, first_byte_seconds: float, body_bytes: int, body_seconds: float) -> None:
        """Count one answered request. Bodies under 64 KiB say nothing about the rate."""
        self.first_byte_seconds = _mean(self.first_byte_seconds, first_byte_seconds)
        longer = first_byte_seconds - self.delay_seconds
        if not self.delay_seconds or longer < 0:
            self.delay_seconds = first_byte_seconds
        else:
            self.delay_seconds += DELAY_RISE_WEIGHT * longer
        if body_bytes >= 64 << 10 and body_seconds > 0:
            self.bytes_per_second = _mean(self.bytes_per_second, body_bytes / body_seconds)

    def window_bytes(self) -> int:
        """How many compressed bytes cost about as much as the round trip of one request."""
        if not self.bytes_per_second or not self.delay_seconds:
            return WINDOW_START_BYTES
        product = int(self.bytes_per_second * self.delay_seconds)
        return max(WINDOW_MIN_BYTES, min(WINDOW_MAX_BYTES, product))


def _mean(old: float, new: float) -> float:
    return new if not old else old + LINK_SAMPLE_WEIGHT * (new - old)


class BlobOrder:
    """The chunks of a segment in the order of their blob bytes: who stands beside whom."""

    __slots__ = ("chunk_at", "rank_of")

    def __init__(self, blob_offset: Sequence[int], inner: Sequence[int]) -> None:
        count = len(blob_offset)
        in_order = all(
            (blob_offset[n], inner[n]) <= (blob_offset[n + 1], inner[n + 1]) for n in range(count - 1)
        )
        self.chunk_at: Sequence[int] = (
            range(count) if in_order else sorted(range(count), key=lambda n: (blob_offset[n], inner[n]))
        )
        self.rank_of: Sequence[int] = self.chunk_at if in_order else _inverse(self.chunk_at)


def _inverse(permutation: Sequence[int]) -> Sequence[int]:
    inverse = [0] * len(permutation)
    for rank, n in enumerate(permutation):
        inverse[n] = rank
    return inverse


def choose(
    order: BlobOrder,
    blob_offset: Sequence[int],
    blob_end: Sequence[int],
    seed: int,
    priority: Priority,
    wanted: Mapping[int, Priority],
    absent: Callable[[int], bool],
    window_bytes: int,
) -> list[int]:
    """The chunks to fetch with one request that starts at chunk `seed`, in blob order.

    Forward of the seed come chunks that somebody wants, and absent ones inside `window_bytes` (0: none), until a hole
    of more than GAP_BYTES (SEAM_BYTES for the start-up list), or the request's limit for this class. A chunk that shares
    the seed's member comes for free.
    """
    start, end = blob_offset[seed], blob_end[seed]
    gap_bytes = SEAM_BYTES if priority is Priority.START_UP else GAP_BYTES
    limit = start + REQUEST_MAX_BYTES[priority]
    chosen = [seed]
    for rank in range(order.rank_of[seed] + 1, len(order.chunk_at)):
        n = order.chunk_at[rank]
        if blob_offset[n] - end > gap_bytes:
            break
        same_member = blob_end[n] <= end
        if not same_member:
            if blob_end[n] > limit:
                break
            near = blob_end[n] - start <= window_bytes
            if not near and n not in wanted:
                # nobody wants it and it is far: the next wanted one behind it may still be near enough to `end`
                if blob_end[n] - end > gap_bytes:
                    break
                continue
        if absent(n):
            chosen.append(n)
            end = max(end, blob_end[n])
    return chosen


class SequentialReads:
    """Recognises readers that go through a file, or one file after the other, chunk by chunk, and says how far to read
    ahead of them.

    Hears of chunks that were missing only: what came as somebody's neighbour or by read-ahead is stepped over. Keeps the
    last few positions; a forgotten reader starts again with the smallest read-ahead.
    """

    POSITIONS: Final = 64

    __slots__ = ("_next",)

    def __init__(self) -> None:
        # first chunk that would continue a reader -> its read-ahead in bytes, and how many files it has gone on to
        self._next: dict[int, tuple[int, int]] = {}

    def ahead(
        self,
        first: int,
        count: int,
        size: Sequence[int],
        contiguous: Callable[[int], bool],
        present: Callable[[int], bool],
    ) -> int:
        """How many chunks after first+count to read ahead for the demand [first, first+count).

        `contiguous(n)` says whether chunk n goes on where chunk n - 1 ends (the same file), `present(n)` whether it is here.
        """
        budget, files = self._reader_at(first, contiguous, present)
        end = first + count
        following = min(READ_AHEAD_MAX_BYTES, max(READ_AHEAD_MIN_BYTES, 2 * budget))
        self._next[end] = following, files
        if len(self._next) > self.POSITIONS:
            del self._next[next(iter(self._next))]
        ahead = 0
        while budget > 0 and end + ahead < len(size):
            if files < FILES_IN_A_ROW and not contiguous(end + ahead):
                break
            budget -= size[end + ahead]
            ahead += 1
        return ahead

    def _reader_at(
        self, first: int, contiguous: Callable[[int], bool], present: Callable[[int], bool]
    ) -> tuple[int, int]:
        """Forget the reader that has come to this chunk; its read-ahead, and its files with this chunk's counted."""
        at = first
        while at not in self._next:
            at -= 1
            if at < 0 or first - at > STEP_OVER_CHUNKS or not present(at):
                return 0, 0
        budget, files = self._next.pop(at)
        return budget, files + sum(not contiguous(n) for n in range(max(1, at), first + 1))
