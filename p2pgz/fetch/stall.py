"""A stream that stops is given up: no request of ours may wait for ever on a silent source."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from p2pgz.errors import SourceUnavailable

# Between two pieces of a body, and before the first one. A registry under load needs seconds; a minute is a dead connection
# that TCP has not noticed, and a reader's own deadline would be used up by one attempt.
STALL_SECONDS = 15.0


@asynccontextmanager
async def watched(
    opening: AbstractAsyncContextManager[AsyncIterator[bytes]], source: str, stall_seconds: float = STALL_SECONDS
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Open the stream and iterate over it; raises SourceUnavailable when nothing arrives for `stall_seconds`.

    The time that the consumer takes between two pieces does not count.
    """
    with trio.move_on_after(stall_seconds) as scope:
        async with opening as stream:

            async def pieces() -> AsyncIterator[bytes]:
                iterator = aiter(stream)
                while True:
                    scope.deadline = trio.current_time() + stall_seconds
                    try:
                        piece = await anext(iterator)
                    except StopAsyncIteration:
                        return
                    finally:
                        scope.deadline = trio.current_time() + 3600.0  # the consumer has its own deadlines
                    yield piece

            yield pieces()
    if scope.cancelled_caught:
        raise SourceUnavailable(f"{source}: nothing arrived for {stall_seconds:g} s")
