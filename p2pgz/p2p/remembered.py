"""Peers of the last sessions, kept in `peers.json` of the state directory: a node finds back though its bootstrap is gone.

Called by `p2p.bootstrap`. The file is a hint and no more: whatever is wrong with it, it is set aside, the log says so, and
the node starts without. Who is dialled because of it still has to prove its id.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import structlog

from p2pgz.core.keyspace import Contact
from p2pgz.core.multiaddress import PeerAddress
from p2pgz.core.peerid import PeerId
from p2pgz.core.strictjson import parse_strict
from p2pgz.errors import P2pgzError

log = structlog.get_logger(component="bootstrap")

FILE: Final = "peers.json"
DAMAGED_FILE: Final = "peers.json.damaged"
VERSION: Final = 1
PEERS_MAX: Final = 128
ADDRESSES_MAX: Final = 4
# 128 peers of 4 addresses, 120 letters each, are 70 KB
FILE_MAX_BYTES: Final = 1 << 20
# an address that nobody answered at for a month is somebody else's by now
FORGET_SECONDS: Final = 30 * 86_400.0

Known = dict[PeerId, tuple[tuple[PeerAddress, ...], float]]


class RememberedPeers:
    """What is in the file, and what will be. Times are wall-clock seconds: they outlive the process."""

    def __init__(self, path: Path | None, known: Known | None = None) -> None:
        self._path = path
        self._known: Known = dict(known or {})
        self._changed = False

    @classmethod
    def load(cls, state_dir: Path, now: float) -> RememberedPeers:
        """Read the file; one that cannot be read is renamed to peers.json.damaged."""
        path = state_dir / FILE
        try:
            with path.open("rb") as file:
                data = file.read(FILE_MAX_BYTES + 1)
            known = _parse(data, now)
        except FileNotFoundError:
            known = {}
        except (OSError, ValueError, P2pgzError) as error:
            log.warning("peers.file_damaged", path=str(path), reason=str(error)[:200], kept_as=DAMAGED_FILE)
            with contextlib.suppress(OSError):
                path.replace(state_dir / DAMAGED_FILE)
            known = {}
        return cls(path, known)

    def __len__(self) -> int:
        return len(self._known)

    def note(self, peer: PeerId, addresses: Iterable[PeerAddress], now: float) -> None:
        """A peer is connected now, and can be dialled at these addresses."""
        found = tuple(a.without_peer() for a in dict.fromkeys(addresses) if not a.is_name and a.port)
        if not found:
            return
        self._known.pop(peer, None)
        self._known[peer] = (found[:ADDRESSES_MAX], now)
        self._changed = True
        if len(self._known) > PEERS_MAX:
            del self._known[next(iter(self._known))]

    def best(self, count: int) -> list[tuple[PeerId, tuple[PeerAddress, ...]]]:
        """Those seen last, the latest first."""
        ordered = sorted(self._known.items(), key=lambda item: -item[1][1])
        return [(peer, addresses) for peer, (addresses, _) in ordered[:count]]

    def contacts(self) -> list[Contact]:
        """All of them, as the DHT knows peers."""
        return [
            Contact(peer.raw, tuple(address.to_bytes() for address in addresses))
            for peer, addresses in self.best(PEERS_MAX)
        ]

    def pending(self) -> bytes | None:
        """The file's new content if anything has changed since the last call: then `write` it."""
        if not self._changed or self._path is None:
            return None
        self._changed = False
        rows = [
            {
                "id": str(peer),
                "addresses": [str(address) for address in addresses],
                "last_seen": round(seen, 1),
            }
            for peer, (addresses, seen) in self._known.items()
        ]
        return json.dumps({"version": VERSION, "peers": rows}, indent=1).encode() + b"\n"

    def write(self, content: bytes) -> None:
        """Replace the file at once. Blocks on fsync: for a thread. A disk that refuses is logged, no more."""
        if self._path is None:
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            temporary.replace(self._path)
        except OSError as error:
            log.warning("peers.file_not_written", path=str(self._path), reason=error.strerror)


def _parse(data: bytes, now: float) -> Known:
    """The peers of a file's content, oldest first; raises ValueError and P2pgzError."""
    if len(data) > FILE_MAX_BYTES:
        raise ValueError(f"more than {FILE_MAX_BYTES} bytes")
    document = parse_strict(data, where=FILE)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"not version {VERSION}")
    rows = document.get("peers")
    if not isinstance(rows, list) or len(rows) > PEERS_MAX:
        raise ValueError("no list of peers, or too long a one")
    found = [_row(row) for row in rows]
    # a clock that was wrong then or is now must not make a peer the best for ever
    fresh = [
        (peer, addresses, min(seen, now)) for peer, addresses, seen in found if now - seen < FORGET_SECONDS
    ]
    return {peer: (addresses, seen) for peer, addresses, seen in sorted(fresh, key=lambda item: item[2])}


def _row(row: Any) -> tuple[PeerId, tuple[PeerAddress, ...], float]:
    if not isinstance(row, dict):
        raise ValueError("a peer that is no object")
    peer, addresses, seen = row.get("id"), row.get("addresses"), row.get("last_seen")
    if not isinstance(peer, str) or not isinstance(addresses, list) or isinstance(seen, bool):
        raise ValueError("a peer without id or addresses")
    if not isinstance(seen, int | float) or not 0 <= len(addresses) <= ADDRESSES_MAX:
        raise ValueError("a peer without the time it was seen, or with too many addresses")
    if not all(isinstance(address, str) for address in addresses):
        raise ValueError("an address that is no text")
    return PeerId.parse(peer), tuple(PeerAddress.parse(text, where=FILE) for text in addresses), float(seen)
