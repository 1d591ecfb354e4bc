"""Peers for tests: a pool with an exchange on a port, and one that answers as badly as it is told to.

`python -m p2pgz.testing.peers DIR SEED [FAULT]` is a peer in a process of its own, with all chunks of `peer_layer(SEED)`. It
prints its port and peer id as JSON and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio
import zstandard

from p2pgz.core.admission import Admission
from p2pgz.core.frames import data_head, encode
from p2pgz.core.messages import (
    PART_MAX_BYTES,
    Bitmap,
    Data,
    DataFlag,
    FrameType,
    Join,
    Missing,
    Ping,
    Want,
    chunks_of,
)
from p2pgz.core.peerid import PeerId
from p2pgz.core.verify import VerifiedChunk
from p2pgz.core.wire import HEADER, AnyFrame
from p2pgz.fetch.offers import PoolOffers
from p2pgz.p2p.exchange import Exchange
from p2pgz.p2p.handshake import Credentials, Handshaken, accept
from p2pgz.p2p.identity import Identity
from p2pgz.p2p.listener import PeerListener, listen
from p2pgz.p2p.plane import open_plane
from p2pgz.p2p.uploads import Uploads
from p2pgz.pool.pool import Pool, Segment
from p2pgz.testing.conformance_pool import Layer

BOMB_BYTES = 64 << 20


def peer_layer(seed: int) -> Layer:
    """A layer of 24 files: about 4 MB, chunks of up to 150 KB; the first chunk compresses well."""
    layer = Layer.random(seed, files=24, chunk_max_bytes=150_000, name=b"peers")
    return Layer([[b"\0text " * 20_000], *([chunk] for chunk in layer.chunks)], name=b"peers")


@dataclass(slots=True)
class Peer:
    """A pool with one segment, an exchange, and a port if it listens."""

    pool: Pool
    segment: Segment
    layer: Layer
    exchange: Exchange
    port: int

    @property
    def id(self) -> PeerId:
        """Its peer id."""
        return self.exchange.own_id

    @property
    def swarm(self) -> bytes:
        """The swarm of its layer."""
        return self.segment.id.raw

    async def landed(self, good: list[tuple[int, VerifiedChunk]]) -> None:
        """Keep chunks."""
        await self.pool.add_many(self.segment, good)

    def missing(self) -> list[int]:
        """The chunks it has not."""
        return self.segment.presence.missing(0, self.segment.table.chunk_count)


@asynccontextmanager
async def open_peer(
    directory: Path,
    layer: Layer,
    *,
    chunks: Sequence[int] | None = None,
    identity: Identity | None = None,
    admission: Admission | None = None,
    uploads: Uploads | None = None,
    credentials: Credentials | None = None,
) -> AsyncIterator[Peer]:
    """A peer that has `chunks` of `layer` (None: all of them), listening on a port of its own."""
    async with Pool.open(directory, boot_id="test", check_filesystem=False) as pool:
        segment = await pool.open_segment(layer.layout)
        await pool.add_many(
            segment, layer.all_verified() if chunks is None else [(n, layer.verified(n)) for n in chunks]
        )
        known = credentials or Credentials.make(identity or Identity.new(), admission or Admission())
        async with open_plane(known, PoolOffers(pool), uploads or Uploads(), host="127.0.0.1") as plane:
            yield Peer(pool, segment, layer, plane.exchange, plane.port)


Send = Callable[[bytes], Awaitable[None]]
Answer = Callable[[Send, "Stock", int, int], Awaitable[None]]
"""send, stock, request, chunk"""


class Stock(Protocol):
    """The chunks that a peer says it has; `Layer` is one."""

    @property
    def chunks(self) -> list[bytes]:
        """By their numbers."""
        ...


def _data(
    layer: Stock, request: int, n: int, data: bytes, *, flags: int = 0, total: int | None = None
) -> bytes:
    return data_head(request, n, flags, 0, len(data) if total is None else total, len(data)) + data


async def answer_rightly(send: Send, layer: Stock, request: int, n: int) -> None:
    """No fault."""
    data = layer.chunks[n]
    for at in range(0, len(data), PART_MAX_BYTES):
        part = data[at : at + PART_MAX_BYTES]
        await send(data_head(request, n, 0, at, len(data), len(part)) + part)


async def _wrong_byte(send: Send, layer: Stock, request: int, n: int) -> None:
    data = bytearray(layer.chunks[n])
    data[len(data) // 2] ^= 1
    await send(_data(layer, request, n, bytes(data)))


async def _too_few(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(_data(layer, request, n, layer.chunks[n][:-1]))


async def _too_many(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(_data(layer, request, n, layer.chunks[n] + b"x"))


async def _twice(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(2 * _data(layer, request, n, layer.chunks[n]))


async def _nothing(send: Send, layer: Stock, request: int, n: int) -> None:
    await trio.sleep_forever()


async def _trickle(send: Send, layer: Stock, request: int, n: int) -> None:
    for byte in _data(layer, request, n, layer.chunks[n]):
        await send(bytes([byte]))
        await trio.sleep(1)


async def _other_bytes(send: Send, layer: Stock, request: int, n: int) -> None:
    size = len(layer.chunks[n])
    await send(
        _data(layer, request, n, (layer.chunks[n - 1] * (size // len(layer.chunks[n - 1]) + 1))[:size])
    )


async def _other_number(send: Send, layer: Stock, request: int, n: int) -> None:
    other = (n + 1) % len(layer.chunks)
    await send(_data(layer, request + 1000, other, layer.chunks[other]))


async def _huge_frame(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(HEADER.pack(0xFFFF_FFFF, FrameType.DATA) + bytes(64))
    await trio.sleep_forever()


async def _bomb(send: Send, layer: Stock, request: int, n: int) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(BOMB_BYTES))
    await send(_data(layer, request, n, bomb, flags=DataFlag.ZSTD))


async def _hidden_bomb(send: Send, layer: Stock, request: int, n: int) -> None:
    """A frame that states the right size and holds more."""
    size = len(layer.chunks[n])
    bomb = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(BOMB_BYTES)))
    frame = zstandard.get_frame_parameters(bytes(bomb))
    assert frame.content_size == BOMB_BYTES
    at = bomb.index(BOMB_BYTES.to_bytes(4, "little"))
    bomb[at : at + 4] = size.to_bytes(4, "little")
    await send(_data(layer, request, n, bytes(bomb[: size - 1]), flags=DataFlag.ZSTD))


async def _dies(send: Send, layer: Stock, request: int, n: int) -> None:
    data = layer.chunks[n]
    await send(_data(layer, request, n, data[: len(data) // 2 + 1], total=len(data)))
    os._exit(1)


async def _raises(send: Send, layer: Stock, request: int, n: int) -> None:
    await trio.lowlevel.checkpoint()
    raise RuntimeError("a bug of this peer")


async def _lies(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(encode(Missing(request, ((n, 1),))))


async def _floods(send: Send, layer: Stock, request: int, n: int) -> None:
    while True:
        await send(encode(Ping(1)) * 1000)


async def _unknown_frame(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(HEADER.pack(3, 0x7F) + b"abc")


async def _optional_frame(send: Send, layer: Stock, request: int, n: int) -> None:
    """Not a fault: a later version says something that we skip."""
    await send(HEADER.pack(3, 0x9F) + b"abc" + _data(layer, request, n, layer.chunks[n]))


async def _goodbye(send: Send, layer: Stock, request: int, n: int) -> None:
    await send(HEADER.pack(1, FrameType.GOODBYE) + b"\0")


FAULTS: dict[str, Answer] = {
    name.removeprefix("_").replace("_", "-"): answer
    for name, answer in globals().items()
    if name.startswith("_")
    and getattr(answer, "__code__", None)
    and answer.__code__.co_varnames[:2] == ("send", "layer")
}


async def _serve_badly(ends: Handshaken, layer: Layer, answer: Answer) -> None:
    stream = ends.stream

    async def send(data: bytes) -> None:
        await stream.send_all(data)

    async def take(frames: list[AnyFrame]) -> None:
        for frame in frames:
            match frame:
                case Join(swarm):
                    count = len(layer.chunks)
                    bits = ((1 << count) - 1).to_bytes((count + 7) // 8, "little")
                    await send(encode(Bitmap(swarm, count, bits)))
                case Want(request, _, _, runs):
                    for n in chunks_of(runs):
                        await answer(send, layer, request, n)
                case Data():
                    raise AssertionError("nobody sends us data")
                case _:
                    pass

    await take(ends.frames)
    while data := await stream.receive():
        await take(ends.reader.feed(data))


async def _main(directory: Path, seed: int, fault: str) -> None:
    layer = peer_layer(seed)

    async def until_stdin_ends(port: int, peer: PeerId) -> None:
        print(json.dumps({"port": port, "peer": str(peer)}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)

    if not fault:
        async with open_peer(directory, layer) as peer:
            await until_stdin_ends(peer.port, peer.id)
        return
    credentials = Credentials.make(Identity.new(), Admission())

    async def handle(raw: trio.SocketStream) -> None:
        async with raw:
            await _serve_badly(await accept(raw, credentials), layer, FAULTS[fault])

    async with trio.open_nursery() as nursery:
        listeners = await listen("127.0.0.1", 0)
        await nursery.start(PeerListener(handle).serve, listeners)
        await until_stdin_ends(listeners[0].socket.getsockname()[1], credentials.identity.peer_id)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
