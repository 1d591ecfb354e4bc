"""What a large layer costs the event loop: its chunks' places are worked out in steps."""

from __future__ import annotations

import hashlib

import pytest
import trio

from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX
from p2pgz.core.keyspace import kad_key
from p2pgz.p2p.places import STEP_KEYS, places_of


@pytest.mark.trio
async def test_places_are_those_of_the_digests_in_order() -> None:
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(300)]
    places = await places_of(iter(digests))
    assert list(places.keys) == sorted(kad_key(SHA256_MULTIHASH_PREFIX + each) for each in digests)
    assert set(places.digests.values()) == set(digests)


@pytest.mark.trio
async def test_others_run_between_the_steps() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await places_of(hashlib.sha256(b"%d" % number).digest() for number in range(20 * STEP_KEYS))
        nursery.cancel_scope.cancel()
    assert turns >= 20
