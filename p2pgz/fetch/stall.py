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
    opening: AbstractAsyncContextManager[AsyncIterator[bytes]],
    source: str,
    stall_seconds: float = STALL_SECONDS,
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Open the stream and iterate over it; raises SourceUnavailable when nothing arrives for `stall_seconds`.

    The time that the consumer takes between two pieces does not count.
    """
    with trio.move_on_after(stall_seconds) as scope:
        async with opening as stream:
            yield _Watched(stream, scope, stall_seconds)
    if scope.cancelled_caught:
        raise SourceUnavailable(f"{source}: nothing arrived for {stall_seconds:g} s")


class _Watched:
    """The stream, with a deadline that is set back while the consumer works."""

    def __init__(self, stream: AsyncIterator[bytes], scope: trio.CancelScope, stall_seconds: float) -> None:
        self._next = aiter(stream).__anext__
        self._scope = scope
        self._stall_seconds = stall_seconds

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._scope.deadline = trio.current_time() + self._stall_seconds
        try:
            return await self._next()
        finally:
            self._scope.deadline = float("inf")
