"""One call for all who want the same."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pgz.errors import SourceUnavailable
from p2pgz.fetch.together import Together

pytestmark = pytest.mark.trio


class Upstream:
    """Counts its calls; each waits for the gate."""

    def __init__(self, error: SourceUnavailable | None = None) -> None:
        self.calls = 0
        self.gate = trio.Event()
        self.error = error

    async def __call__(self) -> int:
        self.calls += 1
        number = self.calls
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return number


async def test_all_who_wait_get_the_answer_of_one_call() -> None:
    together: Together[int] = Together()
    upstream = Upstream()
    answers = []

    async def ask() -> None:
        answers.append(await together.run("key", upstream))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        upstream.gate.set()
    assert answers == [1] * 20
    assert await together.run("key", upstream) == 2


async def test_other_keys_are_other_calls() -> None:
    together: Together[int] = Together()
    upstream = Upstream()
    upstream.gate.set()
    assert [await together.run(key, upstream) for key in ("a", "b")] == [1, 2]


async def test_a_caller_that_is_cancelled_leaves_the_call_to_the_next_one() -> None:
    together: Together[int] = Together()
    upstream = Upstream()
    answers = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            answers.append(await together.run("key", upstream))

    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()
        for scope in (first, trio.CancelScope(), trio.CancelScope()):
            nursery.start_soon(ask, scope)
            await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        upstream.gate.set()
    assert answers == [2, 2]


async def test_each_waiter_gets_an_error_of_its_own() -> None:
    together: Together[int] = Together()
    upstream = Upstream(SourceUnavailable("away", hint="later"))
    errors = []

    async def ask() -> None:
        with pytest.raises(SourceUnavailable, match="away") as caught:
            await together.run("key", upstream)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        upstream.gate.set()
    assert upstream.calls == 1
    assert len({id(error) for error in errors}) == 3
    assert {error.hint for error in errors} == {"later"}
