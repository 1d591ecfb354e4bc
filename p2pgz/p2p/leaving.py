"""Connections that end because of us: the node is about to end, or lets in others than before. Called by `node.peering`."""

from __future__ import annotations

import contextlib
from typing import Final

import trio

from p2pgz.errors import PeerFault
from p2pgz.p2p.exchange import Exchange

LOOK_SECONDS: Final = 0.02


async def drain(exchange: Exchange, seconds: float) -> None:
    """Offer nothing any more, and return when all that peers were promised has been sent, or time is up."""
    exchange.uploads.leaving = True
    for connection in exchange.connections():
        with contextlib.suppress(PeerFault):
            connection.serving.withdraw()
    with trio.move_on_after(seconds):
        while any(c.is_sending or c.has_to_say for c in exchange.connections()):  # noqa: ASYNC110  # many queues, no event for all
            await trio.sleep(LOOK_SECONDS)


async def readmit(exchange: Exchange) -> None:
    """Our keys or our list have changed: who is not on it says hello, and shows what he knows, again."""
    admission = exchange.admission
    if admission.open:
        await trio.lowlevel.checkpoint()
        return
    async with trio.open_nursery() as nursery:
        for connection in exchange.connections():
            if not admission.admits(connection.peer, ()):
                nursery.start_soon(connection.close)
