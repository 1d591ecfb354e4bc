"""Manifests, configs and TOCs by lease: of several nodes that open the same image one asks the registry for each.

Owned by `fetch.leasing`, used by `fetch.documents`. A document is one extent of a swarm of its own. Who follows asks its
parent by DOC_WANT until it has it: a parent may give a document away before the whole image is open there, since the
policy of its repository was asked before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from p2pgz.core.crowdmsg import EXTENT_DOCUMENT, Follow, Gone
from p2pgz.core.leases import Leases
from p2pgz.core.schedule import Priority
from p2pgz.errors import AuthRefused, P2pgzError
from p2pgz.fetch.leaselayer import LeaseLinks

log = structlog.get_logger(component="leases")

# Somebody waits for a mount: longer than the registry takes for a large TOC, shorter than what people call hanging
DOCUMENT_SECONDS: Final = 5.0
ASK_SECONDS: Final = 0.05
# Of documents that this node has brought: enough for the images that are being started
REMEMBERED_MAX: Final = 1024
_LABEL: Final = b"p2pgz document 1\0"


def document_swarm(digest: bytes) -> bytes:
    """The swarm that stands for a document: not its digest, which may be that of a layer's swarm as well."""
    return hashlib.sha256(_LABEL + digest).digest()


class _Call:
    __slots__ = ("data", "decided", "digest", "limit_bytes")

    def __init__(self, digest: bytes, limit_bytes: int) -> None:
        self.digest = digest
        self.limit_bytes = limit_bytes
        self.decided = trio.Event()
        self.data: bytes | None = None


class LeasedDocuments:
    """The documents that are being got. `act` does what the machine says."""

    def __init__(
        self, machine: Leases, links: LeaseLinks, nursery: trio.Nursery, act: Callable[[], None]
    ) -> None:
        self._machine = machine
        self._links = links
        self._nursery = nursery
        self._act = act
        self._calls: dict[bytes, _Call] = {}
        self._here: dict[bytes, None] = {}

    def has(self, swarm: bytes) -> bool:
        """Whether a document is here and may be asked for."""
        return swarm in self._here

    async def get(
        self, digest: bytes, *, limit_bytes: int, fetch: Callable[[], Awaitable[bytes]]
    ) -> tuple[bytes, bool]:
        """The document from another member, checked, or by `fetch` when it is this node's turn, or nobody else is quick
        enough; and whether it was fetched. The caller says `landed` once it is kept. Raises what `fetch` raises."""
        swarm, now = document_swarm(digest), self._links.now()
        call = self._calls.get(swarm)
        if call is None:
            call = self._calls[swarm] = _Call(digest, limit_bytes)
            self._machine.want(
                swarm,
                EXTENT_DOCUMENT,
                [0],
                priority=Priority.BLOCKED_READ,
                deadline=now + DOCUMENT_SECONDS,
                now=now,
            )
            self._act()
        try:
            with trio.move_on_after(DOCUMENT_SECONDS):
                await call.decided.wait()
            if call.data is not None:
                return call.data, False
            return await fetch(), True
        except P2pgzError as error:
            refused = isinstance(error, AuthRefused)
            self._machine.failed(swarm, EXTENT_DOCUMENT, self._links.now(), refused=refused)
            self._leave(swarm)
            raise
        except trio.Cancelled:
            self._leave(swarm)
            raise

    def landed(self, digest: bytes) -> None:
        """It is kept, and may be asked for."""
        swarm = document_swarm(digest)
        self._calls.pop(swarm, None)
        self._here[swarm] = None
        if len(self._here) > REMEMBERED_MAX:
            del self._here[next(iter(self._here))]
        self._machine.landed(swarm, EXTENT_DOCUMENT, [0], self._links.now())
        self._act()

    def _leave(self, swarm: bytes) -> None:
        self._calls.pop(swarm, None)
        self._machine.unwant(swarm, EXTENT_DOCUMENT, [0])
        self._act()

    # --- what the machine says

    def turn(self, swarm: bytes) -> None:
        """This node is to ask the source."""
        call = self._calls.get(swarm)
        if call is not None:
            call.decided.set()
        elif swarm not in self._here:  # nobody here waits for it any more
            self._machine.failed(swarm, EXTENT_DOCUMENT, self._links.now())

    def follow(self, parent: bytes, frame: Follow) -> None:
        """Ask the parent until it has it."""
        call = self._calls.get(frame.swarm)
        if call is not None:
            self._nursery.start_soon(self._ask, call, parent, frame)

    async def _ask(self, call: _Call, parent: bytes, frame: Follow) -> None:
        try:
            while not call.decided.is_set():
                waits_for = self._machine.waits_for(frame.swarm, frame.extent)
                if waits_for is None or waits_for[0] != parent:
                    return
                data = await self._links.document(parent, call.digest, call.limit_bytes)
                if data is not None:
                    call.data = data
                    call.decided.set()
                    return
                with trio.move_on_after(ASK_SECONDS):
                    await call.decided.wait()
        except Exception:  # a bug here costs a request to the registry
            log.exception("leases.bug")
            self._machine.receive(parent, Gone(frame.request), self._links.now())
            self._act()
