"""Two hosts with one identity, as a third one sees them. Called by the DHT with what peers greet with; pure.

Each process greets with an epoch that it has drawn at its start. Another epoch means that a peer has restarted; one that
comes back after another cannot: both processes are there.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

# of more restarts than this between two greetings of a twin nothing is noticed, until it greets once more
EPOCHS_KEPT: Final = 4
PEERS_MAX: Final = 4096


class Twins:
    """The last epochs of each peer."""

    def __init__(self) -> None:
        self._epochs: OrderedDict[bytes, list[bytes]] = OrderedDict()
        self.found: set[bytes] = set()
        """peers whose identity is on two hosts"""

    def note(self, peer: bytes, epoch: bytes) -> bool:
        """A peer greets; true when that shows, for the first time, that it is two."""
        known = self._epochs.setdefault(peer, [])
        self._epochs.move_to_end(peer)
        if len(self._epochs) > PEERS_MAX:
            gone, _ = self._epochs.popitem(last=False)
            self.found.discard(gone)
        if known[-1:] == [epoch]:
            return False
        came_back = epoch in known
        known.append(epoch)
        del known[:-EPOCHS_KEPT]
        if not came_back or peer in self.found:
            return False
        self.found.add(peer)
        return True
