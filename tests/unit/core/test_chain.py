"""Chain ids as other tools compute them."""

from __future__ import annotations

from hashlib import sha256

from p2pgz.core.chain import chain_ids
from p2pgz.core.digest import Digest


def test_the_lowest_layer_is_its_own_chain_and_each_other_one_hashes_what_is_below() -> None:
    first, second, third = (Digest.of(text) for text in (b"a", b"b", b"c"))
    two = "sha256:" + sha256(f"{first} {second}".encode()).hexdigest()
    three = "sha256:" + sha256(f"{two} {third}".encode()).hexdigest()
    assert [str(digest) for digest in chain_ids([first, second, third])] == [str(first), two, three]


def test_no_layers_no_chains() -> None:
    assert chain_ids([]) == []
