"""Which TOC stands for which diff id: whether a layer that is shown by its TOC is the one that its diff id names.

containerd keeps layers by diff ids and checks them when it unpacks; what a snapshotter shows it takes on trust. The node's
`layers` asks here before it lets that happen. Each pair of diff id and TOC is remembered: a second TOC for a diff id is a
conflict, announced, and only taken after its whole blob was read and compared. Small files, `diffids/HEX.json`.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog
import trio

from p2pgz.core.decompress import Decompressor
from p2pgz.core.digest import Digest
from p2pgz.core.media import Descriptor
from p2pgz.core.model import Toc
from p2pgz.core.ports import ImageSource
from p2pgz.core.tarcheck import TarCheck
from p2pgz.errors import ChunkCorrupt, ImageInvalid
from p2pgz.fetch.stall import watched
from p2pgz.pool.disk import TEMPORARY_SUFFIX, write_durably

log = structlog.get_logger(component="fetch")

DIRECTORY: Final = "diffids"
CONFLICTS_KEPT: Final = 100
# TOCs remembered for one diff id: honest ones are as many as there are ways to convert a layer beside its tar
TOCS_MAX: Final = 64
STEP_BYTES: Final = 256 << 10

State = Literal["unchecked", "right", "wrong"]


class DiffIds:
    """What is known of diff ids on this host."""

    def __init__(self, state_path: Path) -> None:
        self._directory = state_path / DIRECTORY
        self._known: dict[Digest, dict[str, State]] = {}
        self._locks: dict[Digest, trio.Lock] = {}
        self._conflicts: deque[dict[str, Any]] = deque(maxlen=CONFLICTS_KEPT)

    def status(self) -> list[dict[str, Any]]:
        """The conflicts of this run, the last ones."""
        return list(self._conflicts)

    async def admit(
        self,
        diff_id: Digest,
        toc: Digest,
        check: Callable[[], Awaitable[Digest]],
        *,
        checked: bool,
        require: bool,
        reference: str,
    ) -> None:
        """Return if a layer with this TOC may stand for the diff id; raises ImageInvalid when it is another one's.

        `check` reads the blob, compares it with the TOC and returns its diff id. It is called for a second TOC, and with
        `require` for each that was not checked before (`checked`: it was while it was read).
        """
        async with self._locks.setdefault(diff_id, trio.Lock()):
            known = await self._load(diff_id)
            name, state = str(toc), known.get(str(toc))
            if checked:
                state = "right"
            elif state is None and len(known) >= TOCS_MAX:
                raise ImageInvalid(f"{reference}: more than {TOCS_MAX} layers claim the diff id {diff_id}")
            if state == "wrong":
                raise ImageInvalid(
                    f"{reference}: its layer with the TOC {toc} is not {diff_id}, as was found before"
                )
            others = {other: was for other, was in known.items() if other != name and was != "wrong"}
            if state != "right" and (require or others):
                state = await self._checked(diff_id, check, known, name, reference)
            if known.get(name) != (state or "unchecked"):
                await self._note(diff_id, known, name, state or "unchecked")
            if others and known[name] == "right":
                self._announce(diff_id, known, reference, "the other ones were taken unchecked")

    async def _checked(
        self,
        diff_id: Digest,
        check: Callable[[], Awaitable[Digest]],
        known: dict[str, State],
        name: str,
        reference: str,
    ) -> State:
        try:
            found = await check()
        except ImageInvalid as error:
            wrong = error
        else:
            if found == diff_id:
                return "right"
            wrong = ImageInvalid(f"{reference}: a layer is {found}, its config says {diff_id}")
        await self._note(diff_id, known, name, "wrong")
        self._announce(diff_id, known, reference, "this one is refused")
        raise wrong

    def _announce(self, diff_id: Digest, known: dict[str, State], reference: str, effect: str) -> None:
        if any(one["diff_id"] == str(diff_id) and one["tocs"] == known for one in self._conflicts):
            return
        document = {"diff_id": str(diff_id), "tocs": dict(known), "reference": reference, "effect": effect}
        self._conflicts.append({"at": time.time(), **document})
        log.error("diffid.conflict", **document)

    async def _load(self, diff_id: Digest) -> dict[str, State]:
        if (known := self._known.get(diff_id)) is None:
            path = self._directory / f"{diff_id.hex}.json"
            try:
                data = await trio.to_thread.run_sync(path.read_bytes)
                known = msgspec.json.decode(data, type=dict[str, State])
            except FileNotFoundError:
                known = {}
            except (
                OSError,
                msgspec.MsgspecError,
            ) as error:  # then it is checked anew, as far as somebody asks
                log.warning("diffid.record_unusable", path=str(path), reason=str(error))
                known = {}
            self._known[diff_id] = known
        return known

    async def _note(self, diff_id: Digest, known: dict[str, State], name: str, state: State) -> None:
        known[name] = state
        data = msgspec.json.encode(known)

        path = self._directory / f"{diff_id.hex}.json"

        def write() -> None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            if state != "unchecked":
                write_durably(path, data)
                return
            # a claim is no finding: what a power failure takes of it is taken down again, and a pull need not wait for disks
            temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
            temporary.write_bytes(data)
            temporary.replace(path)

        try:
            await trio.to_thread.run_sync(write)
        except OSError as error:
            log.warning("diffid.not_kept", diff_id=str(diff_id), reason=str(error))


async def check_blob(source: ImageSource, descriptor: Descriptor, toc: Toc) -> Digest:
    """Read a layer's blob once: its bytes are its digest's, its tar is what the TOC tells. Returns the tar's diff id.

    Raises ImageInvalid, ChunkCorrupt, or what the source raises.
    """
    blob_hash, decompressor, tar = hashlib.sha256(), Decompressor(), TarCheck(toc)

    def feed(data: bytes) -> None:
        blob_hash.update(data)
        for piece in decompressor.feed(data):
            tar.feed(piece)

    def finish() -> Digest:
        if Digest(blob_hash.digest()) != descriptor.digest:
            raise ChunkCorrupt(
                f"{source.name}: layer {descriptor.digest} has other bytes",
                hint="the registry or a proxy on the way gave other bytes",
            )
        for piece in decompressor.finish():
            tar.feed(piece)
        return tar.finish()

    async with watched(source.blob(descriptor, 0, descriptor.size), source.name) as pieces:
        gathered: list[bytes] = []
        gathered_bytes = 0
        async for piece in pieces:
            gathered.append(piece)
            gathered_bytes += len(piece)
            if gathered_bytes >= STEP_BYTES:
                await trio.to_thread.run_sync(feed, b"".join(gathered))
                gathered, gathered_bytes = [], 0
        await trio.to_thread.run_sync(feed, b"".join(gathered))
    return await trio.to_thread.run_sync(finish)
