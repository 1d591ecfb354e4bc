"""Who waits for which chunk."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.mount.channel import Kind, Record
from p2pgz.mount.demand import BLOCKED, READ_AHEAD, Demand


class Reader:
    """A read that waits."""

    def __init__(self, demand: Demand, segment: int, missing: list[int]) -> None:
        self.woken = 0
        self.missing = missing
        self.ticket, self.sent = demand.want(segment, missing, self.wake)

    def wake(self) -> None:
        self.woken += 1

    @property
    def ended(self) -> tuple[bool, int]:
        return self.ticket.done, self.ticket.errno


def asked(records: list[Record]) -> list[tuple[int, int, int]]:
    return [(record.first, record.amount, record.priority) for record in records]


def test_first_chunk_is_urgent_and_the_rest_goes_in_runs() -> None:
    reader = Reader(Demand(), 3, [4, 5, 6, 9, 10, 12])
    assert asked(reader.sent) == [
        (4, 1, BLOCKED),
        (5, 2, READ_AHEAD),
        (9, 2, READ_AHEAD),
        (12, 1, READ_AHEAD),
    ]
    assert {record.segment for record in reader.sent} == {3}
    assert {record.kind for record in reader.sent} == {Kind.REQUEST}


def test_second_reader_joins() -> None:
    demand = Demand()
    one = Reader(demand, 0, [1])
    two = Reader(demand, 0, [1])
    assert two.sent == []
    demand.replied(one.sent[0].id, 0)
    assert one.ended == two.ended == (True, 0)
    assert one.woken == two.woken == 1
    assert len(demand) == 0


def test_same_chunk_number_of_another_segment_is_another_chunk() -> None:
    demand = Demand()
    Reader(demand, 0, [1])
    assert len(Reader(demand, 1, [1]).sent) == 1


def test_urgent_reader_of_a_read_ahead_asks_once_more() -> None:
    demand = Demand()
    ahead = Reader(demand, 0, [1, 2])
    urgent = Reader(demand, 0, [2])
    assert asked(urgent.sent) == [(2, 1, BLOCKED)]
    assert Reader(demand, 0, [2]).sent == []
    demand.replied(urgent.sent[0].id, 0)
    assert urgent.ended == (True, 0)
    assert ahead.ended == (False, 0)
    demand.replied(ahead.sent[1].id, 0)  # the older request is answered too; nobody is counted twice
    assert ahead.ended == (False, 0)
    demand.replied(ahead.sent[0].id, 0)
    assert ahead.ended == (True, 0)
    assert len(demand) == 0


def test_failure_of_the_older_request_waits_for_the_newer_one() -> None:
    demand = Demand()
    ahead = Reader(demand, 0, [1, 2])
    urgent = Reader(demand, 0, [2])
    demand.replied(ahead.sent[1].id, 5)
    assert urgent.ended == (False, 0)
    demand.replied(urgent.sent[0].id, 0)
    assert urgent.ended == (True, 0)


def test_failure_ends_the_reader_at_once_and_a_later_one_asks_anew() -> None:
    demand = Demand()
    reader = Reader(demand, 0, [1, 2, 3])
    demand.replied(reader.sent[0].id, 5)
    assert reader.ended == (True, 5)
    assert demand.give_up(reader.ticket) == [Record(Kind.CANCEL, id=reader.sent[1].id)]
    assert reader.woken == 1
    later = Reader(demand, 0, [1, 2, 3])
    assert asked(later.sent) == [(1, 1, BLOCKED), (2, 2, READ_AHEAD)]


def test_giving_up_cancels_what_nobody_else_waits_for() -> None:
    demand = Demand()
    one = Reader(demand, 0, [1, 2, 3])
    two = Reader(demand, 0, [3])
    cancelled = demand.give_up(one.ticket)
    assert [record.id for record in cancelled] == [
        one.sent[0].id
    ]  # the run 2-3 still serves the second reader
    demand.replied(two.sent[0].id, 0)
    assert two.ended == (True, 0)
    assert one.woken == 0


def test_late_answers_are_counted() -> None:
    demand = Demand()
    reader = Reader(demand, 0, [1])
    demand.give_up(reader.ticket)
    demand.replied(reader.sent[0].id, 0)
    demand.replied(999, 0)
    assert demand.late_replies == 2


def test_new_connection_hears_what_is_unanswered() -> None:
    demand = Demand()
    one = Reader(demand, 0, [1, 2])
    two = Reader(demand, 1, [1])
    demand.replied(one.sent[0].id, 0)
    assert demand.unanswered() == [one.sent[1], *two.sent]


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=150)
def test_every_reader_ends_as_its_chunks_do(seed: int, steps: int) -> None:
    """Random reads, answers, failures and give-ups: a reader succeeds only when all its chunks came, is woken once, every
    chunk is asked for at most once a class, and at the end nothing is left."""
    choose = random.Random(seed)
    demand = Demand()
    present: set[int] = set()
    open_requests: dict[int, Record] = {}
    waiting: list[Reader] = []

    def answer(request_id: int, code: int) -> None:
        record = open_requests.pop(request_id)
        if not code:
            present.update(range(record.first, record.first + record.amount))
        demand.replied(request_id, code)

    for _ in range(steps):
        action = choose.random()
        if action < 0.5:
            first = choose.randrange(20)
            missing = [n for n in range(first, first + choose.randrange(1, 8)) if n not in present]
            if missing:
                reader = Reader(demand, 0, missing)
                open_requests |= {record.id: record for record in reader.sent}
                waiting.append(reader)
        elif action < 0.85 and open_requests:
            answer(choose.choice(list(open_requests)), choose.choice([0, 0, 0, 5]))
        elif waiting:
            reader = waiting.pop(choose.randrange(len(waiting)))
            if not reader.ticket.done:
                for record in demand.give_up(reader.ticket):
                    del open_requests[record.id]
                assert reader.woken == 0
        assert set(open_requests) == {record.id for record in demand.unanswered()}
        assert all(len(flight.request_ids) <= 2 for flight in demand._flights.values())
        for reader in waiting:
            assert reader.woken == reader.ticket.done
            if reader.ticket.done and not reader.ticket.errno:
                assert present.issuperset(reader.missing)
    while open_requests:
        answer(choose.choice(list(open_requests)), 0)
    assert len(demand) == 0
    assert all(reader.ticket.done for reader in waiting)
