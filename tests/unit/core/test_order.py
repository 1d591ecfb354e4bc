"""Readers first and in order; what nobody waits for is mixed, gives way, and goes slower where it is refused."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.order import (
    SHUFFLE_WINDOW,
    WINDOW_BESIDE_A_READER,
    WINDOW_MAX,
    WINDOW_MIN,
    WINDOW_START,
    Order,
    Window,
    of_two,
    rarest_first,
    shuffled,
)
from p2pgz.core.schedule import Priority

READ, AHEAD, LIST, FILL = Priority


def test_windows_grow_by_one_and_halve() -> None:
    window = Window(32)
    for _ in range(WINDOW_START):
        window.good()
    assert window.size == WINDOW_START + 1
    window.bad()
    assert window.size == 4
    window.bad()  # of the same windowful
    assert window.size == 4
    for _ in range(8):
        window.good()
    assert window.size == 5
    for _ in range(10_000):
        window.good()
    assert window.size == 32
    for _ in range(200):
        window.bad()
        for _ in range(window.size):
            window.good()
    assert window.size == WINDOW_MIN


def test_a_reader_holds_back_what_nobody_waits_for() -> None:
    order: Order[int] = Order()
    order.add(range(100), FILL)
    order.add([1000], READ)
    taken = order.take()
    assert taken[0] == (1000, READ)
    assert len(taken) == 1 + WINDOW_BESIDE_A_READER
    assert order.take() == []
    order.done(1000, good=True)
    assert len(order.take()) == WINDOW_START - WINDOW_BESIDE_A_READER
    assert len(order) == 100 - WINDOW_START


def test_readers_go_in_order() -> None:
    order: Order[int] = Order()
    order.add([5, 3, 9], READ)
    assert [item for item, _ in order.take()] == [5, 3, 9]


def test_what_becomes_urgent_moves_up_and_is_taken_once() -> None:
    order: Order[str] = Order()
    order.add(["a", "b"], FILL)
    order.add(["b"], READ)
    order.add(["b"], LIST)  # never down
    assert order.take() == [("b", READ), ("a", FILL)]
    order.add(["a"], READ)  # under way: only its class changes
    order.done("a", good=False)
    assert order.windows[READ].size == WINDOW_START // 2
    assert order.windows[FILL].size == WINDOW_START
    order.discard("b")
    order.done("b", good=True)
    assert order.take() == []


def test_what_is_discarded_is_not_taken() -> None:
    order: Order[str] = Order()
    order.add(["a", "b"], AHEAD)
    order.discard("a")
    assert order.take() == [("b", AHEAD)]


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(Priority)), max_size=60), st.integers(0, 99))
def test_everything_is_taken_once_and_within_the_windows(
    wanted: list[tuple[int, Priority]], seed: int
) -> None:
    rng = Random(seed)
    order: Order[int] = Order()
    for item, priority in wanted:
        order.add([item], priority)
    seen: list[int] = []
    under_way: list[tuple[int, Priority]] = []
    while order or under_way:
        under_way += order.take()
        for priority, count in Counter(priority for _, priority in under_way).items():
            assert count <= WINDOW_MAX[priority]
        item, _ = under_way.pop(rng.randrange(len(under_way)))
        seen.append(item)
        order.done(item, good=rng.random() < 0.5)
    assert sorted(seen) == sorted({item for item, _ in wanted})


def test_lists_are_shuffled_inside_windows() -> None:
    items = list(range(2 * SHUFFLE_WINDOW + 5))
    mixed = shuffled(items, Random(1))
    assert mixed != items
    for at in range(0, len(items), SHUFFLE_WINDOW):
        assert sorted(mixed[at : at + SHUFFLE_WINDOW]) == items[at : at + SHUFFLE_WINDOW]


def test_what_few_have_goes_first_and_equals_are_mixed() -> None:
    copies = {1: 3, 2: 0, 3: 1, 4: 0, 5: 0, 6: 0}
    orders = [rarest_first(copies, copies.__getitem__, Random(seed)) for seed in range(20)]
    assert all(sorted(order[:4]) == [2, 4, 5, 6] and order[4:] == [3, 1] for order in orders)
    assert len({tuple(order) for order in orders}) > 5


def test_of_two_spreads_without_choosing_the_slowest() -> None:
    rng = Random(3)
    chosen = Counter(
        of_two("abcd", {"a": 0.0, "b": 1.0, "c": 2.0, "d": 9.0}.__getitem__, rng) for _ in range(4000)
    )
    assert chosen["a"] > chosen["b"] > chosen["c"] > chosen["d"] > 0
