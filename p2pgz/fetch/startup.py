"""The start-up lists of this host: one small file for each image that was mounted, told to peers who ask; and theirs.

Called by `mount.startup` and, on behalf of peers, by `fetch.offers`. Only what this host's own mounts have read is kept and
told: who passes on another's word could be made to lie. A file that cannot be read is set aside and recorded again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from p2pgz.core import startup
from p2pgz.core.digest import Digest
from p2pgz.core.peerid import PeerId
from p2pgz.core.ports import NamingPeers
from p2pgz.core.startup import Spot, StartUpList
from p2pgz.errors import PeerFault, PoolFull, StateError
from p2pgz.pool.disk import write_durably
from p2pgz.pool.segment import SHARED_DOMAIN

log = structlog.get_logger(component="fetch")

STARTUP: Final = "startup"
SUFFIX: Final = ".list"
DAMAGED_SUFFIX: Final = ".damaged"
# At some 10 KB each; the ones not written for longest go first
FILES_MAX: Final = 1024
KEPT_IN_MEMORY: Final = 32
# A peer that is well answers within a round trip, and nobody waits for the others: the list is a help, not a need
ASK_SECONDS: Final = 2.0
# Who asks must be able to believe the list of a host that has restarted; more than this many opinions help nobody
PEERS_MAX: Final = 16


class StartUpLists:
    """The lists in `state_path`."""

    def __init__(self, state_path: Path) -> None:
        self._directory = state_path / STARTUP
        self.peers: NamingPeers | None = None
        """who is asked; they come to be later than what they may ask us for"""
        self._cache: OrderedDict[Path, StartUpList] = OrderedDict()
        self._writing = trio.Lock()

    def known(self, manifest: Digest, domain: str) -> StartUpList:
        """What this host has recorded of an image. A file of some KB is read the first time."""
        path = self._path(manifest, domain)
        found = self._cache.get(path)
        if found is None:
            found = _read(path)
            self._remember(path, found)
        return found

    def _remember(self, path: Path, found: StartUpList) -> None:
        self._cache[path] = found
        self._cache.move_to_end(path)
        if len(self._cache) > KEPT_IN_MEMORY:
            self._cache.popitem(last=False)

    async def add(self, manifest: Digest, domain: str, read: Sequence[Spot]) -> None:
        """Another mount has started and read these chunks in this order; raises PoolFull."""
        path = self._path(manifest, domain)
        async with self._writing:
            made = startup.merged(self.known(manifest, domain), read)

            def write() -> None:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                write_durably(path, startup.to_file(made))
                _prune(self._directory)

            try:
                await trio.to_thread.run_sync(write)
            except OSError as error:
                raise PoolFull(f"{path}: {error.strerror}") from error
            self._remember(path, made)

    def told(self, manifest: Digest, domain: str) -> bytes | None:
        """What peers are told of an image; None when there is nothing to tell."""
        found = self.known(manifest, domain)
        return startup.to_bytes(found.spots) if found.ages else None

    async def ask(
        self, manifest: Digest, secret: bytes, chunk_counts: Mapping[bytes, int], asked: set[PeerId]
    ) -> list[list[Spot]]:
        """What connected peers that are not in `asked` say; they are in it afterwards. Liars lose their place."""
        peers = self.peers
        if peers is None:
            await trio.lowlevel.checkpoint()
            return []
        found: list[list[Spot]] = []

        def told(peer: PeerId, data: bytes) -> None:
            try:
                spots = startup.from_bytes(data)
                if spots is not None and startup.lies(spots, chunk_counts):
                    raise PeerFault("a start-up list with chunks that its image does not have")
            except PeerFault as error:
                peers.blame(peer, error)
                return
            if spots:
                found.append(spots)

        with trio.move_on_after(ASK_SECONDS):
            await peers.named(
                startup.name_of(manifest).raw,
                told,
                limit_bytes=startup.LIST_MAX_BYTES,
                secret=secret,
                asked=asked,
                peers_max=PEERS_MAX,
            )
        return found

    def _path(self, manifest: Digest, domain: str) -> Path:
        suffix = "" if domain == SHARED_DOMAIN else "-" + Digest.of(domain.encode()).hex[:16]
        return self._directory / f"{manifest.hex}{suffix}{SUFFIX}"


def _read(path: Path) -> StartUpList:
    try:
        return startup.from_file(path.read_bytes())
    except FileNotFoundError:
        return startup.NOTHING
    except (StateError, OSError) as error:
        log.warning("startup.unusable", path=str(path), reason=str(error), effect="set aside, recorded again")
        try:
            path.replace(path.with_name(path.name + DAMAGED_SUFFIX))
        except OSError as failure:
            log.warning("startup.not_set_aside", path=str(path), reason=str(failure))
        return startup.NOTHING


def _prune(directory: Path) -> None:
    paths = list(directory.glob(f"*{SUFFIX}*"))
    if len(paths) > FILES_MAX:
        by_age: Callable[[Path], float] = lambda path: path.stat().st_mtime  # noqa: E731
        for path in sorted(paths, key=by_age)[: len(paths) - FILES_MAX]:
            path.unlink(missing_ok=True)
