"""The routing table: a few peers from each distance, so that every walk halves its way (kad-dht spec, "routing table").

Buckets are by shared prefix with our own key, of fixed size and never split, so that the table stays small however many
hosts there are. Only peers that answered, or that we know to be servers, get in. Times are the caller's monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pgz.core.keyspace import Contact, ContactSet, kad_key, shared_bits

BUCKET_PEERS = 20  # kad-dht spec: k
SPARE_PEERS = (
    10  # per bucket: who takes the place of one that fails; half a bucket survives a rolling restart
)
STALE_AFTER_SECONDS = 30 * 60.0  # an entry not heard from for so long gives way to a peer that was
MAX_FAILURES = (
    2  # one failed query may be the network's; go-libp2p evicts at once, and refills by its refresh
)


class _Entry:
    __slots__ = ("contact", "failures", "seen")

    def __init__(self, contact: Contact, now: float) -> None:
        self.contact = contact
        self.seen = now
        self.failures = 0


class RoutingTable:
    """Up to `BUCKET_PEERS` peers for every length of prefix shared with us."""

    def __init__(self, own: bytes) -> None:
        self._own = kad_key(own)
        self._live = ContactSet()
        self._buckets: dict[int, dict[bytes, _Entry]] = {}
        self._spare: dict[int, dict[bytes, Contact]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._live)

    def seen(self, contact: Contact, now: float) -> bool:
        """A server was heard from; true if it is new in the table. One that finds no room waits among the spares."""
        key = kad_key(contact.peer)
        if key == self._own or not contact.addresses:
            return False
        bits = shared_bits(key, self._own)
        bucket = self._buckets.setdefault(bits, {})
        entry = bucket.get(contact.peer)
        if entry is not None:
            entry.seen, entry.failures = now, 0
            if entry.contact != contact:
                entry.contact = contact
                self._live.put(contact)
            return False
        if len(bucket) >= BUCKET_PEERS:
            oldest = min(bucket.values(), key=lambda each: each.seen)
            if now - oldest.seen < STALE_AFTER_SECONDS:
                spare = self._spare.setdefault(bits, {})
                spare.pop(contact.peer, None)
                spare[contact.peer] = contact
                if len(spare) > SPARE_PEERS:
                    del spare[next(iter(spare))]
                return False
            self._drop(bits, oldest.contact.peer)
        self._insert(bits, contact, now)
        return True

    def failed(self, peer: bytes, now: float) -> bool:
        """A query to a peer failed; true if that cost it its place (a spare then takes it)."""
        bits = shared_bits(kad_key(peer), self._own)
        self._spare.get(bits, {}).pop(peer, None)
        entry = self._buckets.get(bits, {}).get(peer)
        if entry is None:
            return False
        entry.failures += 1
        if entry.failures < MAX_FAILURES:
            return False
        self._drop(bits, peer)
        spare = self._spare.get(bits)
        if spare:
            _, contact = spare.popitem()  # heard of last
            self._insert(bits, contact, now)
        return True

    def discard(self, peer: bytes) -> None:
        """Forget a peer at once (it left, or is not admitted)."""
        bits = shared_bits(kad_key(peer), self._own)
        self._spare.get(bits, {}).pop(peer, None)
        if peer in self._buckets.get(bits, {}):
            self._drop(bits, peer)

    def get(self, peer: bytes) -> Contact | None:
        """A peer of the table."""
        return self._live.get(peer)

    def closest(self, target: int, count: int) -> list[Contact]:
        """The closest peers of the table to a key."""
        return self._live.closest(target, count)

    def contacts(self) -> ContactSet:
        """All peers of the table; not to be changed by the caller."""
        return self._live

    def thin_buckets(self, deepest: int) -> list[int]:
        """The prefix lengths up to the deepest one in use that have room: a walk there may find more peers."""
        used = max(self._buckets, default=0)
        return [
            bits for bits in range(min(used, deepest) + 1) if len(self._buckets.get(bits, ())) < BUCKET_PEERS
        ]

    def _insert(self, bits: int, contact: Contact, now: float) -> None:
        self._buckets[bits][contact.peer] = _Entry(contact, now)
        self._live.put(contact)
        self._spare.get(bits, {}).pop(contact.peer, None)

    def _drop(self, bits: int, peer: bytes) -> None:
        del self._buckets[bits][peer]
        self._live.discard(peer)
