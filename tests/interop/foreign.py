"""Members of the DHT of other makes: a program on go-libp2p-kad-dht, and py-libp2p's own KadDHT."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pgz.core.keyspace import Contact

SOURCE = Path(__file__).parent / "dht_peer"
CACHE = Path(__file__).parents[2] / ".cache"


def built_go_peer() -> Path:
    """The Go program, built once for its sources: the build takes a minute where nothing is cached."""
    sources = [SOURCE / name for name in ("go.mod", "go.sum", "main.go")]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"dht_peer-{name}"
    if not program.exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run(["go", "build", "-o", f"{program}.new", "."], cwd=SOURCE, check=True, timeout=280)
        Path(f"{program}.new").rename(program)
    return program


@asynccontextmanager
async def library_dht(contact: Contact) -> AsyncIterator[tuple[Any, Any]]:
    """py-libp2p's KadDHT under our protocol id, which it takes from a constant of each of its modules."""
    from libp2p.custom_types import TProtocol
    from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr

    from p2pgz.p2p.libp2p_parts import make_host

    modules = [
        importlib.import_module(f"libp2p.kad_dht.{name}")
        for name in ("common", "provider_store", "value_store", "peer_routing", "kad_dht")
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "PROTOCOL_ID", TProtocol("/p2pgz/kad/1.0.0"))
        listener_port = await free_port()
        address = f"/ip4/127.0.0.1/tcp/{listener_port}"
        host = make_host(b"7" * 32, [address])
        async with host.run(listen_addrs=[Multiaddr(address)]):
            theirs = KadDHT(host, DHTMode.SERVER)
            async with background_trio_service(theirs):
                info = PeerInfo(ID(contact.peer), [Multiaddr(raw) for raw in contact.addresses])
                await host.connect(info)
                await theirs.routing_table.add_peer(info)
                yield host, theirs
            # stopped with connections, it leaves their sockets to the collector
            for peer in host.get_connected_peers():
                await host.disconnect(peer)


async def free_port() -> int:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    return port
