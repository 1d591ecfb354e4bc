"""Chunks from connected peers into the pool: whoever says it has them is asked, the quickest first.

A building block of the race between peers and registry: it decides nothing about when to ask whom else, and returns what no
peer gave. No peer is asked twice for the same chunk in one call. Time-outs are the caller's; cancelling makes the peers
forget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import structlog
import trio

from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import PeerAnswer, PeerSource
from p2pgz.core.schedule import Priority
from p2pgz.core.verify import VerifiedChunk
from p2pgz.errors import P2pgzError
from p2pgz.pool.pool import Pool, Segment

log = structlog.get_logger(component="fetch")


async def take_from_peers(
    peers: PeerSource, pool: Pool, segment: Segment, chunks: Iterable[int], priority: Priority
) -> list[int]:
    """Make chunks present that peers have; returns those that are still missing, ascending.

    Raises what the pool raises when the disk refuses (PoolFull, StateError); peers' failures only leave chunks over.
    """
    swarm = segment.id.raw
    tried: dict[int, set[PeerId]] = defaultdict(set)
    left = set(chunks)
    while True:
        plan: dict[PeerId, list[int]] = defaultdict(list)
        for n in sorted(left):
            holder = next((peer for peer in peers.holders(swarm, n) if peer not in tried[n]), None)
            if holder is not None:
                plan[holder].append(n)
                tried[n].add(holder)
        if not plan:
            await trio.lowlevel.checkpoint()
            return sorted(left)
        await _ask_all(peers, pool, segment, plan, priority, left)


async def _ask_all(
    peers: PeerSource,
    pool: Pool,
    segment: Segment,
    plan: dict[PeerId, list[int]],
    priority: Priority,
    left: set[int],
) -> None:
    """Ask several peers at once; what lands is taken out of `left`."""
    failures: list[P2pgzError] = []

    async def landed(good: list[tuple[int, VerifiedChunk]]) -> None:
        try:
            await pool.add_many(segment, good)
        except P2pgzError as error:
            # this host's own trouble: no other peer can help, and the one that gave the bytes is not to blame
            failures.append(error)
            nursery.cancel_scope.cancel()
            return
        left.difference_update(n for n, _ in good)

    async def ask(peer: PeerId, chunks: list[int]) -> None:
        try:
            answer = await peers.fetch(
                peer, segment.id.raw, segment.table, chunks, priority=priority, landed=landed
            )
        except P2pgzError as error:
            log.debug("peer.failed", peer=str(peer), reason=error.what)
            return
        _note(peer, answer)

    async with trio.open_nursery() as nursery:
        for peer, chunks in plan.items():
            nursery.start_soon(ask, peer, chunks)
    if failures:
        raise failures[0]


def _note(peer: PeerId, answer: PeerAnswer) -> None:
    if answer.missing or answer.busy:
        log.debug("peer.left_over", peer=str(peer), missing=len(answer.missing), busy=len(answer.busy))
