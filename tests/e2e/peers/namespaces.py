"""Two network namespaces with a cable between them that can be cut, for nodes on "hosts" of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.peers.swarm import SwarmNode


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """A namespace and its address on the cable."""

    namespace: str
    address: str

    def node(self, folder: Path, **environment: str) -> HostNode:
        """A node that lives there; not started."""
        return HostNode(self, folder, P2PGZ_PEERS__LISTEN=f"/ip4/{self.address}/tcp/0", **environment)


class HostNode(SwarmNode):
    """A node in a namespace. Its control socket is a file, so that commands need not be there."""

    def __init__(self, host: Host, folder: Path, **environment: str) -> None:
        super().__init__(folder, **environment)
        self._host = host

    def command(self, *words: str | Path) -> list[str]:
        inside = ["ip", "netns", "exec", self._host.namespace] if words[0] == "node" else []
        return [*inside, *super().command(*words)]


@dataclass(frozen=True)
class Cable:
    """What connects the two."""

    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """Packets are lost without a word, as when a switch dies."""
        self._set("down")

    def mend(self) -> None:
        """They pass again."""
        self._set("up")

    def _set(self, state: str) -> None:
        _ip("-n", self.hosts[0].namespace, "link", "set", "cable", state)


@contextmanager
def two_hosts() -> Iterator[Cable]:
    """Both namespaces, up and connected, gone after the block."""
    hosts = tuple(Host(f"p2pgz-{os.getpid()}-{n}", f"10.213.77.{n}") for n in (1, 2))
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        one, other = (host.namespace for host in hosts)
        _ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.namespace, "link", "set", "cable", "up")
        yield Cable((hosts[0], hosts[1]))
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.namespace)
