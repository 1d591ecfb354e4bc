"""The exchange on a libp2p stream: the way to a peer that cannot be dialled but has a libp2p connection to us.

Such a peer is behind a firewall or a translated address and dialled us for the DHT's sake. The bytes on the stream are those
of a connection of its own, TLS and HELLO included, so both ids are proven in one place and nothing above knows the
difference; it is encrypted twice and carries a third of the rate, which is why it is the second choice. Called by
`fetch.discovery`; `StreamTransport` is given to the exchange by both ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from p2pgz.core.peerid import PeerId
from p2pgz.errors import SourceUnavailable
from p2pgz.p2p.connection import Connection

# docs/reference/wire.md, "Transport"
PROTOCOL: Final = "/p2pgz/exchange/1"
# design, section 6: how long a peer whose addresses did not answer is reached this way without another try
INDIRECT_SECONDS: Final = 600.0
INDIRECT_MAX: Final = 256
_READ_BYTES: Final = 64 << 10
_CLOSE_SECONDS: Final = 1.0

Opener = Callable[[bytes, str], Awaitable[trio.abc.Stream]]
Through = Callable[[Callable[[], Awaitable[trio.abc.Stream]], PeerId], Awaitable[Connection]]


class StreamTransport(trio.abc.Stream):
    """A libp2p stream with the manners of a trio one. Writes may be cancelled: the muxer sends its frames whole."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.closed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio.abc.SendStream."""
        self._check()
        try:
            await self._stream.write(bytes(data))
        except Exception as error:
            raise trio.BrokenResourceError(f"libp2p stream: {type(error).__name__}") from error

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        self._check()
        try:
            return bytes(await self._stream.read(min(max_bytes or _READ_BYTES, _READ_BYTES)))
        except Exception as error:
            if type(error).__name__ == "StreamEOF":
                return b""
            raise trio.BrokenResourceError(f"libp2p stream: {type(error).__name__}") from error

    def _check(self) -> None:
        if self.closed.is_set():
            raise trio.ClosedResourceError("this stream was closed")

    async def aclose(self) -> None:
        """Reset it: whoever closes an exchange connection has said goodbye in a frame."""
        if not self.closed.is_set():
            self.closed.set()
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                with contextlib.suppress(Exception):  # the connection is gone, and the stream with it
                    await self._stream.reset()
        await trio.lowlevel.checkpoint()


class Indirect:
    """Remembers who is reached this way, and reaches them. `open_stream` fails for who has no libp2p connection to us."""

    def __init__(self, open_stream: Opener, through: Through) -> None:
        self._open_stream = open_stream
        self._through = through
        self._until: dict[PeerId, float] = {}

    def is_preferred(self, peer: PeerId) -> bool:
        """Whether the peer's addresses need not be tried now."""
        return self._until.get(peer, 0.0) > trio.current_time()

    async def connect(self, peer: PeerId) -> Connection:
        """Raises SourceUnavailable and its kin."""
        try:
            connection = await self._through(lambda: self._open_stream(peer.raw, PROTOCOL), peer)
        except SourceUnavailable:
            self._until.pop(peer, None)
            raise
        if not self.is_preferred(peer):
            self._until.pop(peer, None)
            self._until[peer] = trio.current_time() + INDIRECT_SECONDS
            if len(self._until) > INDIRECT_MAX:
                del self._until[next(iter(self._until))]
        return connection
