"""The home's side of leases: who fetches an extent, and whom all the others follow. Stores no data, only names.

Owned by `core.leases`, which hands it the frames of askers and holders and sends what it answers. Time and randomness are
passed in. The first asker of an extent is granted the lease, each later one gets a parent that has or is getting it; a
tree of fan-out 2 grows, so that nobody sends an extent more than about twice. docs/reference/wire.md, "Leases".

Two rules keep it from cycles: a parent's depth is always below its child's, and one who asks again after its parent failed
keeps its depth, so that whoever follows it can go on.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from p2pgz.core.crowdmsg import (
    DEPTH_MAX,
    DEPTH_NONE,
    PENDING_MAX,
    Ask,
    AskFlag,
    CrowdFrame,
    Done,
    Giveup,
    Grant,
    Have,
    LeaseRef,
    Level,
    NotHome,
    Parent,
    Pending,
    Renew,
)

FANOUT: Final = (
    2  # simulated: 3 is slower (2.8 s against 2.3 s for 300 nodes), since each upload is shared by three
)
# A lease ends this long after the last RENEW; renewed three times in it, so that one lost frame ends none
LEASE_SECONDS: Final = 3.0
# It ends as well when RENEWs say for this long that nothing has come: a registry that is slow answers within it
STALL_SECONDS: Final = 30.0
# An asker who got nothing from the holder is believed at most this often, and never while RENEWs come and tell of progress:
# a registry that is slow has slow holders
REGRANT_SECONDS: Final = 2.0
RENEW_MISSED_SECONDS: Final = 1.6
ACCUSED_STALL_SECONDS: Final = 5.0
# Two askers got nothing at all from a holder that has had it for this long; longer where no reader is blocked: its link
# may be slow, and readers go first
AVOIDED_SECONDS: Final = 6.0
AVOIDED_UNURGENT_SECONDS: Final = 40.0
# One asker could be lying; but it may be the only one that is left
AVOIDED_ALONE_SECONDS: Final = 20.0
PENDING_SECONDS: Final = 0.25
# Finished this long ago: the tree below the holder has it, too, and any of them may be asked
HAVE_AFTER_SECONDS: Final = 5.0
HAVE_NAMED: Final = 2
RECORD_SECONDS: Final = 120.0
RECORDS_MAX: Final = 4096
# Members of a record that may get children. Others are forgotten: there are always more open places than askers
OPEN_MAX: Final = 64
WAITERS_MAX: Final = 1024

Key = tuple[bytes, int, Level]
Sent = list[tuple[bytes, CrowdFrame]]


class _Seat:
    """A member's place in the tree of an extent."""

    __slots__ = ("children", "depth", "since")

    def __init__(self, depth: int, since: float) -> None:
        self.depth = depth
        self.since = since
        self.children = 0


class _Record:
    __slots__ = (
        "avoided_at", "avoided_by",
        "complete", "done_at", "excluded_by", "expires", "got_bytes", "granted_at", "here", "lease", "progress_at", "root",
        "seats", "stalled", "touched", "waiters",
    )  # fmt: skip

    def __init__(self, lease: int, now: float) -> None:
        self.lease = lease
        self.root: bytes | None = None
        self.stalled: bytes | None = None
        self.avoided_by: bytes | None = None
        self.avoided_at = now
        self.seats: dict[bytes, _Seat] = {}
        self.waiters: dict[bytes, Ask] = {}
        self.excluded_by: dict[bytes, bytes] = {}
        self.granted_at = self.progress_at = self.touched = now
        self.expires = 0.0
        self.done_at: float | None = None
        self.complete = False
        self.here = False  # the last holder left after it had got all that it was asked for
        self.got_bytes = 0

    def is_overdue(self, now: float) -> bool:
        """Whether a holder that somebody complains about is to be replaced."""
        silent = now - (self.expires - LEASE_SECONDS) >= RENEW_MISSED_SECONDS
        stuck = now - self.progress_at >= ACCUSED_STALL_SECONDS
        return now - self.granted_at >= REGRANT_SECONDS and (silent or stuck or self.done_at is not None)


