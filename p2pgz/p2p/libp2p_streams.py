"""Messages on a libp2p stream, and the ways to end one. Used by `p2p.host` on both ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import trio

from p2pgz.errors import P2pgzError, PeerFault
from p2pgz.p2p.indirect import StreamTransport

log = structlog.get_logger(component="libp2p")

MESSAGE_MAX_BYTES = 1 << 20
CLOSE_SECONDS = 1.0
_READ_BYTES = 64 << 10
_VARINT_MAX_BYTES = 4


class MessageReader:
    """Messages with a varint length (multiformats unsigned-varint) off a stream; the library's reader is one byte a read."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def message(self) -> bytes | None:
        """The next message; None at a clean end. Raises PeerFault."""
        size = shift = 0
        for number in range(_VARINT_MAX_BYTES):
            if not await self._have(number + 1):
                if number or self._buffer:
                    raise PeerFault("a message ends in its length")
                return None
            byte = self._buffer[number]
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        else:
            size = MESSAGE_MAX_BYTES + 1
        if size > MESSAGE_MAX_BYTES:
            raise PeerFault(f"a message is over the limit of {MESSAGE_MAX_BYTES} bytes")
        head = number + 1
        if not await self._have(head + size):
            raise PeerFault("a message ends early")
        message = bytes(self._buffer[head : head + size])
        del self._buffer[: head + size]
        return message

    async def _have(self, count: int) -> bool:
        while len(self._buffer) < count:
            try:
                read = await self._stream.read(_READ_BYTES)
            except Exception as error:
                if type(error).__name__ == "StreamEOF":
                    return False
                raise
            if not read:
                return False
            self._buffer += read
        return True


def framed(message: bytes) -> bytes:
    size = len(message)
    head = bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + message


async def close_stream(stream: Any) -> None:
    with trio.move_on_after(CLOSE_SECONDS, shield=True):
        try:
            await stream.close()
        except Exception as error:  # noqa: BLE001  # it is gone already
            log.debug("stream.close", reason=str(error))


async def close_connection(connection: Any) -> None:
    """Close a connection that may be dead already."""
    with trio.move_on_after(CLOSE_SECONDS, shield=True):
        try:
            await connection.close()
        except Exception as error:  # noqa: BLE001  # it is gone already
            log.debug("connection.close", reason=str(error))


async def close_socket_after(connection: Any, stream: trio.SocketStream) -> None:
    """The library's closing does not reach the socket when it is cancelled."""
    try:
        await connection.event_closed.wait()
    finally:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await connection.muxed_conn.event_closed.wait()
        stream.socket.close()


async def hand_over(take: Callable[[StreamTransport], Awaitable[None]], stream: Any) -> None:
    """A handler for streams that somebody else owns from now on; lasts until the stream is closed."""
    transport = StreamTransport(stream)
    try:
        await take(transport)
        await transport.closed.wait()
    except Exception as error:  # whatever leaves this function ends the library's host
        if not isinstance(error, P2pgzError) and not is_library_error(error):
            log.exception("peer.bug", where="stream")
        await transport.aclose()


async def reset_stream(stream: Any) -> None:
    """The library tells the peer nothing when a stream fails on our side: without this it would wait for ever."""
    with trio.move_on_after(CLOSE_SECONDS, shield=True):
        await stream.reset()


def is_library_error(error: BaseException) -> bool:
    """Whether an exception is one of the dozens that mean no more than "the connection failed", not a bug of ours."""
    module = type(error).__module__
    return module.startswith(("libp2p", "multiaddr", "noise", "trio", "cryptography")) or isinstance(
        error, OSError
    )


def reason_of(error: BaseException | None) -> str:
    """A short text for a message to people."""
    if error is None:
        return "the host is shutting down"
    if isinstance(error, trio.TooSlowError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"[:200]


assert MESSAGE_MAX_BYTES.bit_length() <= 7 * _VARINT_MAX_BYTES
