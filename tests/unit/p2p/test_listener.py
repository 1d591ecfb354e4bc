"""One port, two protocols: the first byte decides, and no connection ends the listener."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from p2pgz.errors import StateError
from p2pgz.p2p import listener as module
from p2pgz.p2p.listener import Handler, PeerListener, listen


async def echo(stream: trio.SocketStream) -> None:
    async with stream:
        while data := await stream.receive_some(100):
            await stream.send_all(data)


async def shout(stream: trio.SocketStream) -> None:
    async with stream:
        await stream.send_all((await stream.receive_some(100)).upper())


@asynccontextmanager
async def serving(on_tls: Handler, on_multistream: Handler | None) -> AsyncIterator[tuple[PeerListener, int]]:
    async with trio.open_nursery() as nursery:
        listeners = await listen("127.0.0.1", 0)
        server = PeerListener(on_tls, on_multistream)
        await nursery.start(server.serve, listeners)
        yield server, listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def talk(port: int, data: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        try:
            await stream.send_all(data)
            return await stream.receive_some(100)
        except trio.BrokenResourceError:
            return b""


@pytest.mark.trio
async def test_first_byte_says_whose_connection_it_is_and_is_not_taken() -> None:
    async with serving(echo, shout) as (server, port):
        assert await talk(port, b"\x16abc") == b"\x16abc"
        assert await talk(port, b"\x13/multistream/1.0.0\n") == b"\x13/MULTISTREAM/1.0.0\n"
        assert await talk(port, b"GET / HTTP/1.1\r\n\r\n") == b""
        assert server.refused == 1


@pytest.mark.trio
async def test_without_libp2p_multistream_is_nobodys() -> None:
    async with serving(echo, None) as (server, port):
        assert await talk(port, b"\x13/multistream/1.0.0\n") == b""
        assert server.refused == 1


@pytest.mark.trio
async def test_silent_connection_is_closed_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BYTE_SECONDS", 0.05)
    async with serving(echo, None) as (_, port), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with trio.fail_after(5):
            assert await stream.receive_some(1) == b""


@pytest.mark.trio
async def test_handler_that_raises_and_connection_that_is_reset_end_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def broken(stream: trio.SocketStream) -> None:
        raise RuntimeError("a bug")

    async with serving(broken, echo) as (_, port):
        assert await talk(port, b"\x16") == b""
        raw = socket.create_connection(("127.0.0.1", port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        assert await talk(port, b"\x13x") == b"\x13x"


@pytest.mark.trio
async def test_too_many_strangers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRANGERS_MAX", 2)
    async with serving(echo, None) as (server, port):
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
        with trio.fail_after(5):
            assert await silent[2].receive_some(1) == b""
        assert server.refused == 1
        await silent[0].send_all(b"\x16x")
        assert await silent[0].receive_some(5) == b"\x16x"
        assert await talk(port, b"\x16y") == b"\x16y"
        for stream in silent:
            await stream.aclose()


@pytest.mark.trio
async def test_taken_port_is_named() -> None:
    async with serving(echo, None) as (_, port):
        with pytest.raises(StateError, match=str(port)):
            await listen("127.0.0.1", port)
