"""The key space of the DHT: who is close to what (Kademlia's XOR metric over sha256, as libp2p's kad-dht spec fixes it).

Used by the routing table, by lookups and by the pointers. Everything is an integer of 256 bits here; the name that was
hashed (a peer id, or the multihash of a digest) travels on the wire.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import msgspec

KEY_BITS = 256  # sha256
# A run of this many keys is sorted by distance at once rather than split further: measured, the split costs more below it.
_SORTED_AT_ONCE = 32


class Contact(msgspec.Struct, frozen=True, gc=False):
    """A peer and where it may be reached: its id (the bytes of a libp2p peer id) and multiaddrs in binary form."""

    peer: bytes
    addresses: tuple[bytes, ...] = ()


def kad_key(name: bytes) -> int:
    """The place of a peer id or of a multihash in the key space."""
    return int.from_bytes(hashlib.sha256(name).digest(), "big")


def shared_bits(one: int, other: int) -> int:
    """How many leading bits two keys share."""
    return KEY_BITS - (one ^ other).bit_length()


class KeySet:
    """A sorted set of keys that finds the closest ones to a key without looking at all of them.

    Keys that share a prefix are neighbours in the order of numbers, so that a subtree of the key space is one slice.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._keys = sorted(set(keys))

    @classmethod
    def of_sorted(cls, keys: list[int]) -> KeySet:
        """The set of keys that are ascending and different already; the list is the set's from now on."""
        found = cls()
        found._keys = keys
        return found

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __contains__(self, key: int) -> bool:
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and self._keys[at] == key

    def add(self, key: int) -> None:
        """Put a key in; one that is there already stays."""
        if key not in self:
            insort(self._keys, key)

    def discard(self, key: int) -> None:
        """Take a key out, if it is there."""
        at = bisect_left(self._keys, key)
        if at < len(self._keys) and self._keys[at] == key:
            del self._keys[at]

    def closest(self, target: int, count: int) -> list[int]:
        """The `count` keys closest to `target`, closest first."""
        found: list[int] = []
        self._collect(target, count, 0, len(self._keys), KEY_BITS - 1, found)
        return found

    def _collect(self, target: int, count: int, low: int, high: int, bit: int, found: list[int]) -> None:
        """Append from the slice low..high, whose keys agree above `bit`, what is missing to `count`."""
        keys = self._keys
        while True:
            if high - low <= _SORTED_AT_ONCE:
                found += sorted(keys[low:high], key=target.__xor__)[: count - len(found)]
                return
            border = ((keys[low] >> (bit + 1) << 1) | 1) << bit
            middle = bisect_left(keys, border, low, high)
            near, far = (
                ((middle, high), (low, middle)) if target >> bit & 1 else ((low, middle), (middle, high))
            )
            bit -= 1
            self._collect(target, count, *near, bit, found)
            if len(found) >= count:
                return
            low, high = far

    def subtree(self, prefix_of: int, bits: int) -> list[int]:
        """The keys that share the first `bits` bits with `prefix_of`."""
        shift = KEY_BITS - bits
        first = prefix_of >> shift << shift
        return self._keys[bisect_left(self._keys, first) : bisect_left(self._keys, first + (1 << shift))]

    def wanting(self, newcomer: int, among: KeySet, count: int) -> list[int]:
        """The keys of this set that have `newcomer` among their `count` closest of `among` (which holds it).

        Outside the newcomer's own neighbourhood the subtrees that lie beside its path to the root are looked at as
        wholes: one with `count` members serves all of its keys itself.
        """
        found: list[int] = []
        bits = 0
        while len(among.subtree(newcomer, bits)) > count:
            beside = newcomer ^ (1 << (KEY_BITS - 1 - bits))
            keys = self.subtree(beside, bits + 1)
            if keys and len(among.subtree(beside, bits + 1)) < count:
                found += [key for key in keys if newcomer in among.closest(key, count)]
            bits += 1
        return found + self.subtree(newcomer, bits)


class ContactSet:
    """Contacts by their place in the key space: a member list, or what a lookup has learned."""

    __slots__ = ("_by_key", "_keys")

    def __init__(self, contacts: Iterable[Contact] = ()) -> None:
        self._by_key = {kad_key(contact.peer): contact for contact in contacts}
        self._keys = KeySet(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Contact]:
        return iter(self._by_key.values())

    def __contains__(self, peer: bytes) -> bool:
        return kad_key(peer) in self._by_key

    @property
    def keys(self) -> KeySet:
        """The places of all contacts; not to be changed by the caller."""
        return self._keys

    def put(self, contact: Contact) -> None:
        """Add a contact, or replace what is known of that peer."""
        key = kad_key(contact.peer)
        self._by_key[key] = contact
        self._keys.add(key)

    def discard(self, peer: bytes) -> None:
        """Forget a peer, if it is known."""
        key = kad_key(peer)
        if self._by_key.pop(key, None) is not None:
            self._keys.discard(key)

    def get(self, peer: bytes) -> Contact | None:
        """What is known of a peer."""
        return self._by_key.get(kad_key(peer))

    def closest(self, target: int, count: int) -> list[Contact]:
        """The `count` contacts closest to a key, closest first."""
        return [self._by_key[key] for key in self._keys.closest(target, count)]
