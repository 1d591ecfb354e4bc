"""One call for all who want the same: look-ups of tags, and documents.

Whoever comes first makes the call, the others wait for what it brings. A caller that is cancelled in the middle leaves the
call to one of those who wait, which makes it anew: nobody's impatience is anybody else's failure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from p2pgz.errors import P2pgzError

T = TypeVar("T")


class _Call(Generic[T]):
    __slots__ = ("ended", "error", "result")

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: list[T] = []
        self.error: P2pgzError | None = None


class Together(Generic[T]):
    """Calls in progress by key. A key must say everything that the answer depends on."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, _Call[T]] = {}

    async def run(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, or somebody else's call for the same key that is under way; raises its P2pgzError."""
        while (other := self._calls.get(key)) is not None:
            await other.ended.wait()
            if other.result:
                return other.result[0]
            if other.error is not None:
                # an exception object must not be raised by several tasks: each would grow the same traceback
                raise type(other.error)(other.error.what, hint=other.error.hint) from other.error
        mine = self._calls[key] = _Call()
        try:
            mine.result.append(await call())
        except P2pgzError as error:
            mine.error = error
            raise
        finally:
            del self._calls[key]
            mine.ended.set()
        return mine.result[0]