class HomeDesk:
    """What this node decides about the extents that it is home of.

    By its own view: `is_home(swarm, extent, level)`, and `zone_of(peer)`, so that bytes stay in a zone where they can.
    """

    def __init__(
        self,
        rng: Random,
        is_home: Callable[[bytes, int, Level], bool],
        zone_of: Callable[[bytes], str | None],
    ) -> None:
        self._rng = rng
        self._is_home = is_home
        self._zone_of = zone_of
        self._records: dict[Key, _Record] = {}
        self.grants = 0
        self.adopted = 0

    def __len__(self) -> int:
        return len(self._records)

    def ask(self, asker: bytes, ask: Ask, view: int, now: float) -> Sent:
        """Answer an asker, and perhaps others who waited."""
        if not self._is_home(ask.swarm, ask.extent, ask.level):
            return [(asker, NotHome(ask.request, view))]
        record = self._touch((ask.swarm, ask.extent, ask.level), now)
        for peer in (*ask.exclude, *ask.avoid):
            self._blame(record, peer, asker)
        if record.root == asker:  # it would not ask if it still held the lease
            self._end(record, asker)
        sent: Sent = []
        self._place(record, asker, ask, now, sent)
        return sent

    def renewed(self, peer: bytes, frame: Renew | Done, now: float) -> Sent:
        """A holder tells how far it is. A lease that is not known here was granted by another home: it counts here, too."""
        ref = frame.ref
        if not self._is_home(ref.swarm, ref.extent, ref.level):
            return []
        record = self._touch((ref.swarm, ref.extent, ref.level), now)
        if peer == record.stalled and isinstance(frame, Renew) and frame.got_bytes == record.got_bytes:
            return []  # it has lost the lease for want of progress, and there is none
        if record.root is None or (record.root == peer and record.lease != ref.lease):
            record.lease = ref.lease
            record.seats.clear()
            self._seat_root(record, peer, now)
            self.adopted += 1
        elif record.root != peer:
            return []
        if isinstance(frame, Done):
            if record.done_at is None:
                record.done_at = now
            record.complete = frame.complete
        else:
            record.done_at, record.complete = None, False
            if frame.got_bytes != record.got_bytes:
                record.got_bytes, record.progress_at = frame.got_bytes, now
            record.expires = now + LEASE_SECONDS
        return self._serve_waiters(record, now)

    def given_up(self, peer: bytes, frame: Giveup, now: float) -> Sent:
        """A holder gives its lease back: somebody who waits gets it."""
        record = self._records.get((frame.ref.swarm, frame.ref.extent, frame.ref.level))
        if record is None or record.root != peer:
            return []
        self._end(record, peer)
        return self._serve_waiters(record, now)

    def lost(self, peer: bytes, now: float, *, dead: bool) -> Sent:
        """A connection has ended, or (`dead`) the members have been told that the peer is gone.

        Who has fetched all that was asked for may close its connection and still be there.
        """
        sent: Sent = []
        for record in self._records.values():
            record.waiters.pop(peer, None)
            if record.root == peer and (dead or record.done_at is None):
                self._end(record, peer)
                sent += self._serve_waiters(record, now)
            elif dead:
                record.seats.pop(peer, None)
        return sent

    def tick(self, now: float) -> Sent:
        """Every PENDING_SECONDS: end leases, tell those who wait that they are not forgotten."""
        sent: Sent = []
        waiting: dict[bytes, list[int]] = {}
        for key, record in list(self._records.items()):
            stalled = record.progress_at + STALL_SECONDS <= now
            over = record.expires <= now or stalled
            if record.root is not None and record.done_at is None and over:
                record.stalled = record.root if stalled else None
                self._end(record, record.root)
            sent += self._serve_waiters(record, now)
            for peer, ask in record.waiters.items():
                waiting.setdefault(peer, []).append(ask.request)
            if not record.waiters and record.touched + RECORD_SECONDS <= now:
                del self._records[key]
        sent += [(peer, Pending(tuple(requests[:PENDING_MAX]))) for peer, requests in waiting.items()]
        return sent

    def _touch(self, key: Key, now: float) -> _Record:
        record = self._records.pop(key, None) or _Record(self._rng.getrandbits(64) | 1, now)
        record.touched = now
        self._records[key] = record  # the one used last goes last
        if len(self._records) > RECORDS_MAX:
            del self._records[next(iter(self._records))]
        return record

    def _blame(self, record: _Record, peer: bytes, asker: bytes) -> None:
        """Two askers who could not get it from a member: it gets no more children. One could be lying."""
        first = record.excluded_by.setdefault(peer, asker)
        if first != asker and peer != record.root:
            record.seats.pop(peer, None)
        if len(record.excluded_by) > OPEN_MAX:
            del record.excluded_by[next(iter(record.excluded_by))]

    def _seat_root(self, record: _Record, peer: bytes, now: float) -> None:
        record.root = peer
        record.seats[peer] = _Seat(0, now)
        record.granted_at = record.progress_at = now
        record.expires = now + LEASE_SECONDS
        record.got_bytes, record.done_at, record.complete = 0, None, False
        record.avoided_by = None

    def _end(self, record: _Record, root: bytes) -> None:
        record.root = None
        record.seats.pop(root, None)
        record.here = record.done_at is not None
        record.done_at = None

    def _serve_waiters(self, record: _Record, now: float) -> Sent:
        sent: Sent = []
        waiters, record.waiters = record.waiters, {}
        for asker, ask in waiters.items():
            self._place(record, asker, ask, now, sent)
        return sent

    def _place(self, record: _Record, asker: bytes, ask: Ask, now: float, sent: Sent) -> None:
        long_there = record.done_at is not None and now - record.done_at > HAVE_AFTER_SECONDS
        if record.complete and long_there and not ask.exclude and not ask.avoid:
            few = self._few_who_have_it(record, asker, now)
            if few:
                sent.append((asker, Have(ask.request, few)))
                return
        may = not ask.flags & AskFlag.NO_GRANT
        # Without a holder all others may wait for one; if the last one got what it was asked for, they have it, too
        orphaned = record.root is None and not record.here
        shunned = self._shunned(record, asker, ask, now)
        parent = None if (orphaned or shunned) and may else self._pick(record, asker, ask)
        overdue = shunned or (record.root in ask.exclude and record.is_overdue(now))
        if parent is not None:
            above = record.seats[parent]
            above.children += 1
            seat = record.seats.pop(asker, None) or _Seat(0, now)
            seat.depth = above.depth + 1
            record.seats[asker] = seat
            self._forget_seats(record)
            sent.append((asker, Parent(ask.request, record.lease, seat.depth, parent)))
        elif may and (record.root is None or overdue):
            if record.root is not None:
                self._end(record, record.root)
            self._seat_root(record, asker, now)
            self.grants += 1
            sent.append((asker, Grant(ask.request, record.lease, int(LEASE_SECONDS * 1000))))
            sent += self._serve_waiters(record, now)
        elif len(record.waiters) < WAITERS_MAX:
            record.waiters[asker] = ask

    def _shunned(self, record: _Record, asker: bytes, ask: Ask, now: float) -> bool:
        """Whether two askers have got nothing from the holder for long."""
        if record.root not in ask.avoid:
            return False
        if record.avoided_by is None:
            record.avoided_by, record.avoided_at = asker, now
        limit = AVOIDED_UNURGENT_SECONDS if ask.priority else AVOIDED_SECONDS
        alone = record.avoided_by == asker and now - record.avoided_at < AVOIDED_ALONE_SECONDS
        return not alone and record.done_at is not None and now - record.done_at >= limit

    def _few_who_have_it(self, record: _Record, asker: bytes, now: float) -> tuple[bytes, ...]:
        """Those who had it for long and sent it least often, while there are any that have not sent it enough.

        Else the asker gets a parent and a place in the tree, and is one of them for those who ask later. Whoever came first
        would send to everybody otherwise.
        """
        seats = record.seats
        others = [
            peer
            for peer, seat in seats.items()
            if peer != asker and seat.children < FANOUT and now - seat.since >= HAVE_AFTER_SECONDS
        ]
        self._rng.shuffle(others)
        few = sorted(others, key=lambda peer: seats[peer].children)[:HAVE_NAMED]
        for peer in few:
            seats[peer].children += 1
        return tuple(few)

    def _pick(self, record: _Record, asker: bytes, ask: Ask) -> bytes | None:
        """A parent: of two at random the one with the smaller depth. None when there is none that would do."""
        keeps = ask.lease == record.lease and ask.depth != DEPTH_NONE
        seats = record.seats
        if keeps:  # its children stay with it if its parent stays above: there, more than FANOUT is allowed
            near = [
                peer
                for peer, seat in seats.items()
                if seat.depth < ask.depth and peer != asker and peer not in (*ask.exclude, *ask.avoid)
            ]
            if near:
                return min(near, key=lambda peer: seats[peer].children)
            if record.root is None or record.root in ask.exclude:
                return None  # it stood right below the holder: it should become the holder itself
        free = [
            peer
            for peer, seat in seats.items()
            if seat.depth < DEPTH_MAX and peer != asker and peer not in ask.exclude
        ]
        if not free:
            return None
        fewest = min(seats[peer].children for peer in free)
        free = [peer for peer in free if seats[peer].children <= max(fewest, FANOUT - 1)]
        free = [peer for peer in free if peer not in ask.avoid] or free
        if ask.level is Level.CLUSTER:
            zone = self._zone_of(asker)
            free = [peer for peer in free if self._zone_of(peer) == zone] or free
        one, other = self._rng.choice(free), self._rng.choice(free)
        return one if seats[one].depth <= seats[other].depth else other

    def _forget_seats(self, record: _Record) -> None:
        seats = record.seats
        if len(seats) > OPEN_MAX:
            full = [peer for peer, seat in seats.items() if seat.children >= FANOUT and peer != record.root]
            del seats[full[0] if full else next(peer for peer in seats if peer != record.root)]


def ref_of(key: Key, lease: int) -> LeaseRef:
    """How a holder names its lease."""
    return LeaseRef(key[0], key[1], key[2], lease)
