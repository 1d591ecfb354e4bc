"""Kademlia's messages in libp2p's protobuf form (kad-dht spec, "RPC messages"), bounded on the way in.

The only place that knows the library's generated classes. Called by `p2p.kad`; importing it imports libp2p.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import msgspec
from google.protobuf.message import DecodeError
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from p2pgz.core.keyspace import Contact
from p2pgz.core.peerid import PEER_ID_MAX_BYTES
from p2pgz.core.providers import MAX_KEY_BYTES
from p2pgz.errors import PeerFault

MAX_MESSAGE_BYTES = 1 << 20  # go-libp2p-kad-dht allows 4 MiB; 60 contacts with all their addresses take 30 KB
MAX_CONTACTS = 64  # read of each list in a message; go-libp2p sends 20
MAX_ADDRESSES = 16  # kept per contact
MAX_ADDRESS_BYTES = 256
# A field of the format that nobody uses ("coral cluster level"). With this value a GET_PROVIDERS says: answer from records
# alone. It ends the resolution of pointers after one step, however peers' pointers may point at each other.
_RECORDS_ALONE = 0x70677A


class Kind(IntEnum):
    """What a message asks for; those that we neither send nor answer are left out."""

    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


class KadMessage(msgspec.Struct, frozen=True):
    """A request or an answer; `key` is a peer id or a multihash."""

    kind: Kind
    key: bytes = b""
    closer: tuple[Contact, ...] = ()
    providers: tuple[Contact, ...] = ()
    records_alone: bool = False


def encode(message: KadMessage) -> bytes:
    """The bytes of a message."""
    wire = Message(type=Kind(message.kind).name, key=message.key)
    if message.records_alone:
        wire.clusterLevelRaw = _RECORDS_ALONE
    _put(wire.closerPeers, message.closer)
    _put(wire.providerPeers, message.providers)
    return bytes(wire.SerializeToString())


def decode(data: bytes) -> KadMessage:
    """The message in some bytes; raises PeerFault. Contacts and addresses that break a limit are left out."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerFault(f"a DHT message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    wire = Message()
    try:
        wire.ParseFromString(data)
        kind = Kind(wire.type)
    except (DecodeError, ValueError) as error:
        raise PeerFault("a DHT message is malformed, or asks for what this DHT does not keep") from error
    if len(wire.key) > MAX_KEY_BYTES:
        raise PeerFault(f"a DHT message has a key of {len(wire.key)} bytes")
    return KadMessage(
        kind=kind,
        key=wire.key,
        closer=_contacts(wire.closerPeers),
        providers=_contacts(wire.providerPeers),
        records_alone=wire.clusterLevelRaw == _RECORDS_ALONE,
    )


def _put(field: Any, contacts: Iterable[Contact]) -> None:
    for contact in contacts:
        field.add(id=contact.peer, addrs=contact.addresses)


def _contacts(field: Sequence[Any]) -> tuple[Contact, ...]:
    found: dict[bytes, Contact] = {}
    for peer in field[:MAX_CONTACTS]:
        if not 2 < len(peer.id) <= PEER_ID_MAX_BYTES or peer.id in found:
            continue
        addresses = tuple(
            address for address in peer.addrs[:MAX_ADDRESSES] if 0 < len(address) <= MAX_ADDRESS_BYTES
        )
        found[peer.id] = Contact(peer.id, addresses)
    return tuple(found.values())
