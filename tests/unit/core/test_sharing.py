"""Who may see what: rules, names and proofs of images that are not for everyone; a wrong proof takes as long as any."""

from __future__ import annotations

import hashlib
import random
import re
import statistics
import time
from pathlib import Path

import pytest

from p2pgz.core.digest import Digest
from p2pgz.core.peerid import PeerId
from p2pgz.core.sharing import (
    Mode,
    Policy,
    Proofs,
    Rule,
    document_name,
    image_secret,
    private_domain,
    swarm_name,
)

WIRE = Path(__file__).parents[3] / "docs" / "reference" / "wire.md"
MANIFEST = b'{"schemaVersion":2}'
TOC = hashlib.sha256(b"toc").digest()
ASKING = PeerId.of_ed25519(bytes(range(32)))
HOLDING = PeerId.of_ed25519(bytes(range(32, 64)))
ASKING_NONCE, HOLDING_NONCE = b"a" * 32, b"h" * 32
ASKER = Proofs(own=ASKING, own_nonce=ASKING_NONCE, peer=HOLDING, peer_nonce=HOLDING_NONCE)
HOLDER = Proofs(own=HOLDING, own_nonce=HOLDING_NONCE, peer=ASKING, peer_nonce=ASKING_NONCE)
SECRET = image_secret(MANIFEST)
SWARM = swarm_name(SECRET, TOC)


@pytest.mark.skipif(not WIRE.is_file(), reason="documentation is not part of what is installed")
def test_vectors_of_the_specification() -> None:
    vectors = dict(re.findall(r"^    ([a-z ]+?) {2,}([0-9a-f]{64})$", WIRE.read_text(), re.MULTILINE))
    assert vectors == {
        "secret": SECRET.hex(),
        "swarm": SWARM.hex(),
        "document": document_name(SECRET, TOC).hex(),
        "join": ASKER.join(SECRET, SWARM).hex(),
        "answer": HOLDER.answer(SECRET, SWARM).hex(),
        "doc want": ASKER.document(SECRET, document_name(SECRET, TOC)).hex(),
    }


def test_the_secret_is_hkdf() -> None:
    """Against an implementation of somebody else's."""
    hashes = pytest.importorskip("cryptography.hazmat.primitives.hashes")
    kdf = pytest.importorskip("cryptography.hazmat.primitives.kdf.hkdf")
    theirs = kdf.HKDF(algorithm=hashes.SHA256(), length=32, salt=b"p2pgz sharing 1", info=b"image")
    assert theirs.derive(MANIFEST) == SECRET


def test_both_ends_prove_it_to_each_other() -> None:
    assert HOLDER.may_join(SECRET, SWARM, ASKER.join(SECRET, SWARM))
    assert ASKER.shares(SECRET, SWARM, HOLDER.answer(SECRET, SWARM))
    name = document_name(SECRET, TOC)
    assert HOLDER.may_have(SECRET, name, ASKER.document(SECRET, name))


def test_a_proof_is_of_no_use_elsewhere() -> None:
    proof = ASKER.join(SECRET, SWARM)
    third = PeerId.of_ed25519(b"3" * 32)
    other_connection = Proofs(own=HOLDING, own_nonce=b"n" * 32, peer=ASKING, peer_nonce=ASKING_NONCE)
    other_asker = Proofs(own=HOLDING, own_nonce=HOLDING_NONCE, peer=third, peer_nonce=ASKING_NONCE)
    other_holder = Proofs(own=third, own_nonce=HOLDING_NONCE, peer=ASKING, peer_nonce=ASKING_NONCE)
    for place in (other_connection, other_asker, other_holder):
        assert not place.may_join(SECRET, SWARM, proof)
    assert not HOLDER.may_join(SECRET, swarm_name(SECRET, bytes(32)), proof)
    assert not HOLDER.may_join(image_secret(MANIFEST + b" "), SWARM, proof)
    assert not HOLDER.may_have(SECRET, SWARM, proof)  # a join is no question for a document
    assert not ASKER.may_join(SECRET, SWARM, proof)  # nor can it be sent back
    assert not ASKER.shares(SECRET, SWARM, proof)
    assert not HOLDER.may_join(None, SWARM, proof)


def test_names_tell_nothing_and_do_not_collide() -> None:
    names = {swarm_name(SECRET, TOC), document_name(SECRET, TOC), TOC, SECRET}
    names |= {swarm_name(image_secret(b"other"), TOC), document_name(image_secret(b"other"), TOC)}
    assert len(names) == 6


def test_an_unknown_name_takes_as_long_as_a_wrong_proof() -> None:
    """Medians of batches in a shuffled order; the bound is far above noise and far below a MAC left out."""
    rng = random.Random(7)
    wrong = [rng.randbytes(32) for _ in range(40)]
    near = bytearray(ASKER.join(SECRET, SWARM))
    near[-1] ^= 1
    cases = {"unknown": (None, wrong), "wrong": (SECRET, wrong), "nearly right": (SECRET, [bytes(near)] * 40)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases) * 400
    rng.shuffle(order)
    for name in order:
        secret, proofs = cases[name]
        start = time.perf_counter()
        for proof in proofs:
            HOLDER.may_join(secret, SWARM, proof)
        seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    assert max(medians.values()) < 1.2 * min(medians.values()), medians


def test_the_first_rule_that_matches_counts() -> None:
    policy = Policy(
        [
            Rule("registry.example/secret/public", Mode.CLUSTER),
            Rule("registry.example/secret/*", Mode.NONE),
            Rule("*/tenants/*", Mode.PROOF),
            Rule("oci:/srv/*", Mode.NONE),
        ]
    )
    for repository, mode in {
        "registry.example/secret/public": Mode.CLUSTER,
        "registry.example/secret/a/b": Mode.NONE,
        "registry.example/secret": Mode.CLUSTER,
        "registry.example/secrets/a": Mode.CLUSTER,
        "other.example:5000/x/tenants/a": Mode.PROOF,
        "docker.io/library/ubuntu": Mode.CLUSTER,
        "oci:/srv/images": Mode.NONE,
        "registry.example/secret/a\nb": Mode.NONE,
    }.items():
        assert policy.mode(repository) is mode, repository
    assert Policy().mode("anything") is Mode.CLUSTER


def test_each_image_of_each_repository_has_a_domain_of_its_own() -> None:
    one, two = Digest.of(b"1"), Digest.of(b"2")
    domains = {
        private_domain(repository, manifest) for repository in ("r/a", "r/b") for manifest in (one, two, None)
    }
    assert len(domains) == 6
    assert "shared" not in domains
    assert not any("r/a" in domain for domain in domains)


def test_nonce_of_another_length_is_refused() -> None:
    ends = {"own": PeerId.of_ed25519(bytes(32)), "peer": PeerId.of_ed25519(b"\1" * 32)}
    with pytest.raises(ValueError, match="a nonce has"):
        Proofs(own_nonce=b"short", peer_nonce=bytes(32), **ends)
