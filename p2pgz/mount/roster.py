"""Which processes may answer reads from which segment file, and their word that no such answer is in flight.

`FsHost` and `SegmentClient` enter their sessions; eviction asks before it punches. An answered ping is that word, from any
version of `fs`: it takes records and kernel requests in one thread, and looks at the bits and replies without a pause, so
whatever it replies after the ping it has looked up after the bits were cleared. A process that has ended replies nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import trio

from p2pgz.mount.relink import short_path
from p2pgz.mount.setup import SessionOptions
from p2pgz.mount.stats import FsStats


class Answering(Protocol):
    """A session, as far as it matters here."""

    options: SessionOptions
    stats: FsStats

    async def ping(self) -> None:
        """Return when the process has answered."""
        ...

    def invalidate(self, segment_index: int, first: int, count: int) -> None:
        """Have the kernel forget what it has cached of these chunks."""
        ...

    async def wait_closed(self) -> None:
        """Return when the process has ended."""
        ...


class Roster:
    """Sessions that live, and those that are just being made."""

    def __init__(self) -> None:
        self._sessions: dict[Answering, frozenset[str]] = {}
        self._starting: set[trio.Event] = set()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the making of a session, from before its process can have the bits, until it is entered."""
        started = trio.Event()
        self._starting.add(started)
        try:
            yield
        finally:
            self._starting.discard(started)
            started.set()

    def enter(self, session: Answering) -> None:
        """It serves the segments of its options."""
        self._sessions[session] = frozenset(os.fspath(files.data_path) for files in session.options.segments)

    def leave(self, session: Answering) -> None:
        """Its process has ended."""
        self._sessions.pop(session, None)

    def is_mapped(self, path: Path) -> bool:
        """Whether a session has this file, or may have it in a moment."""
        name = os.fspath(path)
        return bool(self._starting) or any(name in paths for paths in self._sessions.values())

    def invalidate(self, path: Path, chunks: Sequence[int]) -> None:
        """Have kernels forget what they cached of chunks (ascending) that were wrong on the disk; their bits are cleared.

        Whatever a process replies after it has heard this, it has looked up after the bits were cleared.
        """
        name = os.fspath(path)
        runs: list[list[int]] = []
        for n in chunks:
            if runs and sum(runs[-1]) == n:
                runs[-1][1] += 1
            else:
                runs.append([n, 1])
        for session, paths in self._sessions.items():
            if name not in paths:
                continue
            for index, files in enumerate(session.options.segments):
                if os.fspath(files.data_path) == name:
                    for first, count in runs:
                        session.invalidate(index, first, count)

    @property
    def reads(self) -> int:
        """Changes when somebody reads through a mount and the page cache does not have it."""
        return sum(session.stats.reads for session in self._sessions)

    async def quiesce(self, path: Path) -> None:
        """Return when no reply that relies on bits set before the call is in flight. The caller sets a time limit."""
        for started in list(self._starting):
            await started.wait()
        name = os.fspath(path)
        async with trio.open_nursery() as nursery:
            for session, paths in self._sessions.items():
                if name in paths:
                    nursery.start_soon(_word_of, session)


async def _word_of(session: Answering) -> None:
    async with trio.open_nursery() as nursery:

        async def ended() -> None:
            await session.wait_closed()
            nursery.cancel_scope.cancel()

        nursery.start_soon(ended)
        await session.ping()
        nursery.cancel_scope.cancel()


def listening(sockets: Sequence[Path]) -> list[Path]:
    """Those behind which a process still is."""
    alive = []
    for path in sockets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                with short_path(path) as name:
                    probe.connect(name)
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            except OSError:
                pass
            alive.append(path)
    return alive


def weeded(sockets: Sequence[Path]) -> list[Path]:
    """The same; the others, which a crash has left, are removed."""
    alive = listening(sockets)
    for path in set(sockets).difference(alive):
        path.unlink(missing_ok=True)
    return alive
