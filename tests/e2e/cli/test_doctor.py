"""`p2pgz doctor` on real nodes: what is well, what a broken configuration costs, and a byte that came from a peer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli.fake_registry_thread import RegistryThread
from tests.e2e.cli.images import FILES, push_converted
from tests.e2e.cli.running import P2pgz, until

pytestmark = pytest.mark.root
PEER = {
    "P2PGZ_PEERS__LISTEN": "/ip4/127.0.0.1/tcp/0",
    "P2PGZ_FETCH__FILL": "false",
    "P2PGZ_HTTP__LISTEN": "127.0.0.1:0",
}


def checks(document: dict[str, object]) -> dict[tuple[str, str], str]:
    """(check, state) → what was found."""
    return {(row["check"], row["state"]): row["found"] for row in document["checks"]}


def test_a_byte_really_comes_from_a_peer(
    make_p2pgz: Callable[..., P2pgz], registry: RegistryThread, home: Path
) -> None:
    first, second = make_p2pgz("first", **PEER), make_p2pgz("second", **PEER)
    reference = push_converted(first, home / "image", f"{registry.address}/team/app:1", FILES)
    first.start_node()
    first.ok("seed", "--plain-http", reference)
    [address] = first.status()["node"]["addrs"]
    second.start_node(P2PGZ_PEERS__BOOTSTRAP=address)
    until(lambda: second.status()["peers"], "a connection")
    bootstrap = {"P2PGZ_PEERS__BOOTSTRAP": address}
    found = checks(second.ok("doctor", "--plain-http", "--json", reference, **bootstrap).json())
    assert "bytes came from peers" in found["a byte", "ok"]
    assert ("registry", "ok") in found
    assert ("credentials", "ok") in found
    assert ("peers", "ok") in found
    assert not [check for check, state in found if state == "failed"]
    assert "others reach this node" in found_on(first)


def found_on(p2pgz: P2pgz) -> str:
    return p2pgz.ok("doctor").out


def test_each_failure_says_what_to_do_and_the_others_are_looked_at(p2pgz: P2pgz, home: Path) -> None:
    (home / "config.toml").write_text("[pool]\nquota = 1\n")
    done = p2pgz.run("--config", home / "config.toml", "doctor", "--plain-http", "localhost:1/team/app:1")
    assert done.code == 1
    assert "FAIL  config" in done.out
    assert "FAIL  registry" in done.out
    assert "ok    kernel" in done.out
    assert "cannot connect" in done.out
    assert done.out.count("→") >= 2
    assert "checks failed" in done.err
    assert not (home / "state" / "pool").exists(), "looking starts no node and makes no pool"
