"""Our TLS stream against trio's: the same bytes both ways, and every way to end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pgz.p2p.identity import Identity
from p2pgz.p2p.tls import TlsStream

pytestmark = pytest.mark.trio
DATA = random.Random(1).randbytes(3 << 20)


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        far = await listener.accept()
    async with near, far:
        yield near, far


@asynccontextmanager
async def against_trio(*, accepting: bool) -> AsyncIterator[tuple[TlsStream, trio.SSLStream]]:
    """Our stream in the given role, trio's in the other."""
    contexts = Identity.new().tls_contexts()
    async with sockets() as (near, far):
        ours = TlsStream(near, contexts[0 if accepting else 1], accepting=accepting)
        theirs = trio.SSLStream(
            far, contexts[1 if accepting else 0], server_side=not accepting, https_compatible=True
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.do_handshake)
            nursery.start_soon(theirs.do_handshake)
        yield ours, theirs


async def read(ours: TlsStream, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = await ours.receive()
        assert piece
        got += piece
    return got


@pytest.mark.parametrize("accepting", [True, False])
async def test_megabytes_go_both_ways_at_once(accepting: bool) -> None:
    async with against_trio(accepting=accepting) as (ours, theirs):
        got: list[bytes] = []

        async def receive_theirs() -> None:
            parts = b""
            while len(parts) < len(DATA):
                parts += await theirs.receive_some(100_000)
            got.append(parts)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.send_all, DATA)
            nursery.start_soon(theirs.send_all, DATA)
            nursery.start_soon(receive_theirs)
            assert await read(ours, len(DATA)) == DATA
        assert got == [DATA]


async def test_closing_alert_and_closed_socket_both_read_as_the_end() -> None:
    async with against_trio(accepting=True) as (ours, theirs):
        await theirs.send_all(b"last")
        await theirs.aclose()
        assert await read(ours, 4) == b"last"
        assert await ours.receive() == b""
        assert await ours.receive() == b""
    async with against_trio(accepting=True) as (ours, theirs):
        await theirs.transport_stream.aclose()
        assert await ours.receive() == b""


async def test_bytes_that_are_no_tls_break_the_stream() -> None:
    async with against_trio(accepting=False) as (ours, theirs):
        await theirs.transport_stream.send_all(b"this is no TLS record at all")
        with pytest.raises(trio.BrokenResourceError, match="TLS"):
            await ours.receive()


@pytest.mark.parametrize("hello", [b"\x16\x03\x01\x00\x05hello", b"\x16\x03", b""])
async def test_handshake_with_garbage_or_silence_then_end_breaks(hello: bytes) -> None:
    accepting, _ = Identity.new().tls_contexts()
    async with sockets() as (near, far):
        ours = TlsStream(near, accepting, accepting=True)
        if hello:
            await far.send_all(hello)
        await far.send_eof()
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await ours.do_handshake()


async def test_older_tls_is_refused() -> None:
    import ssl

    accepting, _ = Identity.new().tls_contexts()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with sockets() as (near, far):
        ours = TlsStream(near, accepting, accepting=True)
        theirs = trio.SSLStream(far, old, https_compatible=True)
        async with trio.open_nursery() as nursery:

            async def shake() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await theirs.do_handshake()

            nursery.start_soon(shake)
            with pytest.raises(trio.BrokenResourceError, match="TLS"):
                await ours.do_handshake()
            await ours.aclose()
