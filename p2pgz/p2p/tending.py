"""What is done for all connections of an exchange, again and again, by one task each: a task per connection would cost an
idle node more than all else it does (40 connections that look twice a second: 1 % of a core).

Started by the exchange; `connections` are its open ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from p2pgz.core.standing import Fault
from p2pgz.errors import PeerFault
from p2pgz.p2p.connection import Connection
from p2pgz.p2p.offers import Offers

log = structlog.get_logger(component="peers")

WATCH_SECONDS: Final = 0.5
# our own clock ran on without us (a stopped process, a suspended host): not the peers' fault
LAG_SECONDS: Final = 2.0
# how soon followers learn of new chunks; more often would cost more than it helps
TELL_SECONDS: Final = 0.05
# the same when nothing has changed for a while: twenty rounds a second are a third of what an idle node does
TELL_QUIET_SECONDS: Final = 0.2
QUIET_ROUNDS: Final = 20
# looked at all the same, should a change have been missed
TELL_ANYWAY_ROUNDS: Final = 25

Connections = Callable[[], Sequence[Connection]]


async def watch(connections: Connections) -> None:
    """For ever: see that peers make progress, ask the silent ones for a sign of life, close what nobody uses."""
    while True:
        before = trio.current_time()
        await trio.sleep(WATCH_SECONDS)
        now = trio.current_time()
        for connection in connections():
            connection.look(now, lagged=now - before > WATCH_SECONDS + LAG_SECONDS)


async def tell(connections: Connections, offers: Offers) -> None:
    """For ever: tell followers how bitmaps change. Each is looked at once per round, however many peers follow it."""
    last: dict[bytes, bytes | None] = {}
    version, quiet_rounds = -1, 0
    while True:
        await trio.sleep(TELL_SECONDS if quiet_rounds < QUIET_ROUNDS else TELL_QUIET_SECONDS)
        if offers.version() == version:
            quiet_rounds += 1
            if quiet_rounds % TELL_ANYWAY_ROUNDS:
                continue
        else:
            version, quiet_rounds = offers.version(), 0
        followers = [c for c in connections() if c.serving.joined]
        joined = {swarm for connection in followers for swarm in connection.serving.joined}
        bits = {swarm: _bits(offers, swarm) for swarm in joined}
        changed = {swarm for swarm in joined if swarm not in last or last[swarm] != bits[swarm]}
        last = bits
        if not changed:
            continue
        for connection in followers:
            try:
                connection.serving.tell_changes(changed)
            except PeerFault as error:
                connection.blame(error, Fault.SLOW)


def _bits(offers: Offers, swarm: bytes) -> bytes | None:
    try:
        offer = offers.swarm(swarm) or offers.proven_swarm(swarm)
        return offer.bits() if offer is not None else None
    except Exception:  # one broken segment must not keep the others from being told
        log.exception("peer.bug")
        return None
