"""Nodes in processes of their own that know each other, all on the loopback interface."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.cli.running import P2pgz

LISTEN = "/ip4/127.0.0.1/tcp/0"
WITHIN_SECONDS = 15.0


class SwarmNode(P2pgz):
    """`p2pgz node` with peers."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.root = folder / "root"
        """a mount point"""
        self.root.mkdir(parents=True)
        super().__init__(
            folder / "state", **{"P2PGZ_PEERS__LISTEN": LISTEN, "P2PGZ_FETCH__FILL": "false", **environment}
        )

    def join(self, *others: SwarmNode, **environment: str) -> SwarmNode:
        """Start, with the others' addresses to begin with."""
        bootstrap = ",".join(address for other in others for address in other.addresses())
        self.start_node(P2PGZ_PEERS__BOOTSTRAP=bootstrap, **environment)
        return self

    def addresses(self) -> list[str]:
        """Where peers reach it."""
        found: list[str] = self.status()["node"]["addrs"]
        return found

    def peer_ids(self) -> set[str]:
        """The peers it has connections with."""
        return {peer["peer_id"] for peer in self.status()["peers"]}

    def sources(self) -> dict[str, Any]:
        """What each kind of source has supplied."""
        found: dict[str, Any] = self.status()["sources"]
        return found


@contextmanager
def swarm(folder: Path, count: int, **environment: str) -> Iterator[list[SwarmNode]]:
    """Nodes that are not started yet; all ended with the block."""
    nodes = [SwarmNode(folder / f"n{number}", **environment) for number in range(count)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.close()


def wait_until(condition: Callable[[], object], seconds: float = WITHIN_SECONDS) -> None:
    """Look again and again until something holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def hashes_below(root: Path) -> dict[str, str]:
    """The sha256 of each regular file of a tree."""
    return {
        os.path.relpath(Path(folder) / name, root): hashlib.sha256(
            (Path(folder) / name).read_bytes()
        ).hexdigest()
        for folder, _, names in os.walk(root)
        for name in names
    }
