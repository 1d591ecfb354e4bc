"""Who provides a chunk or document, and how that is known: this host's pool, peers' bitmaps, the DHT.

Called by the node for `p2pgz find`. What is not for every peer is as unknown here as it is to others: what this says of an
image must not depend on whether it is private or nowhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.errors import ImageNotFound
from p2pgz.fetch.discovery import Discovery

if TYPE_CHECKING:
    from p2pgz.p2p.dht import Dht

# A node that has just started first loads its DHT and joins
READY_SECONDS: Final = 5.0
READY_LOOK_SECONDS: Final = 0.05

Told = Callable[[dict[str, Any]], Awaitable[None]]


async def find(
    discovery: Discovery, digest: Digest, *, own: Contact, seconds: float, has_dht: bool, told: Told
) -> dict[str, Any]:
    """Tell of each provider as it is found; returns when all have been asked, or after so many seconds.

    `has_dht`: there is one, or it is being opened. Raises ImageNotFound when nobody provides it.
    """
    began = trio.current_time()
    found: set[bytes] = set()

    async def tell(peer: bytes, addresses: Iterable[bytes], how: str, **more: Any) -> None:
        found.add(peer)
        document = {"peer_id": str(PeerId(peer)), "addrs": _texts(addresses), "found": how, **more}
        await told(document)

    if discovery.holdings.holds(digest.raw):
        await tell(own.peer, own.addresses, "pool")
    for contact in discovery.holdings.holders(digest.raw):
        await tell(contact.peer, contact.addresses, "bitmap")
    finished = False
    with trio.move_on_after(seconds):
        dht = await _ready(discovery) if has_dht else None
        if dht is not None:
            from p2pgz.p2p.finding import finding  # imports libp2p, which the DHT has loaded

            async with finding(dht.kad, digest) as sightings:
                async for each in sightings:
                    more = {"server": str(PeerId(each.server))} if each.server != each.contact.peer else {}
                    if each.toc is not None:
                        more["toc"] = str(each.toc)
                    await tell(each.contact.peer, each.contact.addresses, str(each.how), **more)
        finished = True
    if not found:
        raise ImageNotFound(
            f"{digest}: nobody provides it, as far as is known here", hint=_hint(discovery, finished)
        )
    return {
        "digest": str(digest),
        "cid": str(digest.cid()),
        "providers": len(found),
        "finished": finished,
        "seconds": round(trio.current_time() - began, 6),
    }


async def _ready(discovery: Discovery) -> Dht | None:
    """The DHT once it knows anybody; None when there is none, or none soon."""
    with trio.move_on_after(READY_SECONDS):
        while True:
            if discovery.dht is not None and len(discovery.dht.kad.table):
                return discovery.dht
            await trio.sleep(READY_LOOK_SECONDS)
    return discovery.dht


def _hint(discovery: Discovery, finished: bool) -> str:
    if discovery.dht is None:
        return "this node has no DHT: only peers that it is connected with were looked at"
    if not len(discovery.dht.kad.table):
        return "this node knows no other member of the DHT: see peers.bootstrap"
    if not finished:
        return "not everybody answered in time: --timeout gives them longer"
    return ""


def _texts(addresses: Iterable[bytes]) -> list[str]:
    texts = []
    for raw in addresses:
        try:
            texts.append(str(PeerAddress.from_bytes(raw)))
        except ValueError:  # of a transport that we do not speak
            continue
    return texts
