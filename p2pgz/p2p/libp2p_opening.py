"""Opening streams of py-libp2p so that nothing is left behind when the caller has no more patience.

Called by `p2p.host`. A negotiation that is cancelled leaves its stream in the library's books, and frames of it half-sent on
the connection; so it runs in a task of the host's own and ends by itself (the library gives it 10 s), however early the
caller leaves. What it brings then is reset. Their number is bounded: with a stopped peer each takes its full time.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import trio
from libp2p.peer.id import ID

from p2pgz.errors import P2pgzError, SourceUnavailable
from p2pgz.p2p.libp2p_streams import reason_of, reset_stream

NEGOTIATIONS_MAX: Final = 128


class StreamOpener:
    """Opens streams of one host in tasks of its nursery."""

    def __init__(self, host: Any, nursery: trio.Nursery) -> None:
        self._host = host
        self._nursery = nursery
        self.running = 0

    async def open(self, peer: ID, protocol: str) -> Any:
        """A new stream; raises what the library raises, and SourceUnavailable when too many are being opened."""
        if self.running >= NEGOTIATIONS_MAX:
            raise SourceUnavailable(f"{self.running} streams are being opened already")
        negotiation = _Negotiation(self._host, peer, protocol)
        self.running += 1
        self._nursery.start_soon(self._run, negotiation)
        try:
            await negotiation.done.wait()
        finally:
            negotiation.left = not negotiation.done.is_set()
        if negotiation.error is not None:
            raise negotiation.error
        return negotiation.stream

    async def opened(self, peer: ID, protocol: str) -> Any:
        """The same; all failures are SourceUnavailable."""
        try:
            return await self.open(peer, protocol)
        except P2pgzError:
            raise
        except Exception as error:
            raise SourceUnavailable(f"peer {peer}: {reason_of(error)}") from error

    async def _run(self, negotiation: _Negotiation) -> None:
        try:
            await negotiation.run()
        finally:
            self.running -= 1


class _Negotiation:
    def __init__(self, host: Any, peer: ID, protocol: str) -> None:
        self._host = host
        self._peer = peer
        self._protocol = protocol
        self.done = trio.Event()
        self.left = False
        """nobody waits for it any more"""
        self.stream: Any = None
        self.error: Exception | None = None

    async def run(self) -> None:
        try:
            self.stream = await self._host.new_stream(self._peer, [self._protocol])
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            self.error = error
        finally:
            self.done.set()
        if self.left and self.stream is not None:
            with contextlib.suppress(Exception):  # the connection is gone, and the stream with it
                await reset_stream(self.stream)
