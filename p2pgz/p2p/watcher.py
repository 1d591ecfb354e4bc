"""What the exchange tells others of its connections."""

from __future__ import annotations

from typing import Protocol

from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.connection import Connection


class NotTaken(SourceUnavailable):
    """A peer answered, and it was us who did not want the connection."""


class Watcher(Protocol):
    """Told of each connection."""

    def opened(self, connection: Connection) -> None:
        """A new one; it may have ended before it is run."""

    def ended(self, connection: Connection) -> None:
        """It is not among `connections` any more."""
