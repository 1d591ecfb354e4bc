"""The DHT's decisions one by one: routing table, provider records, renewals, pointers, records on the wire."""

from __future__ import annotations

import hashlib
import random

import pytest

from p2pgz.core import pointers, providers, records
from p2pgz.core.kbuckets import BUCKET_PEERS, SPARE_PEERS, STALE_AFTER_SECONDS, RoutingTable
from p2pgz.core.keyspace import Contact, ContactSet, KeySet, kad_key, shared_bits
from p2pgz.core.lookup import MAX_ADDRESSES, Lookup
from p2pgz.core.pointers import Offer, PointerStore, Share, Verdict
from p2pgz.core.providers import ProviderStore, Renewals
from p2pgz.core.records import Greeting, Withdrawal, decode_reply, decode_request
from p2pgz.errors import PeerFault

OWN = b"own"
NOW = 1000.0


def contact(number: int, *addresses: bytes) -> Contact:
    return Contact(b"peer %d" % number, addresses or (b"address",))


def digest(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def in_bucket(bits: int, count: int) -> list[Contact]:
    found = []
    number = 0
    while len(found) < count:
        if shared_bits(kad_key(contact(number).peer), kad_key(OWN)) == bits:
            found.append(contact(number))
        number += 1
    return found


class TestContactSet:
    def test_keeps_the_latest_of_a_peer_and_finds_it(self) -> None:
        known = ContactSet([contact(1), contact(2)])
        known.put(contact(1, b"new"))
        assert contact(1, b"new") == known.get(b"peer 1")
        assert known.get(b"peer 3") is None
        assert b"peer 2" in known
        assert 2 == len(known) == len(known.keys) == len(list(known))

    def test_forgets(self) -> None:
        known = ContactSet([contact(1)])
        known.discard(b"peer 1")
        known.discard(b"peer 1")
        assert known.closest(0, 5) == []


class TestRoutingTable:
    def test_takes_a_bucketful_and_keeps_the_rest_as_spares(self) -> None:
        table = RoutingTable(OWN)
        peers = in_bucket(0, BUCKET_PEERS + SPARE_PEERS + 2)
        assert [table.seen(peer, NOW) for peer in peers[:BUCKET_PEERS]] == [True] * BUCKET_PEERS
        assert not any(table.seen(peer, NOW) for peer in peers[BUCKET_PEERS:])
        assert BUCKET_PEERS == len(table) == len(list(table))

    def test_one_that_fails_twice_gives_way_to_the_spare_heard_of_last(self) -> None:
        table = RoutingTable(OWN)
        peers = in_bucket(0, BUCKET_PEERS + 2)
        for peer in peers:
            table.seen(peer, NOW)
        assert not table.failed(peers[0].peer, NOW)
        assert table.failed(peers[0].peer, NOW)
        assert table.get(peers[0].peer) is None
        assert peers[-1] == table.get(peers[-1].peer)
        assert not table.failed(b"unknown", NOW)

    def test_one_that_fails_twice_leaves_its_place_empty_where_nobody_waits(self) -> None:
        table = RoutingTable(OWN)
        table.seen(contact(1), NOW)
        assert [table.failed(b"peer 1", NOW) for _ in range(2)] == [False, True]
        assert len(table) == 0

    def test_an_answer_forgives_a_failure_and_brings_new_addresses(self) -> None:
        table = RoutingTable(OWN)
        table.seen(contact(1), NOW)
        for _ in range(3):
            table.failed(b"peer 1", NOW)
            assert not table.seen(contact(1, b"moved"), NOW)
        assert contact(1, b"moved") == table.get(b"peer 1")

    def test_one_not_heard_from_for_long_gives_way(self) -> None:
        table = RoutingTable(OWN)
        peers = in_bucket(0, BUCKET_PEERS + 1)
        for peer in peers[:-1]:
            table.seen(peer, NOW)
        assert table.seen(peers[-1], NOW + STALE_AFTER_SECONDS)
        assert table.get(peers[0].peer) is None

    def test_refuses_ourselves_and_who_cannot_be_reached(self) -> None:
        table = RoutingTable(OWN)
        assert not table.seen(Contact(OWN, (b"address",)), NOW)
        assert not table.seen(Contact(b"peer"), NOW)

    def test_discard_forgets_entry_and_spare(self) -> None:
        table = RoutingTable(OWN)
        peers = in_bucket(0, BUCKET_PEERS + 1)
        for peer in peers:
            table.seen(peer, NOW)
        table.discard(peers[-1].peer)
        table.discard(peers[0].peer)
        table.discard(b"unknown")
        assert len(table) == BUCKET_PEERS - 1

    def test_thin_buckets_are_those_with_room(self) -> None:
        table = RoutingTable(OWN)
        for peer in [*in_bucket(0, BUCKET_PEERS), *in_bucket(2, 1)]:
            table.seen(peer, NOW)
        assert table.thin_buckets(10) == [1, 2]
        assert table.thin_buckets(1) == [1]

    def test_knows_the_closest_of_what_it_holds(self) -> None:
        table = RoutingTable(OWN)
        for number in range(300):
            table.seen(contact(number), NOW)
        target = kad_key(b"target")
        expected = sorted(table, key=lambda each: kad_key(each.peer) ^ target)[:20]
        assert expected == table.closest(target, 20) == table.contacts().closest(target, 20)


def test_keys_that_are_sorted_already_make_the_same_set() -> None:
    keys = sorted(kad_key(b"%d" % number) for number in range(100))
    target = kad_key(b"target")
    assert KeySet.of_sorted(list(keys)).closest(target, 20) == KeySet(keys).closest(target, 20)


class TestLookup:
    def test_stops_at_as_many_providers_as_wanted(self) -> None:
        lookup = Lookup(b"target", own=OWN, start=[contact(1), contact(2)], wanted=1)
        (first, *_) = lookup.next()
        assert [contact(9)] == lookup.answered(first.peer, [], [contact(9), contact(9)])
        assert lookup.finished
        assert lookup.next() == []

    def test_a_provider_is_new_again_when_its_address_becomes_known(self) -> None:
        lookup = Lookup(b"target", own=OWN, start=[])
        assert [Contact(b"p")] == lookup.learned([Contact(b"p")])
        assert [Contact(b"p", (b"a",))] == lookup.learned([Contact(b"p", (b"a",))])
        assert lookup.learned([Contact(b"p"), Contact(b"p", (b"a",))]) == []
        assert [Contact(b"p", (b"b", b"a"))] == lookup.learned([Contact(b"p", (b"b",))])
        many = [Contact(b"p", (b"%d" % number,)) for number in range(100)]
        assert len(lookup.learned(many)) == MAX_ADDRESSES - 2

    def test_answers_of_nobody_asked_count_for_nothing(self) -> None:
        lookup = Lookup(b"target", own=OWN, start=[contact(1)])
        assert lookup.answered(b"peer 1", [contact(2)], [contact(3)]) == []
        lookup.failed(b"peer 1")
        lookup.slow(b"peer 1")
        assert [contact(1)] == lookup.next()

    def test_neither_ourselves_nor_the_unreachable_are_asked(self) -> None:
        lookup = Lookup(b"target", own=OWN, start=[Contact(OWN, (b"address",)), Contact(b"nowhere")])
        assert lookup.next() == []
        assert lookup.finished

    def test_slow_peer_frees_its_place_and_still_counts(self) -> None:
        lookup = Lookup(b"target", own=OWN, start=[contact(number) for number in range(10)])
        first = lookup.next()
        assert lookup.next() == []
        lookup.slow(first[0].peer)
        assert len(lookup.next()) == 1
        lookup.answered(first[0].peer, [])
        assert [first[0]] == lookup.closest()


class TestProviderStore:
    def test_record_lives_an_hour_and_renewal_prolongs_it(self) -> None:
        store = ProviderStore()
        assert store.add(b"key", contact(1), NOW)
        assert store.add(b"key", contact(2), NOW + 1800)
        assert [contact(2), contact(1)] == store.providers(b"key", NOW + 3599)
        assert [contact(2)] == store.providers(b"key", NOW + 3600)
        assert 1 == store.sweep(NOW + 3600) == len(store)
        assert store.add(b"key", contact(2), NOW + 3700)
        assert [contact(2)] == store.providers(b"key", NOW + 3700 + 3599)

    def test_withdrawal_takes_only_the_peers_own_record(self) -> None:
        store = ProviderStore()
        store.add(b"key", contact(1), NOW)
        store.remove(b"key", b"peer 2")
        store.remove(b"other", b"peer 1")
        assert [contact(1)] == store.providers(b"key", NOW)
        store.remove(b"key", b"peer 1")
        assert len(store) == 0

    def test_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = ProviderStore()
        assert not store.add(b"", contact(1), NOW)
        assert not store.add(b"k" * 81, contact(1), NOW)
        monkeypatch.setattr(providers, "MAX_KEYS_PER_PEER", 2)
        assert [store.add(b"%d" % key, contact(1), NOW) for key in range(3)] == [True, True, False]
        monkeypatch.setattr(providers, "MAX_PROVIDERS_PER_KEY", 2)
        for number in (2, 3):
            assert store.add(b"0", contact(number), NOW + number)
        assert [contact(3), contact(2)] == store.providers(b"0", NOW)
        monkeypatch.setattr(providers, "MAX_RECORDS", len(store))
        assert not store.add(b"new", contact(7), NOW)


class TestRenewals:
    def test_due_at_once_then_every_half_hour_or_so(self) -> None:
        renewals = Renewals(random.Random(1).random)
        renewals.add(b"key", NOW)
        renewals.add(b"key", NOW + 5)
        assert renewals.next_due() == NOW
        assert renewals.due(NOW) == [b"key"]
        assert renewals.due(NOW) == []
        gaps = []
        last = NOW
        for _ in range(200):
            now = renewals.next_due()
            assert now is not None
            assert renewals.due(now) == [b"key"]
            gaps.append(now - last)
            last = now
        assert 0.8 * 1800 <= min(gaps) < 0.83 * 1800
        assert 1.17 * 1800 < max(gaps) <= 1.2 * 1800
        assert max(gaps) * 2 < providers.EXPIRES_AFTER_SECONDS * 1.21, "one lost renewal must not matter"

    def test_removed_and_retried(self) -> None:
        renewals = Renewals(lambda: 0.5)
        renewals.add(b"a", NOW)
        renewals.add(b"b", NOW)
        renewals.due(NOW)
        renewals.retry(b"a", NOW + 60)
        renewals.retry(b"unknown", NOW + 1)
        renewals.remove(b"b")
        renewals.remove(b"b")
        assert renewals.next_due() == NOW + 60
        assert renewals.due(NOW + 3600) == [b"a"]
        assert list(renewals) == [b"a"]
        assert b"a" in renewals
        assert len(renewals) == 1
        renewals.remove(b"a")
        assert renewals.next_due() is None


class TestPointers:
    toc = digest(1000)

    def share(self, *numbers: int, complete: bool = True) -> Share:
        return Share.of(self.toc, [digest(number) for number in numbers], complete=complete)

    def test_live_a_day_and_are_renewed_by_an_offer(self) -> None:
        store = PointerStore()
        share = self.share(1, 2)
        assert Verdict.LACK is store.offered(b"a", share.offer(), NOW)
        assert Verdict.HAVE is store.put(b"a", share, NOW)
        assert Verdict.HAVE is store.offered(b"b", share.offer(), NOW + 3600)
        day = pointers.EXPIRES_AFTER_SECONDS
        assert [self.toc] == store.tocs(digest(1), NOW + day)
        assert store.senders(self.toc, NOW + day) == [b"b"]
        assert store.senders(self.toc, NOW, but=b"b") == [b"a"]
        assert store.tocs(digest(1), NOW + 3600 + day) == []
        assert store.sweep(NOW + 3600 + day) == 1
        assert len(store) == 0
        assert store.senders(self.toc, NOW) == []

    def test_complete_replaces_and_partial_adds(self) -> None:
        store = PointerStore()
        store.put(b"a", self.share(1, 2, complete=False), NOW)
        store.put(b"b", self.share(2, 3, complete=False), NOW)
        assert len(store) == 3
        assert Verdict.LACK is store.offered(b"c", self.share(4).offer(), NOW)
        store.put(b"c", self.share(4, 5), NOW)
        assert [[], [self.toc]] == [store.tocs(digest(number), NOW) for number in (1, 4)]
        assert Verdict.HAVE is store.offered(b"d", self.share(9, complete=False).offer(), NOW)
        assert Verdict.HAVE is store.put(b"d", self.share(9, complete=False), NOW)
        assert store.tocs(digest(9), NOW) == []

    def test_one_member_more_or_less_is_not_worth_sending_again(self) -> None:
        store = PointerStore()
        store.put(b"a", self.share(*range(20)), NOW)
        assert Verdict.HAVE is store.offered(b"b", self.share(*range(1, 21)).offer(), NOW)
        assert Verdict.LACK is store.offered(b"b", self.share(*range(40)).offer(), NOW)

    def test_a_chunk_of_several_tocs_names_the_complete_ones_first(self) -> None:
        store = PointerStore()
        partial = Share.of(digest(2000), [digest(1)], complete=False)
        store.put(b"a", partial, NOW)
        store.put(b"a", self.share(1), NOW)
        assert [self.toc, digest(2000)] == store.tocs(digest(1), NOW)
        store.sweep(NOW + pointers.EXPIRES_AFTER_SECONDS)
        assert store.tocs(digest(1), NOW) == []

    def test_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = PointerStore()
        monkeypatch.setattr(pointers, "MAX_POINTERS", 2)
        assert Verdict.FULL is store.offered(b"a", self.share(1, 2, 3).offer(), NOW)
        assert Verdict.FULL is store.put(b"a", self.share(1, 2, 3), NOW)
        assert Verdict.HAVE is store.put(b"a", self.share(1, 2), NOW)
        monkeypatch.setattr(pointers, "MAX_SHARE_POINTERS", 1)
        assert self.share(1, 2, 3).offer().pointers == 1
        monkeypatch.setattr(pointers, "MAX_SENDERS", 2)
        for number, sender in enumerate((b"a", b"b", b"c")):
            store.offered(sender, Share.of(self.toc, [], complete=False).offer(), NOW + number)
        assert store.senders(self.toc, NOW) == [b"b", b"c"]


class TestRecords:
    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"\x00",
            b"\x01short",
            b"\x01" + bytes(9),
            b"\x01" + bytes(8 + 96),
            b"\x02" + bytes(68),
            b"\x03" + bytes(32),
            b"\x03" + bytes(33 + 15),
            b"\x03" + bytes(33) + b"b" * 16 + b"a" * 16,
            b"\x03" + bytes(33) + b"a" * 32,
            b"\x04\x00",
            b"\x04\x51" + bytes(81),
            b"\x04\x05abc",
            b"\x04" + b"\x01k" * (records.MAX_WITHDRAWN + 1),
            b"\x05",
            b"\x03" + bytes(records.MAX_MESSAGE_BYTES),
        ],
    )
    def test_malformed_requests_are_refused(self, message: bytes) -> None:
        with pytest.raises(PeerFault):
            decode_request(message)

    @pytest.mark.parametrize("message", [b"", bytes(9), bytes(8) + b"\x07\x00", bytes(11)])
    def test_malformed_replies_are_refused(self, message: bytes) -> None:
        with pytest.raises(PeerFault):
            decode_reply(message)

    def test_wire_form(self) -> None:
        assert records.encode_request(Greeting(b"epoch_01")) == b"\x01epoch_01"
        assert records.encode_request(Withdrawal((b"key", b"k"))) == b"\x04\x03key\x01k"
        offer = Offer(b"t" * 32, True, 3, b"f" * 32)
        assert records.encode_request(offer) == b"\x02" + b"t" * 32 + b"\x01\x00\x00\x00\x03" + b"f" * 32
