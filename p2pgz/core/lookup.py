"""One walk through the DHT as a state machine: who to ask next, when to stop, what was found (kad-dht spec, "Peer routing").

The driver in `p2pgz.p2p.kad` asks `next()` whom to send the query to, and tells `answered`, `failed` or `slow`. No clock, no
network, no order of its own making: the same answers in the same order give the same walk.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from p2pgz.core.keyspace import Contact, KeySet, kad_key

WIDTH = 20  # kad-dht spec: k, how many of the closest must have answered before a walk may end
PARALLEL = 6  # spec: alpha = 10; we hedge slow peers instead and keep a walk's load on the network low
MAX_ASKED = 96  # a walk of 10 000 servers asks about 40; beyond this somebody makes peers up
MAX_CLOSER_PER_ANSWER = 2 * WIDTH  # go-libp2p sends 20
MAX_ADDRESSES = 8  # of one provider; more would only make a dead one take longer


class _State(Enum):
    HEARD = 0
    ASKED = 1
    SLOW = 2
    ANSWERED = 3
    FAILED = 4


class Lookup:
    """A walk to the `WIDTH` closest peers to `target`; ends early once `wanted` providers are known (0: never early)."""

    def __init__(self, target: bytes, *, own: bytes, start: Iterable[Contact], wanted: int = 0) -> None:
        self.target = kad_key(target)
        self.providers: dict[bytes, Contact] = {}
        self.asked = 0
        self._own = kad_key(own)
        self._wanted = wanted
        self._in_flight = 0
        self._keys = KeySet()  # of all that did not fail
        self._contacts: dict[int, Contact] = {}
        self._states: dict[int, _State] = {}
        self._hear(start)

    def next(self) -> list[Contact]:
        """Whom to ask now; they count as asked from here on."""
        if self._satisfied():
            return []
        chosen = []
        for key in self._keys.closest(self.target, WIDTH):
            if self._in_flight >= PARALLEL or self.asked >= MAX_ASKED:
                break
            if self._states[key] is _State.HEARD:
                self._states[key] = _State.ASKED
                self._in_flight += 1
                self.asked += 1
                chosen.append(self._contacts[key])
        return chosen

    def answered(
        self, peer: bytes, closer: Iterable[Contact], providers: Iterable[Contact] = ()
    ) -> list[Contact]:
        """Take an answer in; returns the providers that were not known before."""
        if not self._settle(peer, _State.ANSWERED):
            return []
        self._hear(closer)
        return self.learned(providers)

    def learned(self, providers: Iterable[Contact]) -> list[Contact]:
        """Providers known from elsewhere, or from an answer; returns those that are new, or with addresses that are.

        Servers keep records for an hour: one may still name where a provider was before it moved. All are kept, those
        heard of last first, since whoever dials finds out.
        """
        new = []
        for provider in providers:
            known = self.providers.get(provider.peer)
            if known is not None:
                fresh = tuple(each for each in provider.addresses if each not in known.addresses)
                if not fresh or len(known.addresses) >= MAX_ADDRESSES:
                    continue
                provider = Contact(provider.peer, (fresh + known.addresses)[:MAX_ADDRESSES])
            self.providers[provider.peer] = provider
            new.append(provider)
        return new

    def failed(self, peer: bytes) -> None:
        """The peer cannot be reached or answers nonsense: it is as if nobody had named it."""
        if self._settle(peer, _State.FAILED):
            self._keys.discard(kad_key(peer))

    def slow(self, peer: bytes) -> None:
        """The peer takes long: ask another in its place; its answer still counts when it comes."""
        key = kad_key(peer)
        if self._states.get(key) is _State.ASKED:
            self._states[key] = _State.SLOW
            self._in_flight -= 1

    @property
    def finished(self) -> bool:
        """Whether nothing more can come of this walk (slow peers are waited for while they are among the closest)."""
        if self._satisfied():
            return True
        states = [self._states[key] for key in self._keys.closest(self.target, WIDTH)]
        if _State.ASKED in states or _State.SLOW in states:
            return False
        return self._in_flight == 0 and (_State.HEARD not in states or self.asked >= MAX_ASKED)

    def closest(self, count: int = WIDTH) -> list[Contact]:
        """The closest peers among those that answered, closest first."""
        answered = (key for key in self._keys if self._states[key] is _State.ANSWERED)
        return [self._contacts[key] for key in sorted(answered, key=self.target.__xor__)[:count]]

    def _satisfied(self) -> bool:
        return 0 < self._wanted <= len(self.providers)

    def _settle(self, peer: bytes, state: _State) -> bool:
        key = kad_key(peer)
        before = self._states.get(key)
        if before is not _State.ASKED and before is not _State.SLOW:
            return False
        self._in_flight -= before is _State.ASKED
        self._states[key] = state
        return True

    def _hear(self, contacts: Iterable[Contact]) -> None:
        for number, contact in enumerate(contacts):
            if number == MAX_CLOSER_PER_ANSWER:
                break
            key = kad_key(contact.peer)
            if key == self._own or not contact.addresses:
                continue
            if key not in self._states:
                self._states[key] = _State.HEARD
                self._contacts[key] = contact
                self._keys.add(key)
