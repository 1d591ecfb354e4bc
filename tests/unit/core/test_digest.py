"""Digests, what people may type for them, and the one door for chunk bytes."""

from __future__ import annotations

import contextlib
import hashlib

import multiformats
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.verify import VerifiedChunk, verify
from p2pgz.errors import ChunkCorrupt, ImageInvalid

HEX = hashlib.sha256(b"x").hexdigest()
CID = "bafkreibnoelefnzgwbcacyt4vh52ymxvzbjq7mmqhtcnwarfq4lzegsiqe"
SHA512_CID = "bafkrgqfevpkejdcjkywyfaiv2e5b7thksj7vfngviwjjp6fuhzbnvcjdrpatmjxehxftrxnqqjeisj7msbh3iicxiq4yh2efqulz2ucvdl7ge"


def test_a_digest_is_known_by_all_its_names():
    digest = Digest.of(b"x")
    assert str(digest) == f"sha256:{HEX}"
    assert digest.hex == HEX
    assert str(digest.cid()) == CID
    assert digest.multihash == b"\x12\x20" + digest.raw
    assert {Digest.parse_any(text) for text in (HEX, f"sha256:{HEX}", CID)} == {digest}
    assert Digest.parse(f"sha256:{HEX}") == digest


@pytest.mark.parametrize("base", ["base32", "base36", "base58btc"])
@pytest.mark.parametrize("codec", ["raw", "dag-pb", "dag-cbor"])
def test_a_cid_names_the_same_digest_in_every_codec_and_base(base, codec):
    digest = Digest.of(b"x")
    assert Digest.parse_any(str(multiformats.CID(base, 1, codec, digest.multihash))) == digest


def test_a_cid_of_version_0_names_a_digest():
    digest = Digest.of(b"x")
    assert Digest.parse_any(str(multiformats.CID("base58btc", 0, "dag-pb", digest.multihash))) == digest


@given(st.binary(min_size=32, max_size=32))
def test_every_digest_survives_its_cid(raw):
    assert Digest.from_cid(str(Digest(raw).cid())) == Digest(raw)


@pytest.mark.parametrize(
    "text",
    [
        "sha256:abcd",
        f"sha256:{HEX.upper()}",
        f"sha512:{HEX}",
        f"sha256:{HEX}\n",
        "sha256:" + "a" * 500,
        "",
        5,
        None,
    ],
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ImageInvalid, match=r"layer digest: .* is not a sha256 digest"):
        Digest.parse(text, where="layer digest")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither a sha256 digest nor a CID"),
        ("latest", "neither a sha256 digest nor a CID"),
        (SHA512_CID, "not one by sha2-256"),
    ],
)
def test_other_cids_and_words_are_refused(text, says):
    with pytest.raises(ImageInvalid, match=says):
        Digest.parse_any(text)


@given(st.text(max_size=80))
def test_whatever_is_typed_parses_or_is_refused(text):
    with contextlib.suppress(ImageInvalid):
        Digest.parse_any(text)


def test_a_digest_has_32_bytes():
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        Digest(b"abc")


def test_only_right_bytes_pass_the_door():
    chunk = verify(Digest.of(b"x").raw, b"x", source="peer")
    assert (chunk.digest, bytes(chunk.data), len(chunk)) == (Digest.of(b"x").raw, b"x", 1)
    with pytest.raises(ChunkCorrupt, match=f"peer: chunk sha256:{HEX} has other bytes"):
        verify(Digest.of(b"x").raw, b"y", source="peer")
    with pytest.raises(TypeError, match="verify"):
        VerifiedChunk(Digest.of(b"x").raw, b"y", door=None)
