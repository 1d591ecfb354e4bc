"""Makes what this host has findable: provider records and pointers, their renewal, and their hand-over to who joins.

Beside each `KadNode`. The node says what it has (`provide`, `hold`) and who has joined; `run` does the rest at its own pace.
Chunks are never announced one by one: a TOC's holder sends the members closest to each chunk a pointer to the TOC, in bulk.
Nothing here is urgent, so everything is limited: the network is there for the readers.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import structlog
import trio

from p2pgz.core import pointers, records
from p2pgz.core.digest import SHA256_MULTIHASH_PREFIX
from p2pgz.core.keyspace import Contact, ContactSet, KeySet, kad_key, shared_bits
from p2pgz.core.lookup import WIDTH
from p2pgz.core.pointers import MEMBERS_PER_CHUNK, Share, Verdict
from p2pgz.core.providers import RENEW_AFTER_SECONDS, Renewals
from p2pgz.core.records import Greeting, Reply, Withdrawal
from p2pgz.errors import P2pgzError
from p2pgz.p2p.kad import KadNode
from p2pgz.p2p.kadmsg import KadMessage, Kind, encode
from p2pgz.p2p.places import places_of

log = structlog.get_logger(component="dht")

SEND_SECONDS = 10.0  # dial, handshake, a message of a MiB
KEYS_AT_ONCE = 32  # provider records whose walks are done before they are sent, one stream per member
WALKS_AT_ONCE = 4
SENDS_AT_ONCE = 8
MEMBERS_PER_SECOND = 20.0  # that get pointers
RETRY_SECONDS = 60.0  # nobody there yet
MOVED_SECONDS = 5.0  # our records are sent again within it, once our addresses have changed
STANDBY_SAMPLE = 3  # members whose word is enough to leave a TOC's pointers to other holders
STANDBY_DELAY_SECONDS = 120.0  # holders on stand-by offer to who joins at a random instant within it
JOINED_QUEUE = 4096
EPOCHS = 20_000  # members whose start we remember
SWEEP_SECONDS = 300.0
REFRESH_SECONDS = 60 * 60.0  # go-libp2p: 10 min; every connection that is made refreshes as well
KEYS_BETWEEN_CHECKPOINTS = 200  # 2 ms of closest() each


class _Held(NamedTuple):
    digests: Callable[[], Iterable[bytes]]
    complete: bool


class Announcer:
    """What one node announces. All methods but `run` and `answer` return at once."""

    def __init__(
        self,
        kad: KadNode,
        *,
        random: Callable[[], float],
        now: Callable[[], float] = trio.current_time,
        bootstrap: Callable[[], Iterable[Contact]] = tuple,
        epoch: bytes | None = None,
    ) -> None:
        self.kad = kad
        self.epoch = epoch or secrets.token_bytes(records.EPOCH_BYTES)
        """names this start of this node: a peer that sees another one sends its pointers again"""
        self.sent_records = 0
        self.sent_pointers = 0
        self._random = random
        self._now = now
        self._bootstrap = bootstrap
        self._keys = Renewals(random)
        self._tocs = Renewals(random, period_seconds=pointers.RENEW_AFTER_SECONDS)
        self._held: dict[bytes, _Held] = {}
        self._standby: set[bytes] = set()
        self._epochs: OrderedDict[bytes, tuple[bytes | None, float]] = OrderedDict()
        self._servers = (
            ContactSet()
        )  # found by walks; the routing table alone is too coarse to choose members from
        self._joined: OrderedDict[bytes, Contact] = OrderedDict()
        self._withdrawn: list[bytes] = []
        self._wake = trio.Event()

    # -- what the node says

    def provide(self, key: bytes) -> None:
        """Announce this host as a provider of a key (multihash of a TOC, manifest or config), until `withdraw`."""
        self.kad.announced.add(key)
        self._keys.add(key, self._now())
        if key in self._withdrawn:
            self._withdrawn.remove(key)
        self._wake.set()

    def withdraw(self, key: bytes) -> None:
        """The object is gone here: say so to the members that may have our record."""
        if key in self.kad.announced:
            self.kad.announced.discard(key)
            self._keys.remove(key)
            self._withdrawn.append(key)
            self._wake.set()

    def moved(self) -> None:
        """Others reach us at other addresses from now on: tell those that keep our records, soon but not all at once."""
        now = self._now()
        for key in self._keys:
            self._keys.retry(key, now + MOVED_SECONDS * self._random())
        self._wake.set()

    def hold(
        self, toc: bytes, digests: Callable[[], Iterable[bytes]], *, complete: bool, grown: bool = False
    ) -> None:
        """This host has these chunks of the TOC (all of them: `complete`); again when that changes, or they have `grown`."""
        before = self._held.get(toc)
        self._held[toc] = _Held(digests, complete)
        if before is None or before.complete is not complete or grown:
            self._tocs.remove(toc)
            # complete holders first: what a partial one would send is part of it
            self._tocs.add(toc, self._now() + (0 if complete else RETRY_SECONDS * (1 + self._random())))
        self._wake.set()

    def drop(self, toc: bytes) -> None:
        """This host holds nothing of the TOC any more. Its pointers expire by themselves: other holders may renew them."""
        self._held.pop(toc, None)
        self._standby.discard(toc)
        self._tocs.remove(toc)

    def joined(self, contact: Contact, epoch: bytes | None) -> None:
        """A connection to a DHT server was made; `epoch` is None for those that do not speak our records protocol."""
        self.kad.met(contact)
        known = self._epochs.get(contact.peer)
        if (
            known is not None
            and known[0] == epoch
            and (epoch or self._now() - known[1] < RENEW_AFTER_SECONDS)
        ):
            return
        self._epochs[contact.peer] = (epoch, self._now())
        self._epochs.move_to_end(contact.peer)
        if len(self._epochs) > EPOCHS:
            self._epochs.popitem(last=False)
        self._joined[contact.peer] = contact
        if len(self._joined) > JOINED_QUEUE:
            self._joined.popitem(last=False)
        self._wake.set()

    def look_again(self) -> None:
        """The clock has jumped (a host that was suspended): do what has become due."""
        self._wake.set()

    # -- what peers ask

    def answer(self, sender: Contact, data: bytes) -> bytes:
        """The answer to a message of the records protocol; raises PeerFault for a malformed one."""
        now = self._now()
        store = self.kad.pointers
        verdict, others = Verdict.HAVE, 0
        match records.decode_request(data):
            case Greeting():
                pass
            case Withdrawal(keys):
                for key in keys:
                    self.kad.records.remove(key, sender.peer)
            case Share() as share:
                verdict = store.put(sender.peer, share, now)
                others = len(store.senders(share.toc, now, but=sender.peer))
            case offer:
                verdict = store.offered(sender.peer, offer, now)
                others = len(store.senders(offer.toc, now, but=sender.peer))
        return records.encode_reply(Reply(self.epoch, verdict, others))

    # -- the work

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce, renew, hand over, refresh and sweep until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_around)
            nursery.start_soon(self._sweep)
            task_status.started()
            while True:
                self._wake = trio.Event()
                await self._announce_due()
                await self._hand_over(nursery)
                due = [at for at in (self._keys.next_due(), self._tocs.next_due()) if at is not None]
                with trio.move_on_after(max(0.0, min(due, default=math.inf) - self._now())):
                    await self._wake.wait()

    async def _announce_due(self) -> None:
        keys = self._keys.due(self._now())
        for at in range(0, len(keys), KEYS_AT_ONCE):
            await self._send_records(keys[at : at + KEYS_AT_ONCE])
        if self._withdrawn:
            await self._send_withdrawals()
        for toc in self._tocs.due(self._now()):
            await self._send_pointers(toc)

    async def _send_records(self, keys: list[bytes]) -> None:
        """Tell the closest servers of each key; those that are close to several get one stream for all."""
        per_peer: dict[bytes, tuple[Contact, list[bytes]]] = {}
        limit = trio.CapacityLimiter(WALKS_AT_ONCE)

        async def walk(key: bytes) -> None:
            async with limit:
                closest = await self.kad.find_closest(key)
            if not closest:
                self._keys.retry(key, self._now() + RETRY_SECONDS)
            for contact in closest:
                per_peer.setdefault(contact.peer, (contact, []))[1].append(key)

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(walk, key)
        await self._for_each(per_peer.values(), self._tell_records)

    async def _tell_records(self, contact: Contact, keys: list[bytes]) -> None:
        own = (self.kad.network.own(),)
        still = [key for key in keys if key in self.kad.announced]
        messages = [encode(KadMessage(Kind.ADD_PROVIDER, key, providers=own)) for key in still]
        with trio.fail_after(SEND_SECONDS):
            await self.kad.network.tell(contact, self.kad.protocol, messages)
        self.sent_records += len(messages)

    async def _send_withdrawals(self) -> None:
        keys, self._withdrawn = (
            self._withdrawn[: records.MAX_WITHDRAWN],
            self._withdrawn[records.MAX_WITHDRAWN :],
        )
        per_peer: dict[bytes, tuple[Contact, list[bytes]]] = {}
        for key in keys:
            for contact in self.kad.closest_known(key):
                per_peer.setdefault(contact.peer, (contact, []))[1].append(key)

        async def tell(contact: Contact, gone: list[bytes]) -> None:
            await self._ask(contact, Withdrawal(tuple(gone)))

        await self._for_each(per_peer.values(), tell)

    async def _for_each(
        self,
        targets: Iterable[tuple[Contact, list[bytes]]],
        send: Callable[[Contact, list[bytes]], Awaitable[None]],
    ) -> None:
        limit = trio.CapacityLimiter(SENDS_AT_ONCE)

        async def one(contact: Contact, keys: list[bytes]) -> None:
            async with limit:
                try:
                    await send(contact, keys)
                except (P2pgzError, trio.TooSlowError):
                    self.kad.table.failed(contact.peer, self._now())

        async with trio.open_nursery() as nursery:
            for contact, keys in targets:
                nursery.start_soon(one, contact, keys)

    # -- pointers

    async def _send_pointers(self, toc: bytes) -> None:
        held = self._held.get(toc)
        if held is None:
            return
        if len(self.kad.table) < WIDTH:  # every walk asks everyone, holders too: pointers would add nothing
            self._tocs.retry(toc, self._now() + RETRY_SECONDS)
            return
        shares = await self._shares(held)
        self._standby.discard(toc)
        unneeded = 0
        for number, (contact, digests) in enumerate(shares):
            reply = await self._offer(contact, Share.of(toc, digests, complete=held.complete))
            if (
                reply is not None
                and reply.verdict is Verdict.HAVE
                and reply.other_senders >= pointers.ENOUGH_SENDERS
            ):
                unneeded += 1
            if number + 1 == STANDBY_SAMPLE == unneeded:
                self._standby.add(toc)
                return
            await trio.sleep(1 / MEMBERS_PER_SECOND)

    async def _shares(self, held: _Held) -> list[tuple[Contact, list[bytes]]]:
        """Which members get the pointers of which chunks.

        A walk to a chunk finds its 20 closest servers. All servers that share more bits with it than the farthest of them
        are among these, so the walk also serves every other chunk in that part of the key space.
        """
        places = await places_of(held.digests())
        order = list(places.keys)
        per_peer: dict[bytes, tuple[Contact, list[bytes]]] = {}
        at = 0
        while at < len(order):
            walked = await self.kad.find_closest(SHA256_MULTIHASH_PREFIX + places.digests[order[at]])
            servers = ContactSet(walked)
            bits = 0
            if len(walked) >= WIDTH:
                bits = shared_bits(order[at], kad_key(walked[-1].peer)) + 1
            known = KeySet(servers.keys.subtree(order[at], bits))
            whole = [order[at]]
            if len(known) >= MEMBERS_PER_CHUNK:
                whole = [key for key in places.keys.subtree(order[at], bits) if key >= order[at]]
            for number, place in enumerate(whole, 1):
                for contact in servers.closest(place, MEMBERS_PER_CHUNK):
                    per_peer.setdefault(contact.peer, (contact, []))[1].append(places.digests[place])
                if number % KEYS_BETWEEN_CHECKPOINTS == 0:
                    await trio.lowlevel.checkpoint()
            for contact in walked:
                self._servers.put(contact)
            at += len(whole)
        shares = list(per_peer.values())
        # from a place of our own: holders that begin at once would otherwise all meet at the same members
        start = int(self._random() * len(shares))
        return shares[start:] + shares[:start]

    async def _offer(self, contact: Contact, share: Share) -> Reply | None:
        reply = await self._ask(contact, share.offer())
        if reply is not None and reply.verdict is Verdict.LACK:
            reply = await self._ask(contact, share)
            self.sent_pointers += len(share.prefixes) // pointers.POINTER_BYTES
        return reply

    async def _ask(self, contact: Contact, request: records.Request) -> Reply | None:
        """A request to a member; None when it cannot be reached or does not speak the protocol."""
        try:
            with trio.fail_after(SEND_SECONDS):
                answer = await self.kad.network.ask(
                    contact, records.PROTOCOL, records.encode_request(request)
                )
            return records.decode_reply(answer)
        except (P2pgzError, trio.TooSlowError):
            self._servers.discard(contact.peer)
            return None

    # -- who joins

    async def _hand_over(self, nursery: trio.Nursery) -> None:
        while self._joined:
            _, contact = self._joined.popitem(last=False)
            if not self._keys and not self._held:
                continue
            self._servers.put(contact)
            places = {kad_key(key): key for key in self._keys}
            await trio.lowlevel.checkpoint()
            wanted = KeySet(places).wanting(kad_key(contact.peer), self._members(contact), WIDTH)
            if wanted:
                keys = [places[place] for place in wanted]
                await self._for_each([(contact, keys)], self._tell_records)
            for toc in list(self._held):
                if toc in self._standby:
                    nursery.start_soon(self._hand_over_later, contact, toc)
                else:
                    await self._hand_over_pointers(contact, toc)

    def _members(self, newcomer: Contact) -> KeySet:
        """The places of all servers that we know, with the newcomer's."""
        members = KeySet([*self._servers.keys, *self.kad.table.contacts().keys])
        members.add(kad_key(newcomer.peer))
        return members

    async def _hand_over_later(self, contact: Contact, toc: bytes) -> None:
        await trio.sleep(STANDBY_DELAY_SECONDS * self._random())
        await self._hand_over_pointers(contact, toc)

    async def _hand_over_pointers(self, contact: Contact, toc: bytes) -> None:
        held = self._held.get(toc)
        if held is None or self._epochs.get(contact.peer, (None, 0.0))[0] is None:
            return
        members = self._members(contact)
        if len(members) < WIDTH:
            return
        places = await places_of(held.digests())
        wanted = places.keys.wanting(kad_key(contact.peer), members, MEMBERS_PER_CHUNK)
        if wanted:
            digests = [places.digests[place] for place in wanted]
            await self._offer(contact, Share.of(toc, digests, complete=held.complete))

    # -- upkeep

    async def _look_around(self) -> None:
        while True:
            if len(self.kad.table) == 0:
                await self.kad.join(self._bootstrap(), self._random)
            else:
                await self.kad.refresh(self._random)
            pause = (
                REFRESH_SECONDS * (0.8 + 0.4 * self._random()) if len(self.kad.table) else RETRY_SECONDS / 4
            )
            await trio.sleep(pause)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self.kad.records.sweep(self._now())
            self.kad.pointers.sweep(self._now())
