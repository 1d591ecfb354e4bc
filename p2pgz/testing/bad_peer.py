"""A peer that dials a real node, says that it has an image, and does something wrong as soon as it is asked.

`python -m p2pgz.testing.bad_peer --chunks FILE --dial HOST:PORT --fault NAME`. FILE is what `write_chunks` made. It prints
a line of JSON for each thing that happens: `{"event": "connected", "peer": ID}`, `joined` (the node has our bitmap), `asked`
(the node wants a chunk), `ended` (the node closed the connection), and lives until its standard input ends. The faults are
those of `testing.peers`, `good` (none), `stalls` (one chunk, then nothing), `greedy` (asks for one chunk ten thousand times)
and `version` (speaks only one that the node does not know).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from p2pgz.core.admission import Admission
from p2pgz.core.frames import encode
from p2pgz.core.messages import Bitmap, Join, Ping, Pong, Want, chunks_of
from p2pgz.core.wire import AnyFrame
from p2pgz.errors import P2pgzError
from p2pgz.p2p.handshake import Credentials, Handshaken, dial
from p2pgz.p2p.identity import Identity
from p2pgz.testing.peers import FAULTS, Answer, Send, Stock, answer_rightly

GREEDY_REQUESTS: Final = 10_000
FUTURE_VERSIONS: Final = (7, 8)


@dataclass(frozen=True)
class Chunks:
    """The chunks of one segment; enough of a layer for the faults of `testing.peers`."""

    swarm: bytes
    chunks: list[bytes]


def write_chunks(path: Path, swarm: bytes, chunks: Iterable[bytes]) -> None:
    """Write a stock down for `--chunks`."""
    path.write_bytes(msgspec.msgpack.encode({"swarm": swarm, "chunks": list(chunks)}))


def _tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def _stalls() -> Answer:
    answered = False

    async def answer(send: Send, stock: Stock, request: int, n: int) -> None:
        nonlocal answered
        if answered:
            await trio.sleep_forever()
        answered = True
        await answer_rightly(send, stock, request, n)

    return answer


class _Peer:
    def __init__(self, ends: Handshaken, stock: Chunks, answer: Answer) -> None:
        self._ends = ends
        self._stock = stock
        self._answer = answer
        self._asked = False
        self._sending = trio.Lock()
        self._answering = trio.Lock()

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await self._ends.stream.send_all(data)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            frames = self._ends.frames
            while True:
                for frame in frames:
                    await self._take(frame, nursery)
                data = await self._ends.stream.receive()
                if not data:
                    break
                frames = self._ends.reader.feed(data)
            nursery.cancel_scope.cancel()

    async def _take(self, frame: AnyFrame, nursery: trio.Nursery) -> None:
        match frame:
            case Join(swarm) if swarm == self._stock.swarm:
                count = len(self._stock.chunks)
                bits = ((1 << count) - 1).to_bytes((count + 7) // 8, "little")
                await self._send(encode(Bitmap(swarm, count, bits)))
                _tell("joined")
            case Want(request, _, _, runs):
                if not self._asked:
                    self._asked = True
                    _tell("asked")
                nursery.start_soon(self._serve, request, list(chunks_of(runs)))
            case Ping(token):
                await self._send(encode(Pong(token)))
            case _:
                pass

    async def _serve(self, request: int, chunks: list[int]) -> None:
        for n in chunks:
            async with self._answering:  # some cut their frames
                await self._answer(self._send, self._stock, request, n)

    async def ask_for_too_much(self) -> None:
        for first in range(0, GREEDY_REQUESTS, 500):
            wants = (Want(n, 3, self._stock.swarm, ((0, 1),)) for n in range(first, first + 500))
            await self._send(b"".join(map(encode, wants)))


async def _main(stock: Chunks, address: tuple[str, int], fault: str, identity: Identity) -> None:
    credentials = Credentials.make(identity, Admission())
    answer: Answer = {"good": answer_rightly, "stalls": _stalls(), **FAULTS}.get(fault, answer_rightly)
    if fault == "version":
        credentials = dataclasses.replace(credentials, versions=FUTURE_VERSIONS)

    async def live() -> None:
        async with await trio.open_tcp_stream(*address) as raw:
            try:
                peer = _Peer(await dial(raw, credentials), stock, answer)
                _tell("connected", peer=str(identity.peer_id))
                async with trio.open_nursery() as nursery:
                    if fault == "greedy":
                        nursery.start_soon(peer.ask_for_too_much)
                    await peer.run()
                    nursery.cancel_scope.cancel()
            except* (P2pgzError, trio.BrokenResourceError, trio.ClosedResourceError, RuntimeError) as group:
                _tell("ended", reason=str(group.exceptions[0]))
            else:
                _tell("ended", reason="")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


@click.command()
@click.option("--chunks", type=click.Path(path_type=Path), required=True)
@click.option("--dial", "address", required=True)
@click.option("--fault", required=True)
@click.option("--seed", default="", help="of the identity, hex; default: a new one")
def main(chunks: Path, address: str, fault: str, seed: str) -> None:
    """See the module."""
    stock = msgspec.msgpack.decode(chunks.read_bytes(), type=Chunks)
    host, _, port = address.rpartition(":")
    identity = Identity.from_seed(bytes.fromhex(seed)) if seed else Identity.new()
    trio.run(_main, stock, (host, int(port)), fault, identity)


if __name__ == "__main__":
    main()
