"""What an `fs` process tells its node about reads: each chunk once, when it is read first. Sans-io.

Used by `tree` and `segments` through the link of a mount, while the image starts: a node that has heard enough says so
(OBSERVE), and one that comes later did not ask. What the kernel has in its page cache is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from p2pgz.mount.channel import Kind, Record


class FirstReads:
    """The chunks of one mount that were read. `counts`: how many each segment has; `send` is the link's."""

    def __init__(self, counts: Sequence[int], send: Callable[[list[Record]], object]) -> None:
        self._counts = counts
        self._send = send
        self._seen: dict[int, bytearray] = {}

    def note(self, segment: int, chunks: Iterable[int]) -> None:
        """A read covers these chunks; tells of those that none did before, as runs."""
        seen = self._seen.get(segment)
        if seen is None:
            seen = self._seen[segment] = bytearray((self._counts[segment] + 7) >> 3)
        records: list[Record] = []
        for n in chunks:
            if seen[n >> 3] >> (n & 7) & 1:
                continue
            seen[n >> 3] |= 1 << (n & 7)
            if records and records[-1].first + records[-1].amount == n:
                records[-1] = records[-1]._replace(amount=records[-1].amount + 1)
            else:
                records.append(Record(Kind.OBSERVED, segment=segment, first=n, amount=1))
        if records:
            self._send(records)
