"""Provider records: who says that it has what a key names, for how long, and when our own are due again.

Records are hearsay and cheap to make, hence a bound on everything. A record lives an hour; whoever still has the object
sends it again every half hour or so, at an instant of its own choosing, so that a cluster that started together does not
renew together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from p2pgz.core.keyspace import Contact

EXPIRES_AFTER_SECONDS = 60 * 60.0
RENEW_AFTER_SECONDS = 30 * 60.0
RENEW_SPREAD = 0.2  # +- of the renewal period
MAX_KEY_BYTES = 80  # kad-dht spec, ADD_PROVIDER as go-libp2p checks it
MAX_PROVIDERS_PER_KEY = 64  # three answers' worth; the one that is oldest gives way
MAX_KEYS_PER_PEER = 20_000  # TOCs, manifests and configs of a thousand images of ten layers
MAX_RECORDS = 100_000  # about 20 MB


class _Record:
    __slots__ = ("contact", "expires")

    def __init__(self, contact: Contact, expires: float) -> None:
        self.contact = contact
        self.expires = expires


class ProviderStore:
    """What other peers told us to keep. Times are the caller's monotonic seconds."""

    def __init__(self) -> None:
        self._keys: dict[bytes, dict[bytes, _Record]] = {}
        self._keys_of: dict[bytes, int] = {}
        self._records = 0

    def __len__(self) -> int:
        return self._records

    def add(self, key: bytes, contact: Contact, now: float) -> bool:
        """Keep or renew a record; false when a limit stands against it."""
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return False
        records = self._keys.get(key)
        if records is not None and contact.peer in records:
            records[contact.peer] = _Record(contact, now + EXPIRES_AFTER_SECONDS)
            return True
        if self._keys_of.get(contact.peer, 0) >= MAX_KEYS_PER_PEER:
            return False
        if records is not None and len(records) >= MAX_PROVIDERS_PER_KEY:
            self.remove(key, min(records, key=lambda peer: records[peer].expires))
        elif self._records >= MAX_RECORDS:
            return False
        self._keys.setdefault(key, {})[contact.peer] = _Record(contact, now + EXPIRES_AFTER_SECONDS)
        self._keys_of[contact.peer] = self._keys_of.get(contact.peer, 0) + 1
        self._records += 1
        return True

    def remove(self, key: bytes, peer: bytes) -> None:
        """Forget a record: withdrawn by its peer, or expired."""
        records = self._keys.get(key)
        if records is None or records.pop(peer, None) is None:
            return
        self._records -= 1
        if not records:
            del self._keys[key]
        self._keys_of[peer] -= 1
        if not self._keys_of[peer]:
            del self._keys_of[peer]

    def providers(self, key: bytes, now: float) -> list[Contact]:
        """Who provides a key, renewed last first."""
        records = [record for record in self._keys.get(key, {}).values() if record.expires > now]
        return [record.contact for record in sorted(records, key=lambda each: -each.expires)]

    def sweep(self, now: float) -> int:
        """Forget what has expired; returns how many records that was."""
        gone = [
            (key, peer)
            for key, records in self._keys.items()
            for peer, record in records.items()
            if record.expires <= now
        ]
        for key, peer in gone:
            self.remove(key, peer)
        return len(gone)


class Renewals:
    """When each of our own keys is to be announced again. `random` gives numbers in [0, 1)."""

    def __init__(self, random: Callable[[], float], *, period_seconds: float = RENEW_AFTER_SECONDS) -> None:
        self._random = random
        self._period = period_seconds
        self._due: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: bytes) -> bool:
        return key in self._due

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self._due))

    def add(self, key: bytes, now: float) -> None:
        """Announce a key for the first time: it is due at once."""
        if key not in self._due:
            self._set(key, now)

    def remove(self, key: bytes) -> None:
        """The key is not ours to announce any more."""
        self._due.pop(key, None)

    def due(self, now: float) -> list[bytes]:
        """The keys whose time has come; each is due again a period later."""
        keys = []
        while self._heap and self._heap[0][0] <= now:
            at, key = heapq.heappop(self._heap)
            if self._due.get(key) == at:
                spread = 1 + RENEW_SPREAD * (2 * self._random() - 1)
                self._set(key, now + self._period * spread)
                keys.append(key)
        return keys

    def retry(self, key: bytes, at: float) -> None:
        """The announcement failed: try again at `at`, if it is still wanted."""
        if key in self._due:
            self._set(key, at)

    def next_due(self) -> float | None:
        """When `due` will have something to say; None: never."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _set(self, key: bytes, at: float) -> None:
        self._due[key] = at
        heapq.heappush(self._heap, (at, key))
