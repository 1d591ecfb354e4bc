"""One walk that says of each provider how it was found: what `p2pgz find` shows of the DHT.

Called by `fetch.find`. A server's answer does not say whether a name comes from a record or by way of a pointer, so each
server is asked twice: for its records alone, then for everything. Readers do not need to know and use `KadNode.providers`,
which costs half as much.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import NamedTuple

import trio

from p2pgz.core.digest import Digest
from p2pgz.core.keyspace import Contact
from p2pgz.p2p.kad import WALK_SECONDS, KadNode
from p2pgz.p2p.kadmsg import KadMessage, Kind


class How(StrEnum):
    """How a provider was found."""

    ITSELF = "itself"
    """a server on the way that has it, and says so"""
    RECORD = "record"
    """a provider record at a server, or the bitmap of a peer that the server is connected with"""
    POINTER = "pointer"
    """the server has a pointer from the chunk to a TOC, and this is a provider of that TOC"""


class Found(NamedTuple):
    """One provider; it comes again when further addresses of it become known."""

    contact: Contact
    how: How
    server: bytes
    """the peer id of the server that named it; ours when our own part of the DHT did"""
    toc: Digest | None = None
    """where the pointer leads, if it is ours: other servers do not say"""


@asynccontextmanager
async def finding(kad: KadNode, digest: Digest) -> AsyncIterator[AsyncIterator[Found]]:
    """Stream the providers of a chunk or document as they are found, ourselves left out; ends when the walk does."""
    own, key, now = kad.network.own().peer, digest.multihash, trio.current_time()
    lookup = kad.lookup(key)
    send, receive = trio.open_memory_channel[Found](math.inf)  # bounded by the answers of one walk

    def publish(contacts: list[Contact], how: How, server: bytes, toc: Digest | None = None) -> None:
        for contact in contacts:
            if contact.peer != own:
                itself = contact.peer == server
                send.send_nowait(Found(contact, How.ITSELF if itself else how, server, toc))

    async def ask(server: Contact) -> KadMessage | None:
        answer = await kad.query(server, KadMessage(Kind.GET_PROVIDERS, key, records_alone=True))
        if answer is None:
            return None
        publish(lookup.learned(answer.providers), How.RECORD, server.peer)
        return await kad.query(server, KadMessage(Kind.GET_PROVIDERS, key)) or answer

    async def follow_own_pointers() -> None:
        for toc in kad.pointed_tocs(digest.raw):
            publish(lookup.learned(await kad.providers_of_toc(toc)), How.POINTER, own, Digest(toc))

    async def walk() -> None:
        with send:
            async with trio.open_nursery() as both:
                both.start_soon(follow_own_pointers)
                with trio.move_on_after(WALK_SECONDS):
                    await kad.walk(lookup, ask, lambda server, new: publish(new, How.POINTER, server.peer))

    publish(lookup.learned(kad.records.providers(key, now)), How.RECORD, own)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(walk)
        try:
            with receive:
                yield receive
        except Exception as error:  # noqa: BLE001  # the caller's: raised below, outside the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
