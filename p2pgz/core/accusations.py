"""Who says that whom is dead: two reports are enough, and who is wrong too often is not believed for a while.

Owned by `core.membership`. A report is signed and names the stamp of the entry that it is about, so that it says nothing of
a member that has signed since.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from p2pgz.core.crowdmsg import Down

REPORTERS: Final = 2
REPORT_SECONDS: Final = 30.0
WRONG_MAX: Final = 4
WRONG_SECONDS: Final = 600.0
ACCUSED_MAX: Final = 4096
REPORTERS_MAX: Final = 1024


class Accusations:
    """Reports that are not settled, and how often their authors were wrong."""

    def __init__(self) -> None:
        self._reports: dict[bytes, dict[bytes, tuple[Down, float]]] = {}
        self._wrong: dict[bytes, tuple[int, float]] = {}

    def has(self, down: Down) -> bool:
        """Whether this report is known."""
        return down.reporter in self._reports.get(down.peer, {})

    def add(self, down: Down, others: int, now: float) -> tuple[Down, ...]:
        """Take a checked report; returns all of them when they are enough. `others` could have made one."""
        reports = self._reports.setdefault(down.peer, {})
        for reporter in [r for r, (_, at) in reports.items() if now - at > REPORT_SECONDS]:
            del reports[reporter]
        reports[down.reporter] = (down, now)
        # two nodes are a cluster, too: then the other one's word is enough
        if len(reports) >= min(REPORTERS, others):
            del self._reports[down.peer]
            return tuple(report for report, _ in reports.values())
        if len(self._reports) > ACCUSED_MAX:
            del self._reports[next(iter(self._reports))]
        return ()

    def refuted(self, peer: bytes, believed: Iterable[Down], now: float) -> None:
        """The member has signed anew: these reports, and those that were not enough yet, were wrong."""
        reporters = {down.reporter for down in believed}.union(self._reports.pop(peer, ()))
        for reporter in reporters:
            times, since = self._wrong.pop(reporter, (0, now))
            if now - since >= WRONG_SECONDS:
                times, since = 0, now
            self._wrong[reporter] = (times + 1, since)
        while len(self._wrong) > REPORTERS_MAX:
            del self._wrong[next(iter(self._wrong))]

    def believes(self, reporter: bytes, now: float) -> bool:
        """Whether its reports count."""
        times, since = self._wrong.get(reporter, (0, 0.0))
        return times < WRONG_MAX or now - since >= WRONG_SECONDS
