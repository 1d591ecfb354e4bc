"""Who waits for which chunk: the decisions behind a read that misses. Sans-io; `link` performs what is decided here.

One chunk is asked for once however many readers wait for it; a reader that needs at once what another one only reads
ahead asks again with the higher class, once. A reader's ticket is done when all its chunks came or the first one failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from p2pgz.mount.channel import Kind, Record

BLOCKED: Final = 0
READ_AHEAD: Final = 1

_Key = tuple[int, int]  # segment, chunk


class Ticket:
    """One waiting read. `wake` is called once, when `done` becomes true; then `errno` says how it ended."""

    __slots__ = ("done", "errno", "keys", "remaining", "unkept", "wake")

    def __init__(self, keys: Sequence[_Key], wake: Callable[[], object]) -> None:
        self.keys = keys
        self.remaining = len(keys)
        self.wake = wake
        self.done = False
        self.errno = 0
        self.unkept: dict[int, bytes] = {}
        """chunks that came by themselves, since the pool has no room for them"""

    def _finish(self, errno: int) -> None:
        self.done = True
        self.errno = errno
        self.wake()


class _Flight:
    """A chunk that was asked for: by which requests, and who waits."""

    __slots__ = ("priority", "request_ids", "tickets")

    def __init__(self, priority: int, request_id: int) -> None:
        self.priority = priority
        self.request_ids = {request_id}
        self.tickets: list[Ticket] = []


class _Request:
    """A request without an answer, and how many flights it still keeps in the air."""

    __slots__ = ("live", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.live = record.amount


class Demand:
    """All unanswered requests of one `fs` process. Methods return the records to send."""

    def __init__(self) -> None:
        self._flights: dict[_Key, _Flight] = {}
        self._requests: dict[int, _Request] = {}
        self._last_id = 0
        self.late_replies = 0

    def __len__(self) -> int:
        return len(self._requests)

    def want(
        self, segment: int, missing: Sequence[int], wake: Callable[[], object]
    ) -> tuple[Ticket, list[Record]]:
        """Register a read that lacks these chunks (ascending, not empty). The first is what its reader is stuck at."""
        ticket = Ticket([(segment, n) for n in missing], wake)
        records: list[Record] = []
        run_first = run_count = 0
        for position, n in enumerate(missing):
            flight = self._flights.get((segment, n))
            if position == 0:
                if flight is None or flight.priority > BLOCKED:
                    records.append(self._request(segment, n, 1, BLOCKED))
                continue
            if flight is not None:
                continue
            if run_count and run_first + run_count == n:
                run_count += 1
                continue
            if run_count:
                records.append(self._request(segment, run_first, run_count, READ_AHEAD))
            run_first, run_count = n, 1
        if run_count:
            records.append(self._request(segment, run_first, run_count, READ_AHEAD))
        for key in ticket.keys:
            self._flights[key].tickets.append(ticket)
        return ticket, records

    def _request(self, segment: int, first: int, count: int, priority: int) -> Record:
        self._last_id += 1
        record = Record(Kind.REQUEST, priority, 0, segment, first, count, self._last_id)
        self._requests[record.id] = _Request(record)
        for n in range(first, first + count):
            flight = self._flights.get((segment, n))
            if flight is None:
                self._flights[segment, n] = _Flight(priority, record.id)
            else:
                flight.priority = priority
                flight.request_ids.add(record.id)
        return record

    def replied(self, request_id: int, errno: int) -> None:
        """Take an answer and wake whoever needs nothing more, or cannot get what it needs."""
        request = self._requests.pop(request_id, None)
        if request is None:
            self.late_replies += 1
            return
        record = request.record
        for n in range(record.first, record.first + record.amount):
            key = record.segment, n
            flight = self._flights.get(key)
            if flight is None or request_id not in flight.request_ids:
                continue
            flight.request_ids.discard(request_id)
            if errno and flight.request_ids:
                continue  # the same chunk was asked for again with a higher class: that answer decides
            del self._flights[key]
            for other in flight.request_ids:
                self._requests[other].live -= 1
            for ticket in flight.tickets:
                if ticket.done:
                    continue
                ticket.remaining -= 1
                if errno or not ticket.remaining:
                    ticket._finish(errno)  # both are this module's

    def delivered(self, segment: int, n: int, data: bytes) -> None:
        """The bytes of a chunk, ahead of the answer about it: for whoever waits now, and nobody later."""
        flight = self._flights.get((segment, n))
        for ticket in flight.tickets if flight is not None else ():
            if not ticket.done:
                ticket.unkept[n] = data

    def fail_all(self, errno: int) -> None:
        """End every wait with this errno, and forget what was asked for."""
        flights, self._flights = self._flights, {}
        self._requests.clear()
        for flight in flights.values():
            for ticket in flight.tickets:
                if not ticket.done:
                    ticket._finish(errno)

    def give_up(self, ticket: Ticket) -> list[Record]:
        """The reader does not wait any longer. What nobody else waits for is cancelled, so that a later read asks anew."""
        cancelled = []
        for key in ticket.keys:
            flight = self._flights.get(key)
            if flight is None or ticket not in flight.tickets:
                continue
            flight.tickets.remove(ticket)
            if any(not other.done for other in flight.tickets):
                continue
            del self._flights[key]
            for request_id in flight.request_ids:
                request = self._requests[request_id]
                request.live -= 1
                if request.live <= 0:
                    del self._requests[request_id]
                    cancelled.append(Record(Kind.CANCEL, id=request_id))
        return cancelled

    def unanswered(self) -> list[Record]:
        """Every request that waits for an answer, oldest first: what a new connection must hear again."""
        return [request.record for request in self._requests.values()]
