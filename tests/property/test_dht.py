"""Properties of the DHT's decisions: closeness against the definition, walks over random networks, parsers against junk."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgz.core.keyspace import Contact, ContactSet, KeySet, kad_key, shared_bits
from p2pgz.core.lookup import MAX_ASKED, PARALLEL, WIDTH, Lookup
from p2pgz.core.pointers import POINTER_BYTES, Offer, PointerStore, Share, Verdict
from p2pgz.core.records import (
    Greeting,
    Reply,
    Withdrawal,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from p2pgz.errors import PeerFault

# keys that crowd together exercise the deep ends of the tree as uniform ones never do
keys = st.one_of(
    st.integers(0, (1 << 256) - 1),
    st.integers(0, 300),
    st.integers(0, 300).map(lambda low: (1 << 256) - 1 - low),
)
seeds = st.integers(0, 1 << 32)


def contact(number: int) -> Contact:
    return Contact(b"\x12\x20" + number.to_bytes(32, "big"), (b"address",))


@given(st.sets(keys, max_size=120), keys, st.integers(1, 40))
@settings(max_examples=200)
def test_closest_is_what_sorting_by_distance_gives(members: set[int], target: int, count: int) -> None:
    assert sorted(members, key=target.__xor__)[:count] == KeySet(members).closest(target, count)


@given(st.sets(keys, min_size=1, max_size=60), st.sets(keys, max_size=60), st.integers(1, 5), st.data())
def test_wanting_is_who_has_the_newcomer_among_its_closest(
    members: set[int], places: set[int], count: int, data: st.DataObject
) -> None:
    newcomer = data.draw(st.sampled_from(sorted(members)))
    among = KeySet(members)
    expected = [place for place in places if newcomer in among.closest(place, count)]
    assert sorted(expected) == sorted(KeySet(places).wanting(newcomer, among, count))


@given(st.sets(keys, max_size=60), keys, st.integers(0, 256))
def test_subtree_holds_the_keys_of_that_prefix(members: set[int], key: int, bits: int) -> None:
    expected = sorted(member for member in members if shared_bits(member, key) >= bits)
    assert expected == KeySet(members).subtree(key, bits)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_key_set_is_a_set(steps: list[tuple[bool, int]]) -> None:
    ours, model = KeySet(), set[int]()
    for add, key in steps:
        if add:
            ours.add(key)
            model.add(key)
        else:
            ours.discard(key)
            model.discard(key)
        assert sorted(model) == list(ours)
        assert (key in model) is (key in ours)
        assert len(model) == len(ours)


@given(st.integers(1, 150), seeds)
@settings(max_examples=40)
def test_walk_finds_the_closest_of_a_network_that_knows_its_neighbourhoods(size: int, seed: int) -> None:
    """Every server knows its 20 nearest and a few far ones; a fifth of them is dead, some answers come out of order."""
    choose = random.Random(seed)
    servers = [contact(number) for number in range(size)]
    everyone = ContactSet(servers)
    dead = set(choose.sample([each.peer for each in servers[1:]], k=(size - 1) // 5))
    target = b"target %d" % seed
    lookup = Lookup(target, own=b"me", start=servers[:1], wanted=0)
    flying: list[Contact] = []
    asked: list[bytes] = []
    while not lookup.finished:
        new = lookup.next()
        flying += new
        asked += [each.peer for each in new]
        assert len(flying) <= PARALLEL + lookup.asked
        assert flying, "neither finished nor anybody to ask"
        one = flying.pop(choose.randrange(len(flying)))
        if choose.random() < 0.1:
            lookup.slow(one.peer)
        if one.peer in dead:
            lookup.failed(one.peer)
        else:
            known = everyone.closest(kad_key(one.peer), 21) + choose.sample(servers, k=min(10, size))
            lookup.answered(one.peer, ContactSet(known).closest(lookup.target, WIDTH))
    assert len(set(asked)) == len(asked) <= MAX_ASKED
    alive = ContactSet(each for each in servers if each.peer not in dead)
    assert alive.closest(lookup.target, 3) == lookup.closest(3)


@given(st.integers(0, 1 << 30), seeds)
@settings(max_examples=30)
def test_walk_ends_when_every_answer_makes_up_closer_peers(seed: int, made_up: int) -> None:
    choose = random.Random(seed ^ made_up)
    lookup = Lookup(b"target", own=b"me", start=[contact(0)])
    while not lookup.finished:
        for one in lookup.next():
            lies = [contact(choose.getrandbits(256)) for _ in range(200)]
            lookup.answered(one.peer, lies)
    assert lookup.asked <= MAX_ASKED


proofs = st.lists(st.binary(min_size=32, max_size=32), max_size=2).map(tuple)
requests = st.one_of(
    st.builds(Greeting, st.binary(min_size=8, max_size=8), proofs),
    st.builds(
        Offer,
        st.binary(min_size=32, max_size=32),
        st.booleans(),
        st.integers(0, (1 << 32) - 1),
        st.binary(min_size=32, max_size=32),
    ),
    st.builds(
        lambda toc, digests, complete: Share.of(toc, digests, complete=complete),
        st.binary(min_size=32, max_size=32),
        st.lists(st.binary(min_size=32, max_size=32), max_size=20),
        st.booleans(),
    ),
    st.builds(Withdrawal, st.lists(st.binary(min_size=1, max_size=80), max_size=9).map(tuple)),
)


@given(requests)
def test_requests_survive_the_wire(request: Greeting | Offer | Share | Withdrawal) -> None:
    assert request == decode_request(encode_request(request))


@given(
    st.builds(Reply, st.binary(min_size=8, max_size=8), st.sampled_from(Verdict), st.integers(0, 255), proofs)
)
def test_replies_survive_the_wire(reply: Reply) -> None:
    assert reply == decode_reply(encode_reply(reply))


@given(requests, st.binary(max_size=80), seeds)
def test_damaged_records_are_parsed_or_refused(
    request: Greeting | Offer | Share | Withdrawal, junk: bytes, seed: int
) -> None:
    choose = random.Random(seed)
    whole = bytearray(encode_request(request))
    at = choose.randrange(len(whole))
    for message in (junk, bytes(whole[:at]), bytes(whole[:at]) + junk + bytes(whole[at:])):
        for decode in (decode_request, decode_reply):
            try:
                decode(message)
            except PeerFault:
                continue


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 3),
            st.sets(st.integers(0, 12)),
            st.booleans(),
            st.integers(0, 90_000),
        )
    )
)
@settings(max_examples=60)
def test_pointers_count_what_they_index(steps: list[tuple[int, int, set[int], bool, int]]) -> None:
    store, now = PointerStore(), 0.0
    for toc, sender, chunks, complete, passed in steps:
        now += passed
        digests = [bytes([chunk]) * 32 for chunk in chunks]
        share = Share.of(bytes([toc]) * 32, digests, complete=complete)
        if store.offered(bytes([sender]), share.offer(), now) is Verdict.LACK:
            assert store.put(bytes([sender]), share, now) is Verdict.HAVE
            for digest in digests:
                assert share.toc in store.tocs(digest, now)
        assert bytes([sender]) in store.senders(share.toc, now)
        store.sweep(now)
        assert len(store) == sum(len(held.prefixes) // POINTER_BYTES for held in store._sets.values())
        assert len(store) == sum(len(sets) for sets in store._index.values())
