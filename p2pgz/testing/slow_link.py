"""A TCP link with a rate and a round-trip time, in front of a server on this host. For benchmarks and tests.

A process of its own, so that it shares no event loop with what is measured:

    python -m p2pgz.testing.slow_link HOST:PORT RATE_MBIT RTT_MS      # prints its port; `count` on stdin: the traffic

Both directions have the rate; all connections share it, as hosts share a line. A new connection costs one round trip
before its first byte passes, like TCP's handshake; slow start is not modelled. Ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Final

import trio

READ_BYTES: Final = 16 << 10
# What may be under way in one direction of one connection; enough for 1 Gbit/s at 100 ms
QUEUE_PARTS: Final = 1024


class Direction:
    """One way of the line: who sends pays for its bytes, in the order of arrival."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self.bytes = 0

    def departs_at(self, count: int) -> float:
        """When the last of `count` bytes handed over now has left."""
        self.bytes += count
        start = max(self._free_at, trio.current_time())
        self._free_at = start + (count / self._bytes_per_second if self._bytes_per_second else 0.0)
        return self._free_at


class SlowLink:
    """`serve` forwards each connection to `host:port`."""

    def __init__(self, host: str, port: int, *, bytes_per_second: float, rtt_seconds: float) -> None:
        self._target = (host, port)
        self._one_way_seconds = rtt_seconds / 2
        self.up, self.down = Direction(bytes_per_second), Direction(bytes_per_second)
        self.connections = 0

    async def serve(self, near: trio.SocketStream) -> None:
        """One connection, to its end."""
        self.connections += 1
        async with near:
            await trio.sleep(2 * self._one_way_seconds)
            try:
                far = await trio.open_tcp_stream(*self._target)
            except OSError:
                return
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, near, far, self.up)
                nursery.start_soon(self._carry, far, near, self.down)

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream, way: Direction) -> None:
        """Until the source ends: read, wait for the line and the way, write."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](QUEUE_PARTS)

        async def deliver() -> None:
            async with receive:
                try:
                    async for at, data in receive:
                        await trio.sleep_until(at)
                        await sink.send_all(data)
                    await sink.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver)
            async with send:
                try:
                    while data := await source.receive_some(READ_BYTES):
                        leaves = way.departs_at(len(data))
                        await send.send((leaves + self._one_way_seconds, data))
                        await trio.sleep_until(leaves)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    nursery.cancel_scope.cancel()


async def main(*arguments: str) -> None:
    """See the module."""
    target, rate_mbit, rtt_ms = arguments
    host, _, port = target.rpartition(":")
    link = SlowLink(
        host, int(port), bytes_per_second=float(rate_mbit) * 1e6 / 8, rtt_seconds=float(rtt_ms) / 1e3
    )
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, link.serve, 0, host="127.0.0.1"))
        print(listeners[0].socket.getsockname()[1], flush=True)
        async for line in trio.wrap_file(sys.stdin):
            if line.strip() == "count":
                print(count(link), flush=True)
        nursery.cancel_scope.cancel()


def count(link: SlowLink) -> str:
    """What has passed, as one line of JSON."""
    return json.dumps(
        {"connections": link.connections, "up_bytes": link.up.bytes, "down_bytes": link.down.bytes}
    )


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:4])
