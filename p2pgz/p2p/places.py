"""The places of a TOC's chunks in the key space, worked out in steps: a large layer has some hundred thousand.

Used by `p2p.announce`, on the event loop of a node that has readers to serve meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX
from p2pgz.core.keyspace import KEY_BITS, KeySet, kad_key

# 2 us each
STEP_KEYS: Final = 1000
# sorted one by one: by their first byte
_PART_BITS: Final = 8


class Places:
    """Digests by their place; `keys` are the places in order."""

    def __init__(self, digests: dict[int, bytes], keys: KeySet) -> None:
        self.digests = digests
        self.keys = keys


async def places_of(digests: Iterable[bytes]) -> Places:
    """Where these digests are in the key space."""
    found: dict[int, bytes] = {}
    for number, digest in enumerate(digests, 1):
        found[kad_key(SHA256_MULTIHASH_PREFIX + digest)] = digest
        if number % STEP_KEYS == 0:
            await trio.lowlevel.checkpoint()
    parts: list[list[int]] = [[] for _ in range(1 << _PART_BITS)]
    for number, key in enumerate(found, 1):
        parts[key >> (KEY_BITS - _PART_BITS)].append(key)
        if number % (8 * STEP_KEYS) == 0:
            await trio.lowlevel.checkpoint()
    keys: list[int] = []
    for number, part in enumerate(parts, 1):
        keys += sorted(part)
        if number % 8 == 0 and len(found) > STEP_KEYS:
            await trio.lowlevel.checkpoint()
    return Places(found, KeySet.of_sorted(keys))
