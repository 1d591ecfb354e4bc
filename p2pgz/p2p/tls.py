"""A TLS stream for bulk: what trio.SSLStream does, with a tenth of its steps.

Used by `p2p.handshake` for every connection of the exchange. trio's stream gives one TLS record (16 KiB) per call, each with
its locks and checkpoints, which is most of the cost of a byte. This one takes all that the socket has, decrypts it in one
go, and encrypts a whole batch before it sends. One task may read while another writes; two writers need a lock of their
own. A connection that ends without TLS's closing alert reads as ended: frames have lengths, so a cut one is noticed.
"""

from __future__ import annotations

import ssl
from typing import Final

import trio

# One recv: what arrives in 2 ms at 1 Gbit/s, and the most that is decrypted without giving way
RECEIVE_BYTES: Final = 256 << 10
# Where all streams decrypt to. One for all: what it holds is used before anything is awaited, and 128 connections with one
# of their own would take 36 MB and the processor's cache. Larger than a recv, so that one rarely needs two rounds.
_plain: Final = memoryview(bytearray(RECEIVE_BYTES + (32 << 10)))


class TlsStream:
    """TLS over a TCP connection or a libp2p stream, which it owns. Raises trio.BrokenResourceError when either breaks."""

    def __init__(self, transport: trio.abc.Stream, context: ssl.SSLContext, *, accepting: bool) -> None:
        self.transport = transport
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=accepting)
        self._ended = False

    @property
    def certificate(self) -> bytes | None:
        """The other end's certificate, DER."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def protocol(self) -> str | None:
        """What ALPN agreed on."""
        return self._tls.selected_alpn_protocol()

    async def do_handshake(self) -> None:
        """Before anything else."""
        while not self._shake():
            await self._flush()
            await self._fill()
            if self._ended:
                raise trio.BrokenResourceError("the connection was closed during the TLS handshake")
        await self._flush()

    def _shake(self) -> bool:
        """One step of the handshake; whether it was the last."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"TLS: {error.reason or error}") from error
        return True

    async def receive(self) -> memoryview | bytes:
        """What has arrived, at least a byte; b"" at the end. Valid until the caller awaits anything."""
        view = _plain
        while True:
            at = self._decrypt(view)
            if at:
                return view[:at]
            if self._ended:
                return b""
            await self._fill()

    def _decrypt(self, view: memoryview) -> int:
        at, room = 0, len(view)
        try:
            while at < room and not self._ended:
                count = int(self._tls.read(room - at, view[at:]))  # type: ignore[call-overload,unused-ignore]
                if not count:
                    self._ended = True
                at += count
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._ended = True
        except ssl.SSLError as error:
            if not at:
                raise trio.BrokenResourceError(f"TLS: {error.reason or error}") from error
        return at

    async def _fill(self) -> None:
        data = await self.transport.receive_some(RECEIVE_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
            self._ended = True

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self.transport.send_all(self._outgoing.read())

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send; when it is cancelled the connection is of no use any more."""
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(f"TLS: {error.reason or error}") from error
        await self._flush()

    async def aclose(self) -> None:
        """Close the connection at once, without an alert: it would wait for a peer that may not read."""
        await trio.aclose_forcefully(self.transport)
