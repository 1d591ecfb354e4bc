"""Whom to dial, and which names to ask for, so that this node is joined to the others and stays so.

Called by `p2p.bootstrap`, which does what `decide` says and tells the outcome. Pure: time, randomness and the peers that are
connected are arguments. Three rules:

- fewer peers connected than wanted: configured entries and offered peers (remembered, found by mDNS) are tried in turn, each
  with exponential back-off and jitter, none that is connected already, is being dialled or is ourselves;
- as many as wanted: now and then one entry and one offered peer that are not connected are tried all the same. A cluster
  that fell into two halves, each content with itself, finds together by that. The larger the cluster, the more seldom each
  member does it: one contact in all is enough;
- the first connection after there was none: the network is back, nobody is waited for any longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, Final, NamedTuple

from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId

MIN_PEERS: Final = 4
RETRY_START_SECONDS: Final = 0.2
# with a dial's own deadline below 30 s: what an isolated node needs at most after the network has healed
RETRY_MAX_SECONDS: Final = 24.0
# addresses that nobody configured (of a large name, remembered ones) are retried so seldom that all together take one
# dial in this time: a node that remembers a hundred dead hosts must not scan the network
DIAL_EVERY_SECONDS: Final = 1.5
LOOKUP_START_SECONDS: Final = 1.0
LOOKUP_MAX_SECONDS: Final = 30.0
REFRESH_SECONDS: Final = 180.0
PROBE_SECONDS: Final = 15.0
# beyond so many members each one probes more seldom, so that seeds see about one dial a second in all
PROBE_MEMBERS: Final = 16
# who is connected for so long has admitted us
STAYS_SECONDS: Final = 5.0
DIALS_MAX: Final = 4
OFFERS_MAX: Final = 64
ADDRESSES_PER_NAME_MAX: Final = 1024
ADDRESSES_PER_OFFER_MAX: Final = 4


class Endpoint(NamedTuple):
    """An IP address and a TCP port."""

    host: str
    port: int


@dataclass(slots=True, eq=False)
class Target:
    """One endpoint, and how it went there."""

    endpoint: Endpoint
    expected: PeerId | None
    literal: bool = False
    """configured as it is, so that it is worth more patience"""
    peer: PeerId | None = None
    """who answered last, or must answer"""
    own: bool = False
    dialling: bool = False
    tried: bool = False
    error: str = ""
    since: float = 0.0
    """when the present state began: reached, or failing"""
    due: float = 0.0
    delay: float = 0.0
    tried_at: float = 0.0
    reached_at: float = 0.0
    turn: float = 0.0
    """breaks ties between those that are due at the same time, by lot"""


@dataclass(slots=True, eq=False)
class Entry:
    """One configured address. Of a name, `targets` are what the name server said last."""

    address: PeerAddress
    targets: dict[Endpoint, Target] = field(default_factory=dict)
    asking: bool = False
    asked_at: float | None = None
    delay: float = 0.0
    jitter: float = 1.0
    error: str = ""
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Steps:
    """What to do now, and how long to wait before asking again."""

    dials: list[Target]
    lookups: list[Entry]
    wait_seconds: float


class Joining:
    """The state of joining. `own`: our peer id; `random`: floats in [0, 1)."""

    def __init__(
        self,
        entries: Iterable[PeerAddress],
        *,
        own: PeerId,
        random: Callable[[], float],
        min_peers: int = MIN_PEERS,
    ) -> None:
        self._own = own
        self._random = random
        self._min_peers = min_peers
        self._offers: dict[PeerId, dict[Endpoint, Target]] = {}
        self._was_few = self._was_alone = True
        self._probe_due = 0.0
        self.entries = [self._entry(address) for address in dict.fromkeys(entries)]

    def _entry(self, address: PeerAddress) -> Entry:
        entry = Entry(address)
        if not address.is_name:
            endpoint = Endpoint(address.host, address.port)
            entry.targets[endpoint] = self._target(endpoint, address.peer, literal=True)
        return entry

    # -- what is known

    def offer(self, peer: PeerId, addresses: Iterable[PeerAddress]) -> None:
        """A peer that may be dialled though nobody configured it; the one offered longest ago gives way to it."""
        if peer == self._own:
            return
        before = self._offers.pop(peer, {})
        targets: dict[Endpoint, Target] = {}
        for address in addresses:
            endpoint = Endpoint(address.host, address.port)
            if not address.is_name and address.port and len(targets) < ADDRESSES_PER_OFFER_MAX:
                targets[endpoint] = before.get(endpoint) or self._target(endpoint, peer)
        if targets:
            self._offers[peer] = targets
            if len(self._offers) > OFFERS_MAX:
                del self._offers[next(iter(self._offers))]

    def configure(self, entries: Iterable[PeerAddress]) -> None:
        """Other entries from now on; what is known of those that stay is kept."""
        known = {entry.address: entry for entry in self.entries}
        self.entries = [known.get(address) or self._entry(address) for address in dict.fromkeys(entries)]

    def resolved(self, entry: Entry, ips: Iterable[str], now: float) -> None:
        """The addresses of a name; those it no longer has are forgotten."""
        before, entry.targets = entry.targets, {}
        for ip in dict.fromkeys(ips):
            if len(entry.targets) < ADDRESSES_PER_NAME_MAX:
                endpoint = Endpoint(ip, entry.address.port)
                entry.targets[endpoint] = before.get(endpoint) or self._target(endpoint, entry.address.peer)
        self._looked_up(entry, "", now)

    def lookup_failed(self, entry: Entry, error: str, now: float) -> None:
        """The name server gave no answer; the addresses known from before are kept."""
        self._looked_up(entry, error, now)

    def _looked_up(self, entry: Entry, error: str, now: float) -> None:
        if bool(error) != bool(entry.error) or entry.asked_at is None:
            entry.since = now
        entry.asking, entry.asked_at, entry.error = False, now, error
        entry.delay = min(max(entry.delay * 2, LOOKUP_START_SECONDS), LOOKUP_MAX_SECONDS)
        entry.jitter = 0.5 + self._random() / 2

    def dialled(self, target: Target, peer: PeerId, now: float) -> None:
        """A dial has succeeded, and this peer answered."""
        if target.error or not target.tried:
            target.since = now
        target.dialling, target.tried, target.error = False, True, ""
        target.peer = peer
        target.own = peer == self._own
        target.reached_at = now
        # it may go at once (it does not admit us, is over its budget): do not dial it in a circle
        target.due = now + RETRY_START_SECONDS + self._random() + target.delay
        target.delay = min(max(target.delay * 2, RETRY_START_SECONDS), RETRY_MAX_SECONDS)

    def dial_failed(self, target: Target, error: str, now: float) -> None:
        """A dial has failed."""
        if not target.error:
            target.since = now
        target.dialling, target.tried, target.error = False, True, error
        longest = RETRY_MAX_SECONDS if target.literal else max(RETRY_MAX_SECONDS, self._unasked_seconds())
        target.delay = min(max(target.delay * 2, RETRY_START_SECONDS), longest)
        target.due = now + target.delay * (0.5 + self._random() / 2)
        target.turn = self._random()

    def _unasked_seconds(self) -> float:
        return DIAL_EVERY_SECONDS * sum(not target.literal for target in self._all_targets())

    # -- what to do

    def decide(
        self,
        now: float,
        connected: Collection[PeerId],
        *,
        is_own: Callable[[Endpoint], bool] = lambda _endpoint: False,
        members: int = 0,
    ) -> Steps:
        """What is to be done now; what is returned counts as being worked on until its outcome is told.

        `is_own` says whether an endpoint is our own listener's; it is asked just before a dial.
        """
        few, alone = len(connected) < self._min_peers, not connected
        for target in self._all_targets():
            if target.delay and target.peer in connected and now - target.reached_at >= STAYS_SECONDS:
                target.delay, target.due = 0.0, min(target.due, now)
        if self._was_alone and not alone:
            self._begin_anew(now, connected)
        if few and not self._was_few:
            for entry in self.entries:
                entry.delay = 0.0
        if not few and self._was_few:
            self._plan_probe(now, members or len(connected))
        self._was_few, self._was_alone = few, alone
        configured: list[Target] = []
        offered: list[Target] = []
        dials: list[Target] = []
        in_flight = sum(target.dialling for target in self._all_targets())
        room = DIALS_MAX - in_flight
        if few:
            configured, offered = self._candidates(connected)
            room = min(room, self._min_peers - len(connected) - in_flight)
            due = [sorted((t for t in group if t.due <= now), key=_turn) for group in (configured, offered)]
            turns = (t for t in chain.from_iterable(zip_longest(*due)) if t is not None)
            dials = self._start(turns, room, is_own, now)
        elif now >= self._probe_due:
            for group in self._candidates(connected):
                group.sort(key=_longest_ago)
                dials += self._start(group, min(1, room - len(dials)), is_own, now)
            self._plan_probe(now, members or len(connected))
        lookups = [entry for entry in self.entries if entry.address.is_name and self._is_due(entry, few, now)]
        for entry in lookups:
            entry.asking = True
        return Steps(dials, lookups, self._wait(now, few, [*configured, *offered]))

    def _candidates(self, connected: Collection[PeerId]) -> tuple[list[Target], list[Target]]:
        """The endpoints that may be dialled, each once: what is configured comes before what is offered.

        What an entry says about the peer there also wins: a remembered id may be that of a peer that is gone for good.
        """
        busy = {t.peer for t in self._all_targets() if t.dialling and t.peer is not None}
        taken: dict[Endpoint, Target] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.address.peer is None):
            for endpoint, target in entry.targets.items():
                taken.setdefault(endpoint, target)
        configured = list(taken.values())
        offered = []
        for targets in self._offers.values():
            for endpoint, target in targets.items():
                if taken.setdefault(endpoint, target) is target:
                    offered.append(target)

        def wanted(target: Target) -> bool:
            if target.dialling or target.own or target.expected == self._own:
                return False
            return target.peer is None or not (target.peer in connected or target.peer in busy)

        return [t for t in configured if wanted(t)], [t for t in offered if wanted(t)]

    def _start(
        self, targets: Iterable[Target], room: int, is_own: Callable[[Endpoint], bool], now: float
    ) -> list[Target]:
        """Take the first ones: no peer twice, and not ourselves."""
        taken: list[Target] = []
        peers: set[PeerId] = set()
        for target in targets:
            if len(taken) >= room:
                break
            if target.peer is not None and target.peer in peers:
                continue
            if is_own(target.endpoint):
                target.own = True
                continue
            if target.peer is not None:
                peers.add(target.peer)
            target.dialling, target.tried_at = True, now
            taken.append(target)
        return taken

    def _begin_anew(self, now: float, connected: Collection[PeerId]) -> None:
        for target in self._all_targets():
            if target.peer in connected:  # whether it lets us stay is still to be seen
                continue
            target.delay = 0.0
            target.due = min(target.due, now + self._random())
        for entry in self.entries:
            entry.delay = 0.0

    def _plan_probe(self, now: float, members: int) -> None:
        seconds = PROBE_SECONDS * max(1.0, members / PROBE_MEMBERS)
        self._probe_due = now + seconds * (0.5 + self._random() / 2)

    def _is_due(self, entry: Entry, few: bool, now: float) -> bool:
        return not entry.asking and self._lookup_due(entry, few) <= now

    def _lookup_due(self, entry: Entry, few: bool) -> float:
        if entry.asked_at is None:
            return 0.0
        return entry.asked_at + (entry.delay if few else REFRESH_SECONDS) * entry.jitter

    def _wait(self, now: float, few: bool, candidates: list[Target]) -> float:
        times = [
            self._lookup_due(entry, few)
            for entry in self.entries
            if entry.address.is_name and not entry.asking
        ]
        times += [target.due for target in candidates if not target.dialling] if few else [self._probe_due]
        # what is due and was not started waits for room, not for time: its outcome wakes us
        return min((time - now for time in times if time > now), default=REFRESH_SECONDS)

    # -- inside

    def _target(self, endpoint: Endpoint, expected: PeerId | None, *, literal: bool = False) -> Target:
        return Target(endpoint, expected, literal, peer=expected, turn=self._random())

    def _all_targets(self) -> Iterable[Target]:
        return chain(
            chain.from_iterable(entry.targets.values() for entry in self.entries),
            chain.from_iterable(targets.values() for targets in self._offers.values()),
        )

    def ips(self) -> list[str]:
        """The addresses of all entries, as far as they are known."""
        return list(dict.fromkeys(endpoint.host for entry in self.entries for endpoint in entry.targets))

    def status(self, now: float, connected: Collection[PeerId]) -> list[dict[str, Any]]:
        """One row per configured entry, for `p2pgz status`; fields may be added, never renamed."""
        return [_row(entry, now, connected) for entry in self.entries]


def _turn(target: Target) -> tuple[float, float]:
    return target.due, target.turn


def _longest_ago(target: Target) -> tuple[float, float]:
    return target.tried_at, target.turn


def _row(entry: Entry, now: float, connected: Collection[PeerId]) -> dict[str, Any]:
    targets = list(entry.targets.values())
    here = next((t for t in targets if t.peer is not None and t.peer in connected), None)
    reached = next((t for t in targets if t.tried and not t.error and not t.own), None)
    failed = max((t for t in targets if t.error), key=lambda t: t.tried_at, default=None)
    error, since = "", entry.since
    if here is not None:
        state, since = "connected", here.since
    elif targets and all(t.own for t in targets):
        state = "own"
    elif reached is not None:
        state, since = "reached", reached.since
    elif failed is not None:
        state, since, error = "failing", failed.since, failed.error
    elif entry.error:
        state, error = "failing", entry.error
    else:
        state = "waiting"
    found = here or reached
    return {
        "entry": str(entry.address),
        "state": state,
        "peer_id": str(found.peer) if found is not None else None,
        "addresses": len(targets),
        "error": error or entry.error or None,
        "since_seconds": now - since,
    }
