"""What a seed does next: plain decisions about images that a node keeps whole for others. Time and chance are arguments.

Called by `node.seeding`. A seed is named by reference and platform. It comes from the configuration, for as long as it
stands there, or from a command, until another one takes it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from p2pgz.core.digest import Digest

FROM_CONFIG: Final = "config"
FROM_COMMAND: Final = "command"
# A registry that is restarted is back within seconds; one that is down for the night is asked every five minutes
RETRY_START_SECONDS: Final = 2.0
RETRY_MAX_SECONDS: Final = 300.0
# Many nodes may follow the same tag: they must not all ask at the same moment
JITTER_SHARE: Final = 0.2
# A rate over less jumps with every batch, over more it does not show a stall
RATE_WINDOW_SECONDS: Final = 5.0


class SeedKey(NamedTuple):
    """Names a seed."""

    reference: str
    platform: str

    @property
    def owner(self) -> str:
        """Whose its pins are."""
        return f"seed {self.reference} {self.platform}"


class Start(NamedTuple):
    """What a node begins with."""

    new: list[SeedKey]
    """configured, and not on record yet"""
    dropped: list[SeedKey]
    """on record because they were configured once, and are not any more"""


def at_start(recorded: Mapping[SeedKey, str], configured: Collection[SeedKey]) -> Start:
    """Compare the record (seed → origin) with the configuration. What a command has asked for stays."""
    return Start(
        new=[key for key in dict.fromkeys(configured) if key not in recorded],
        dropped=[key for key, origin in recorded.items() if origin == FROM_CONFIG and key not in configured],
    )


def unneeded(pinned: Iterable[Digest], complete: Digest) -> list[Digest]:
    """What a seed need not keep any more, now that it has all of `complete`; before that it keeps everything."""
    return [digest for digest in pinned if digest != complete]


def retry_seconds(failures: int, chance: float) -> float:
    """How long to wait after so many failures in a row (1 and more); `chance` is from 0 to 1."""
    whole = min(RETRY_MAX_SECONDS, RETRY_START_SECONDS * 2.0 ** min(failures - 1, 16))
    return spread(whole, chance)


def spread(seconds: float, chance: float) -> float:
    """A wait of about this long, so that many who began together do not stay together."""
    return seconds * (1 - JITTER_SHARE / 2 + JITTER_SHARE * chance)


class Rate:
    """Bytes per second over the last moments, from totals."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, total_bytes: int) -> float:
        """Note a total; the rate since the oldest one in the window."""
        self._samples.append((now, total_bytes))
        while len(self._samples) > 2 and self._samples[0][0] < now - RATE_WINDOW_SECONDS:
            self._samples.popleft()
        begun, before = self._samples[0]
        return (total_bytes - before) / (now - begun) if now > begun else 0.0
